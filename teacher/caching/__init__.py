"""The feature cache on disk: addresses, shard files, how they are written, merged and exported."""
