"""A run's folder: whose it is, what it holds, and whether it may begin or continue."""
