"""Data that others recorded, as a DATASET: nuScenes tables, folders of images, WebDataset shards, MCAP logs."""
