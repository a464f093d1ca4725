"""Distillation: from a teacher to the student."""
