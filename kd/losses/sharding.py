"""VocabShard: this rank's slice of a vocabulary whose heads are split over a process group, as
DTensor's Shard(0) does.

Shapes: C rows of a chunk, B rows of a block of it, V tokens of this rank's slice.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class VocabShard:
    """Tokens [offset, offset + size) of the shared vocabulary are this rank's. All ranks hold the
    same rows.
    """

    group: dist.ProcessGroup
    offset: int
    size: int
    largest_size: int

    def max_(self, values: Tensor) -> Tensor:
        """The greatest of all ranks, in place; every rank must call it."""
        dist.all_reduce(values, dist.ReduceOp.MAX, group=self.group)
        return values

    def sum_(self, values: Tensor) -> Tensor:
        """The sum over all ranks, in place; every rank must call it."""
        dist.all_reduce(values, dist.ReduceOp.SUM, group=self.group)
        return values

    def logsumexp(self, local: Tensor) -> Tensor:
        """From log(sum(exp)) of this slice to that of the whole vocabulary; every rank must call
        it.
        """
        greatest = self.max_(local.clone())
        return greatest + self.sum_((local - greatest).exp()).log()

    def local_labels(self, labels_C: Tensor) -> tuple[Tensor, Tensor]:
        """Return (the labels counted from `offset`, clamped into the slice; whether each lay in
        it).
        """
        local_C = labels_C - self.offset
        return local_C.clamp(0, self.size - 1), (local_C >= 0) & (local_C < self.size)


def vocab_shard(group: dist.ProcessGroup, vocab_size: int) -> VocabShard:
    """Return this rank's slice of `vocab_size` tokens: ceil(vocab_size / ranks) each, the last
    ranks less.

    Raises:
        ValueError: a rank would be left without a token.
    """
    num_ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    size = -(-vocab_size // num_ranks)
    if size * (num_ranks - 1) >= vocab_size:
        raise ValueError(
            f"vocab_size={vocab_size!r} leaves the last of {num_ranks} ranks no token; use fewer "
            f"ranks"
        )
    return VocabShard(group, rank * size, min(size, vocab_size - rank * size), size)


def all_ranks_sum_(values: Tensor, shard: VocabShard | None) -> Tensor:
    """`values`, summed over the shards in place if there are any."""
    return values if shard is None else shard.sum_(values)


class Softmax(NamedTuple):
    """Probabilities of logits over the whole vocabulary, of which V may be a slice, and
    log(sum(exp)) and maximum.
    """

    probability_BV: Tensor
    logits_BV: Tensor
    lse_B1: Tensor
    top_B1: Tensor


def softmax(logits_BV: Tensor, shard: VocabShard | None) -> Softmax:
    """Return the softmax, in new memory. log(sum(exp)) is read off the largest probability, without
    another exp().
    """
    probability_BV, top_B1 = torch.softmax(logits_BV, dim=-1), logits_BV.amax(-1, keepdim=True)
    lse_B1 = top_B1 - probability_BV.amax(-1, keepdim=True).log_()
    if shard is not None:
        slice_lse_B1, lse_B1 = lse_B1, shard.logsumexp(lse_B1)
        probability_BV *= (slice_lse_B1 - lse_B1).exp_()
        top_B1 = shard.max_(top_B1)
    return Softmax(probability_BV, logits_BV, lse_B1, top_B1)


def gather_labels(values_CV: Tensor, labels_C: Tensor, shard: VocabShard | None) -> Tensor:
    """Return each row's value at its label, (C, 1), from whichever shard holds it."""
    if shard is None:
        return values_CV.gather(1, labels_C[:, None])
    local_C, is_mine_C = shard.local_labels(labels_C)
    return shard.sum_(values_CV.gather(1, local_C[:, None]).where(is_mine_C[:, None], 0.0))
