"""Datasets: recording, format, splits, audit."""
