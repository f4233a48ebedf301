"""The batches of optimizer step s as a pure function of (seed, s): nothing to save, nothing to
restore on resume.

An epoch is a permutation drawn from (seed, epoch); its last, partial global batch is dropped. A
global batch is the same set of examples for every number of ranks and every micro-batch size.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from kd.data.collate import Batch, collate
from kd.data.dataset import Examples
from kd.errors import UserError


@dataclass(frozen=True)
class Loader:
    examples: Examples
    global_batch_size: int
    micro_batch_size: int
    seed: int
    pad_token_id: int
    pad_to_multiple_of: int = 1

    def __post_init__(self) -> None:
        if len(self.examples) < self.global_batch_size:
            raise UserError(
                f"training.global_batch_size = {self.global_batch_size} needs as many training "
                f"examples, and there "
                f"are {len(self.examples)}: lower it, or widen data and truncation"
            )

    @property
    def steps_per_epoch(self) -> int:
        return len(self.examples) // self.global_batch_size

    def global_batch(self, step: int) -> npt.NDArray[np.int64]:
        """Indices into `examples` of one optimizer step (counted from 0), longest first: int64
        (global_batch_size,).

        Ordered by length, examples that run side by side, on all ranks, are about equally long:
        little padding, and no rank waits long for another.
        """
        epoch, position = divmod(step, self.steps_per_epoch)
        start = position * self.global_batch_size
        chosen = _epoch_order(self.seed, epoch, len(self.examples))[
            start : start + self.global_batch_size
        ]
        return chosen[np.argsort(-self.examples.num_read_tokens[chosen], kind="stable")]

    def micro_batches(self, step: int, rank: int, world_size: int) -> list[Batch]:
        """What `rank` runs in one optimizer step: as many micro-batches as every other rank."""
        indices = self.global_batch(step).reshape(-1, world_size, self.micro_batch_size)[:, rank]
        return [
            collate([self.examples[i] for i in micro], self.pad_token_id, self.pad_to_multiple_of)
            for micro in indices
        ]


def validation_batches(
    examples: Examples, micro_batch_size: int, rank: int, world_size: int, pad_token_id: int
) -> Iterator[Batch]:
    """All examples once, dealt over the ranks; every rank gets as many batches, the last ones
    perhaps empty.
    """
    stride = micro_batch_size * world_size
    for start in range(rank * micro_batch_size, -(-len(examples) // stride) * stride, stride):
        stop = min(start + micro_batch_size, len(examples))
        yield collate([examples[i] for i in range(start, stop)], pad_token_id)


@lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, num_examples: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng((seed, epoch)).permutation(num_examples)
