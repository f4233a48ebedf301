"""What the loss returns: sums over rows, and what each row tells.

Shapes: N supervised rows.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kd.losses.inputs import Inputs


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
