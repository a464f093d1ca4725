"""Engines: which one belongs to this bundle and machine, why another does not, and how to get a new one."""
