"""Device files: one board each, with its power modes."""
