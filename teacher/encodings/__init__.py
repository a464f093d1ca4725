"""How a teacher's answers are stored: one file an encoding, `registry.make` builds them from their spelling."""
