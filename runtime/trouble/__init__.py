"""Accuracy and validity under trouble: what a runtime publishes when sensors fail, and what it would have published."""
