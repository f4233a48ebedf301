"""Tell transformers whether position ids restart, which it would otherwise ask the device."""

import contextlib
from collections.abc import Iterator

from torch import Tensor
from transformers import masking_utils


@contextlib.contextmanager
def known_packing(is_packed: bool) -> Iterator[None]:
    """Inside, models make their masks for packed sequences, or for one sequence a row. transformers
    looks at the positions itself in each forward, and
    the host waits for the answer, which is known here.
    """
    ask = masking_utils.find_packed_sequence_indices

    def answer(position_ids: Tensor) -> Tensor | None:
        if not is_packed:
            return None
        return (position_ids.diff(prepend=position_ids[:, :1] - 1) != 1).cumsum(-1)

    masking_utils.find_packed_sequence_indices = answer
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = ask
