"""`check` and `compare`: every budget measured here, every change held against what is deployed."""
