"""A run's folder: its owner, its files, and whether a run may start or continue in it."""
