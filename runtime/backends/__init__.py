"""What can run a model, behind one small protocol."""
