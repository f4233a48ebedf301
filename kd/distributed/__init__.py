"""The ranks of a run: their process group, nodes and peers, what they agree on, and how they
end.
"""
