"""Inputs: what every implementation of the loss takes, checked: which rows, which tokens, and what
of each; and DistillationLoss, what it returns.

Shapes: ... any leading shape, M rows of hidden states, N of them supervised, H hidden size, V rows
of a head or the shared vocabulary, K tokens of the teacher, O = K + 1 outcomes.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kd.losses.checks import (
    check_integer,
    check_labels,
    check_logits_dtype,
    check_model,
    check_row_index,
    check_rows,
    check_size,
    check_weights,
)
from kd.losses.divergences import Objective
from kd.losses.targets import Head


@dataclass(frozen=True)
class Inputs:
    """Rows to sum over, and what to compute of each.

    teacher_hidden_MH, teacher_head: both None where kd_weight is 0; the teacher's product is
        skipped, and kd is 0.
    row_index_N: the supervised rows of the hidden states, to which labels_N and weights_N belong.
    weights_N: multiply the rows and carry the division of a mean; sums run in their dtype, float32
        or float64.
    vocab_size: the first so many rows of both heads take part.
    top_NK, log_p_NO: in the place of a teacher, its K tokens, and normalised log-probabilities of
        them and of all others together (`kd.losses.sparse`).
    """

    student_hidden_MH: Tensor
    student_head: Head
    teacher_hidden_MH: Tensor | None
    teacher_head: Head | None
    row_index_N: Tensor
    labels_N: Tensor
    weights_N: Tensor
    objective: Objective
    vocab_size: int
    logits_dtype: torch.dtype
    top_NK: Tensor | None = None
    log_p_NO: Tensor | None = None


def supervised_inputs(
    student_hidden: Tensor,
    student_head: Head,
    teacher_hidden: Tensor | None,
    teacher_head: Head | None,
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
    """Return the arguments of `distillation_loss`, which explains them and what is raised,
    checked and flattened.
    """
    check_rows(labels, token_weights, row_index)
    check_model("student", student_hidden, student_head, labels)
    num_shared, dtypes = student_head.weight_VH.shape[0], [student_hidden.dtype]
    if teacher_hidden is not None and teacher_head is not None:
        check_model("teacher", teacher_hidden, teacher_head, labels)
        num_shared = min(num_shared, teacher_head.weight_VH.shape[0])
        dtypes.append(teacher_hidden.dtype)
    check_size("vocab_size", vocab_size)
    check_integer("ignore_index", ignore_index)
    check_logits_dtype(logits_dtype)

    num_shared = min(num_shared, vocab_size or num_shared)
    logits_dtype = logits_dtype or (torch.float64 if torch.float64 in dtypes else torch.float32)
    if row_index is None:
        row_index = (labels.flatten() != ignore_index).nonzero().squeeze(1)
    else:
        check_row_index(row_index, labels.numel())
    labels_N = labels.flatten().index_select(0, row_index)
    check_labels(labels_N, num_shared)
    sums_dtype = torch.promote_types(logits_dtype, torch.float32)
    if not objective.kd_weight:
        teacher_hidden, teacher_head = None, None
    return Inputs(
        student_hidden_MH=student_hidden.reshape(-1, student_hidden.shape[-1]),
        student_head=student_head,
        teacher_hidden_MH=teacher_hidden
        if teacher_hidden is None
        else teacher_hidden.reshape(-1, teacher_hidden.shape[-1]),
        teacher_head=teacher_head,
        row_index_N=row_index,
        labels_N=labels_N,
        weights_N=_row_weights(token_weights, row_index, reduction, sums_dtype),
        objective=objective,
        vocab_size=num_shared,
        logits_dtype=logits_dtype,
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
        check_weights(weights_N)
    if reduction == "mean":
        weights_N = weights_N / weights_N.sum().clamp_min(torch.finfo(dtype).tiny)
    return weights_N


class DistillationLoss(NamedTuple):
    """loss = kd_weight * kd + ce_weight * ce. Scalars on the device; only `loss` carries a
    gradient.

    kd: T^2 * divergence; ce: cross-entropy. Sums or means over supervised rows, in nats.
    num_tokens: int64, the number of supervised rows.
    """

    loss: Tensor
    kd: Tensor
    ce: Tensor
    num_tokens: Tensor


class RowDiagnostics(NamedTuple):
    """How far student and teacher are apart on each supervised row, in the order of row_index; no
    gradients.

    All (N,), at the objective's temperature, in nats, neither weighted nor multiplied by T^2.
    top1_agreement: 1.0 where one token is the most likely of both models, else 0.0.
    """

    forward_kl: Tensor
    reverse_kl: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    top1_agreement: Tensor


def sum_rows(inputs: Inputs, kd_N: Tensor, ce_N: Tensor) -> DistillationLoss:
    """Return the weighted sums of T^2 * divergence and cross-entropy of each row."""
    kd, ce = (kd_N * inputs.weights_N).sum(), (ce_N * inputs.weights_N).sum()
    loss = inputs.objective.kd_weight * kd + inputs.objective.ce_weight * ce
    num_tokens = torch.full((), inputs.labels_N.shape[0], device=inputs.labels_N.device)
    return DistillationLoss(loss, kd.detach(), ce.detach(), num_tokens)
