"""How quality and cost depend on what of a trace is trained on: many runs of one recipe, one for
each cell.
"""
