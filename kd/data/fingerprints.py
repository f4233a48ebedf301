"""Hashes that identify the data of a run: its rows and all of their tokens."""

import hashlib
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from kd.data.dataset import Data, Examples

_BATCH_SIZE = 1000  # examples whose tokens are in memory at a time


def data_fingerprints(data: Data) -> dict[int, str]:
    """SHA-256 of what is trained and validated on, by the format_version of data.json: 1 has the
    rows and the lengths of their sections, and 2 the token ids as well.
    """
    lengths, tokens = hashlib.sha256(), hashlib.sha256()
    for examples in (data.train, data.validation):
        if examples is None:
            continue
        lengths.update(examples.row_N.tobytes() + examples.num_tokens_N3.tobytes())
        for token_ids in _token_ids(examples):
            tokens.update(np.ascontiguousarray(token_ids).data)
    tokens.update(lengths.digest())
    return {1: lengths.hexdigest(), 2: tokens.hexdigest()}


def _token_ids(examples: Examples) -> Iterator[npt.NDArray[np.int32]]:
    """Of the full sequences, one after another, a batch at a time."""
    table = examples.table.with_format("arrow", columns=["input_ids"])
    for first in range(0, len(examples), _BATCH_SIZE):
        rows = table[examples.row_N[first : first + _BATCH_SIZE]]
        yield rows["input_ids"].combine_chunks().flatten().to_numpy()
