"""Inputs: what every implementation of the loss takes, checked: which rows, which tokens, and what
of each.

Shapes: ... any leading shape, N supervised rows, H hidden size, V rows of a head or the shared
    vocabulary.
"""

import sys
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from kd.losses.checks import (
    check_group,
    check_labels,
    check_logits_dtype,
    check_projection,
    check_rows,
    check_size,
)
from kd.losses.heads import Projection
from kd.losses.objective import Objective
from kd.losses.sharding import VocabShard


@dataclass(frozen=True)
class Inputs:
    """Rows to sum over, and what to compute of each.

    row_index_N: the supervised rows of the projections' hidden states, to which labels_N and
        weights_N belong.
    weights_N multiply the rows and carry the division of a mean; sums run in their dtype, float32
    or float64. teacher is None where kd_weight is 0: its product is skipped, and kd is 0.
    vocab_size: the first so many rows of both heads take part; with a shard, they are its slice of
        the vocabulary.
    """

    student: Projection
    teacher: Projection | None
    row_index_N: Tensor
    labels_N: Tensor
    weights_N: Tensor
    objective: Objective
    vocab_size: int
    logits_dtype: torch.dtype
    shard: VocabShard | None = None

    @property
    def plan_vocab_size(self) -> int:
        """Tokens of the largest slice: all ranks of a group must take the same chunks."""
        return self.shard.largest_size if self.shard else self.vocab_size


def supervised_inputs(
    student: Projection,
    teacher: Projection | None,
    labels: Tensor,
    objective: Objective,
    *,
    token_weights: Tensor | None,
    row_index: Tensor | None,
    ignore_index: int,
    reduction: str,
    vocab_size: int | None,
    logits_dtype: torch.dtype | None,
    group: dist.ProcessGroup | None = None,
) -> Inputs:
    """Check the arguments of `distillation_loss`, which explains them."""
    models = {"student": student} if teacher is None else {"student": student, "teacher": teacher}
    check_rows(labels, token_weights, row_index)
    for side, model in models.items():
        check_projection(side, model, labels)
    check_size("vocab_size", vocab_size)
    check_logits_dtype(logits_dtype)

    if logits_dtype is None:
        is_double = any(model.hidden_MH.dtype == torch.float64 for model in models.values())
        logits_dtype = torch.float64 if is_double else torch.float32
    num_head_rows = {side: model.weight_VH.shape[0] for side, model in models.items()}
    if group is None:
        shard, num_tokens = None, min(*num_head_rows.values(), vocab_size or sys.maxsize)
        num_labels = num_tokens
    else:
        shard, num_labels = check_group(group, vocab_size, num_head_rows)
        num_tokens = shard.size
    if row_index is None:
        row_index = (labels.flatten() != ignore_index).nonzero().squeeze(1)
    labels_N = labels.flatten().index_select(0, row_index)
    check_labels(labels_N, num_labels)
    return Inputs(
        student=student.flatten(),
        teacher=teacher.flatten() if teacher and objective.kd_weight else None,
        row_index_N=row_index,
        labels_N=labels_N,
        weights_N=_row_weights(
            token_weights, row_index, reduction, torch.promote_types(logits_dtype, torch.float32)
        ),
        objective=objective,
        vocab_size=num_tokens,
        logits_dtype=logits_dtype,
        shard=shard,
    )


def _row_weights(
    token_weights: Tensor | None,
    row_index_N: Tensor,
    reduction: str,
    dtype: torch.dtype,
) -> Tensor:
    """Return the weights of the supervised rows; for a mean they sum to 1, or are 0 if all of them
    are.
    """
    if token_weights is None:
        weights_N = torch.ones(row_index_N.shape, dtype=dtype, device=row_index_N.device)
    else:
        weights_N = token_weights.detach().flatten().index_select(0, row_index_N).to(dtype)
    if reduction == "mean":
        weights_N = weights_N / weights_N.sum().clamp_min(torch.finfo(dtype).tiny)
    return weights_N
