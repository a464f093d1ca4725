"""One training loop for every stage that trains: deterministic, resumable, the same on one process or several."""
