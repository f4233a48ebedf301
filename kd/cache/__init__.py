"""What a teacher says of whole traces, computed once: every truncation length, seed, epoch and
student reads the beginning of it.

In a causal model the state at a position depends on the tokens up to there alone, so that the
states of a whole trace are those of each of its prefixes.
"""

from kd.cache.kinds import Kind, kind_of
from kd.cache.store import Cache, open_cache

__all__ = ["Cache", "Kind", "kind_of", "open_cache"]
