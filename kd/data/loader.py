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
from kd.data.truncate import IntArray
from kd.distributed.layout import Layout
from kd.errors import UserError


@dataclass(frozen=True)
class StepPlan:
    """Which sequences form which micro-batch on which rank, in one optimizer step.

    micro_batches[r][i] are the indices of the examples of data-parallel rank r's micro-batch i,
    int64, longest first. All ranks have the same number of micro-batches.
    """

    micro_batches: tuple[tuple[IntArray, ...], ...]


def plan_step(
    step: int,
    num_input_tokens_N: IntArray,
    *,
    seed: int,
    global_batch_size: int,
    micro_batch_size: int,
    data_parallel_size: int,
) -> StepPlan:
    """The only author of a step's layout, and pure: all ranks and the plan of a run call it.

    step: counted from 0. num_input_tokens_N: the length of each of N examples as it is read.

    Sequences are dealt in the order of their length: those that run side by side, on all ranks, are
    about equally long, so that there is little padding and no rank waits long for another.
    """
    epoch, position = divmod(step, len(num_input_tokens_N) // global_batch_size)
    start = position * global_batch_size
    order_N = _epoch_order(seed, epoch, len(num_input_tokens_N))
    chosen = order_N[start : start + global_batch_size]
    longest_first = chosen[np.argsort(-num_input_tokens_N[chosen], kind="stable")]
    dealt = longest_first.reshape(-1, data_parallel_size, micro_batch_size)
    return StepPlan(tuple(tuple(dealt[:, rank]) for rank in range(data_parallel_size)))


@dataclass(frozen=True)
class Loader:
    examples: Examples
    global_batch_size: int
    micro_batch_size: int
    seed: int
    pad_token_id: int

    def __post_init__(self) -> None:
        if len(self.examples) < self.global_batch_size:
            raise UserError(
                f"training.global_batch_size = {self.global_batch_size} needs as many training "
                f"examples, and there are {len(self.examples)}: lower it, or widen data and "
                "truncation"
            )

    @property
    def steps_per_epoch(self) -> int:
        return len(self.examples) // self.global_batch_size

    def plan_step(self, step: int, data_parallel_size: int) -> StepPlan:
        return plan_step(
            step,
            self.examples.num_input_tokens,
            seed=self.seed,
            global_batch_size=self.global_batch_size,
            micro_batch_size=self.micro_batch_size,
            data_parallel_size=data_parallel_size,
        )

    def micro_batches(self, step: int, layout: Layout) -> list[Batch]:
        """What this rank runs in one optimizer step."""
        plan = self.plan_step(step, layout.data_parallel_size)
        return [
            collate([self.examples[i] for i in micro], self.pad_token_id, self.examples.num_sources)
            for micro in plan.micro_batches[layout.data_parallel_rank]
        ]


def validation_batches(
    examples: Examples, micro_batch_size: int, layout: Layout, pad_token_id: int
) -> Iterator[Batch]:
    """All examples once, dealt over the ranks; every rank gets as many batches, the last ones
    perhaps empty.
    """
    stride = micro_batch_size * layout.data_parallel_size
    first = layout.data_parallel_rank * micro_batch_size
    for start in range(first, -(-len(examples) // stride) * stride, stride):
        stop = min(start + micro_batch_size, len(examples))
        yield collate([examples[i] for i in range(start, stop)], pad_token_id, examples.num_sources)


@lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, num_examples: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng((seed, epoch)).permutation(num_examples)
