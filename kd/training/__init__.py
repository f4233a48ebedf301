"""A training run: its loop, its step, and what they are built of and report."""
