"""Fitted constants: one family of boards each."""
