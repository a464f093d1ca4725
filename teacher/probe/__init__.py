"""What a network's representation is good for: the probe ladder."""
