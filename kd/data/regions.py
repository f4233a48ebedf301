"""Regions: where a token is in its whole trace, as its section and its eighth of the sequence.

Shapes: T tokens, 3 sections.
"""

import numpy as np

from kd.data.truncate import SECTIONS, IntArray

NUM_POSITIONS = 8
NUM_REGIONS = len(SECTIONS) * NUM_POSITIONS


def regions_of(index_T: IntArray, num_tokens_3: IntArray) -> IntArray:
    """Regions of the tokens at `index_T`: section * NUM_POSITIONS + position, int64 (T,).

    position = floor(NUM_POSITIONS * index / length), where length counts all tokens of the
    sequence, whatever a truncation leaves of it: a region means the same place at every
    keep_fraction.
    """
    section_T: IntArray = np.searchsorted(num_tokens_3.cumsum(), index_T, side="right")
    position_T: IntArray = NUM_POSITIONS * index_T // num_tokens_3.sum()
    return section_T * NUM_POSITIONS + position_T
