"""Ways to train a teacher's backbone, one file each; `registry` knows them by name."""
