"""Networks that were trained elsewhere become TEACHERs: Hugging Face folders and torch checkpoints, never trusted."""
