"""What a training run will cost, and what size of model and data is worth it."""
