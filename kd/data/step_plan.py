"""Which sequences form which micro-batch on which rank. Only this module decides it, by pure
functions, so that the ranks, the plan of a run and its report agree.

All ranks run the same number of micro-batches in parallel, so those that run at the same time
should take about equally long. A sequence of L tokens takes Work.linear * L + Work.quadratic * L^2.

Shapes: N examples, G sequences of a global batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt

from kd.data.truncate import IntArray

FloatArray = npt.NDArray[np.float64]
SequenceLayout = Literal["padded", "packed"]


@dataclass(frozen=True)
class Work:
    """FLOPs, or anything in proportion to them, of a sequence of L tokens."""

    linear: float = 1.0
    quadratic: float = 0.0

    def of(self, length_N: IntArray) -> FloatArray:
        length = length_N.astype(np.float64)
        work: FloatArray = self.linear * length + self.quadratic * np.square(length)
        return work


@dataclass(frozen=True)
class BatchShape:
    """How a global batch is cut up.

    micro_batch_size: sequences of a micro-batch, or with max_tokens nothing: micro-batches then
    hold as many sequences as that many tokens allow. A longer sequence is one of its own. layout:
    "padded" to the longest sequence of the micro-batch, and then padding counts as tokens, or
    "packed" one behind the other. num_rollouts: sequences of a global batch in whose place
    responses are sampled.
    """

    global_batch_size: int
    micro_batch_size: int = 1
    max_tokens: int | None = None
    layout: SequenceLayout = "padded"
    work: Work = Work()
    num_rollouts: int = 0


@dataclass(frozen=True)
class StepPlan:
    """micro_batches[r][i] are the indices of the examples of data-parallel rank r's micro-batch i,
    int64, longest first, none where there is nothing left to deal. All ranks have the same number
    of micro-batches.
    """

    micro_batches: tuple[tuple[IntArray, ...], ...]


def plan_step(
    step: int,
    num_input_tokens_N: IntArray,
    shape: BatchShape,
    *,
    seed: int,
    data_parallel_size: int,
) -> StepPlan:
    """The micro-batches of a step, of all ranks.

    step: counted from 0. num_input_tokens_N: the length of each of N examples as it is read. The
    same sequences are learned from whatever the shape and the number of ranks. Those in whose
    place responses are sampled are left out: rollouts_of_step().
    """
    chosen_G = _global_batch(step, len(num_input_tokens_N), shape, seed)
    is_kept_G = np.ones(len(chosen_G), dtype=bool)
    is_kept_G[_sampled(step, shape, seed)] = False
    kept = chosen_G[is_kept_G]
    dealt = deal(num_input_tokens_N[kept], shape, data_parallel_size)
    return StepPlan(tuple(tuple(kept[micro] for micro in rank) for rank in dealt))


def rollouts_of_step(
    step: int, num_examples: int, shape: BatchShape, samples_per_prompt: int, *, seed: int
) -> IntArray:
    """The examples whose prompts get sampled responses, int64 (num_rollouts,), each as often in a
    row as it is sampled. A function of seed and step only.
    """
    chosen_G = _global_batch(step, num_examples, shape, seed)
    prompts = chosen_G[_sampled(step, shape, seed)[::samples_per_prompt]]
    return np.repeat(prompts, samples_per_prompt)


def _global_batch(step: int, num_examples: int, shape: BatchShape, seed: int) -> IntArray:
    epoch, position = divmod(step, num_examples // shape.global_batch_size)
    start = position * shape.global_batch_size
    order_N = _epoch_order(seed, epoch, num_examples)
    return order_N[start : start + shape.global_batch_size]


def _sampled(step: int, shape: BatchShape, seed: int) -> IntArray:
    """Positions in the global batch in whose place responses are sampled."""
    order_G = np.random.default_rng((seed, step, 1)).permutation(shape.global_batch_size)
    return order_G[: shape.num_rollouts]


def deal(length_G: IntArray, shape: BatchShape, num_ranks: int) -> tuple[tuple[IntArray, ...], ...]:
    """Positions in length_G: [rank][micro-batch], longest first; as many micro-batches a rank, none
    of no sequences.
    """
    if not len(length_G):
        return ((),) * num_ranks
    order_G = np.argsort(-length_G, kind="stable")
    length_G = length_G[order_G]
    if shape.max_tokens is None:
        dealt = _by_number(len(length_G), shape.micro_batch_size, num_ranks)
    elif shape.layout == "packed":
        dealt = _packed(length_G, shape.max_tokens, shape.work, num_ranks)
    else:
        dealt = _padded(length_G, shape.max_tokens, shape.work, num_ranks)
    micro_batches = [order_G[part] for part in dealt]
    return tuple(tuple(micro_batches[rank::num_ranks]) for rank in range(num_ranks))


# The functions below deal G sequences, longest first, into lists of their positions: a multiple of
# num_ranks of them, of which each num_ranks in a row run side by side.


def _by_number(num_sequences: int, size: int, num_ranks: int) -> list[IntArray]:
    """`size` of them each, so that those that run side by side are about equally long."""
    positions, rows = np.arange(num_sequences), -(-num_sequences // (size * num_ranks))
    return [positions[i * size : (i + 1) * size] for i in range(rows * num_ranks)]


def _packed(length_G: IntArray, max_tokens: int, work: Work, num_ranks: int) -> list[IntArray]:
    """As few as hold all tokens, with about equal work: each sequence goes where least work is and
    its tokens find room.
    """
    work_G, rows = work.of(length_G), max(-(-int(length_G.sum()) // (num_ranks * max_tokens)), 1)
    while (parts := _fill(length_G, work_G, rows * num_ranks, max_tokens)) is None:
        rows += 1
    return _most_work_first(parts, [float(work_G[part].sum()) for part in parts])


def _fill(
    length_G: IntArray, work_G: FloatArray, num_parts: int, max_tokens: int
) -> list[IntArray] | None:
    """None where a sequence finds no room."""
    tokens, load = np.zeros(num_parts, dtype=np.int64), np.zeros(num_parts)
    parts: list[list[int]] = [[] for _ in range(num_parts)]
    for position, (length, work) in enumerate(zip(length_G, work_G, strict=True)):
        has_room = (tokens + length <= max_tokens) | (tokens == 0)
        if not has_room.any():
            return None
        part = int(np.where(has_room, load, np.inf).argmin())
        tokens[part] += length
        load[part] += work
        parts[part].append(position)
    return [np.array(part, dtype=np.int64) for part in parts]


def _padded(length_G: IntArray, max_tokens: int, work: Work, num_ranks: int) -> list[IntArray]:
    """As few as hold all tokens with their padding, cut where work, padding included, is most
    equal: the least bound on it that needs no more of them.
    """
    work_G = work.of(length_G)
    num_parts = len(_cut(length_G, work_G, max_tokens, np.inf))
    num_parts = -(-num_parts // num_ranks) * num_ranks
    low, high = float(work_G[0]), float(work_G[0]) * len(work_G)
    for _ in range(40):  # bisection, to a part in 10^12
        middle = (low + high) / 2
        fits = len(_cut(length_G, work_G, max_tokens, middle)) <= num_parts
        low, high = (low, middle) if fits else (middle, high)
    parts = _cut(length_G, work_G, max_tokens, high)
    parts += [np.empty(0, dtype=np.int64)] * (num_parts - len(parts))
    return _most_work_first(parts, [len(p) * float(work_G[p[0]]) if len(p) else 0.0 for p in parts])


def _cut(
    length_G: IntArray, work_G: FloatArray, max_tokens: int, max_work: float
) -> list[IntArray]:
    """Runs of sequences, each padded to its first, within both bounds."""
    parts, start = [], 0
    while start < len(length_G):
        size = int(min(max_tokens // length_G[start], max_work / work_G[start]))
        stop = min(start + max(size, 1), len(length_G))
        parts.append(np.arange(start, stop))
        start = stop
    return parts


def _most_work_first(parts: Sequence[IntArray], loads: Sequence[float]) -> list[IntArray]:
    order = np.argsort(-np.array(loads), kind="stable")
    return [parts[i] for i in order]


@lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, num_examples: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng((seed, epoch)).permutation(num_examples)
