"""How quality and cost depend on what of a trace is trained on: a run for each cell."""
