"""Latency and memory of a runtime, measured fairly."""
