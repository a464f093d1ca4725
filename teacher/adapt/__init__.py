"""Adapting a frozen teacher to a new domain with few parameters, and putting the result back into one network."""
