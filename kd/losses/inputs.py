"""Inputs: what every implementation of the loss takes; supervised rows and shared vocabulary only.

Shapes: ... any leading shape, N supervised rows, H hidden size, V rows of a head or the shared vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kd.losses.checks import check_labels, check_logits_dtype, check_projection, check_rows, check_size
from kd.losses.heads import Projection
from kd.losses.objective import Objective


@dataclass(frozen=True)
class Inputs:
    """Rows to sum over, and what to compute of each.

    weights_N multiply the rows and carry the division of a mean; sums run in their dtype, float32 or float64.
    teacher is None where kd_weight is 0: its product is skipped, and kd is 0.
    """

    student: Projection
    teacher: Projection | None
    labels_N: Tensor
    weights_N: Tensor
    objective: Objective
    logits_dtype: torch.dtype


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
) -> Inputs:
    """Check the arguments of `distillation_loss`, which explains them, and drop what takes no part."""
    models = {"student": student} if teacher is None else {"student": student, "teacher": teacher}
    check_rows(labels, token_weights, row_index)
    for side, model in models.items():
        check_projection(side, model, labels)
    check_size("vocab_size", vocab_size)
    check_logits_dtype(logits_dtype)

    sizes = [model.weight_VH.shape[0] for model in models.values()]
    shared_size = min(sizes if vocab_size is None else [*sizes, vocab_size])
    if logits_dtype is None:
        is_double = any(model.hidden_NH.dtype == torch.float64 for model in models.values())
        logits_dtype = torch.float64 if is_double else torch.float32
    if row_index is None:
        row_index = (labels.flatten() != ignore_index).nonzero().squeeze(1)
    labels_N = labels.flatten().index_select(0, row_index)
    check_labels(labels_N, shared_size)
    sum_dtype = torch.promote_types(logits_dtype, torch.float32)
    return Inputs(
        student=student.select(row_index, shared_size),
        teacher=teacher.select(row_index, shared_size) if teacher and objective.kd_weight else None,
        labels_N=labels_N,
        weights_N=_row_weights(token_weights, row_index, reduction, sum_dtype),
        objective=objective,
        logits_dtype=logits_dtype,
    )


def _row_weights(
    token_weights: Tensor | None,
    row_index_N: Tensor,
    reduction: str,
    dtype: torch.dtype,
) -> Tensor:
    """Return the weights of the supervised rows; for a mean they sum to 1, or are 0 if all of them are."""
    if token_weights is None:
        weights_N = torch.ones(row_index_N.shape, dtype=dtype, device=row_index_N.device)
    else:
        weights_N = token_weights.detach().flatten().index_select(0, row_index_N).to(dtype)
    if reduction == "mean":
        weights_N = weights_N / weights_N.sum().clamp_min(torch.finfo(dtype).tiny)
    return weights_N
