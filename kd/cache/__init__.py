"""A teacher's outputs for whole traces, computed once and read for every truncation length, seed,
epoch and student.

In a causal model the state at a position depends only on the tokens up to there, so the states of a
whole trace contain those of each of its prefixes.
"""

from kd.cache.kinds import Kind, kind_of
from kd.cache.store import Cache, open_cache

__all__ = ["Cache", "Kind", "kind_of", "open_cache"]
