"""Losses of distillation, one idea a file; `registry` names them."""
