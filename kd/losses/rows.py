"""Row functions: from one chunk's logits to each row's kd and ce, and the gradient of the logits.

This is the seam between the chunk loop and a kernel: `RowFunction` is the contract, `torch_rows` the plain
implementation of it.

Shapes: C rows of a chunk, B rows of a block of it, V shared vocabulary.

Gradient. Let q = softmax(s / T), D the divergence, f = dD/dq and w = q * f. Then
T^2 * dD/ds = T * (w - q * sum(w)), and adding a multiple of q to w changes nothing. Each w below is written
without a division by a probability, so that it stays finite where q underflows: forward_kl has f = -p / q,
but w = -p.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from kd.losses.objective import Objective
from kd.losses.reference import log_mixture

BLOCK_ELEMENTS = 2**23  # 32 MiB in float32


class RowFunction(Protocol):
    """What a backend implements; see `__call__`."""

    def __call__(
        self,
        student_logits_CV: Tensor,
        teacher_logits_CV: Tensor | None,
        labels_C: Tensor,
        weights_C: Tensor,
        objective: Objective,
        needs_grad: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return (kd_C, ce_C, dlogits_CV).

        kd_C, ce_C: T^2 * divergence and cross-entropy of each row, unweighted, in the dtype of `weights_C`.
        dlogits_CV: gradient of sum(weights * (kd_weight * kd + ce_weight * ce)) in the student's logits, None
            unless `needs_grad`.
        Without teacher logits kd_C is zero. Sums run in the dtype of `weights_C`, whatever the logits' is.
        Both logits are the row function's own: it may overwrite them and return the gradient in their place.
        """
        ...


def torch_rows(
    student_logits_CV: Tensor,
    teacher_logits_CV: Tensor | None,
    labels_C: Tensor,
    weights_C: Tensor,
    objective: Objective,
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The `RowFunction` in plain PyTorch; the gradient replaces the student's logits.

    It takes up to ten intermediates of the shape of its logits, and so works on `BLOCK_ELEMENTS` at a time.
    """
    num_rows, vocab_size = student_logits_CV.shape
    kd_C, ce_C = torch.empty_like(weights_C), torch.empty_like(weights_C)
    block_rows = max(1, BLOCK_ELEMENTS // vocab_size)
    for start in range(0, num_rows, block_rows):
        block = slice(start, start + block_rows)
        kd_C[block], ce_C[block], dlogits_BV = _block_rows(
            student_logits_CV[block],
            None if teacher_logits_CV is None else teacher_logits_CV[block],
            labels_C[block],
            weights_C[block],
            objective,
            needs_grad,
        )
        if dlogits_BV is not None:
            student_logits_CV[block] = dlogits_BV
    return kd_C, ce_C, student_logits_CV if needs_grad else None


def _block_rows(
    student_logits_BV: Tensor,
    teacher_logits_BV: Tensor | None,
    labels_B: Tensor,
    weights_B: Tensor,
    objective: Objective,
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    dtype, temperature = weights_B.dtype, objective.temperature
    labels_B1, weights_B1 = labels_B[:, None], weights_B[:, None]
    dlogits_BV = None

    log_q_BV = torch.log_softmax(student_logits_BV, dim=-1, dtype=dtype)
    log_q_label_B1 = log_q_BV.gather(1, labels_B1)
    ce_B = -log_q_label_B1.squeeze(1)
    if needs_grad:
        # d ce / ds = q - onehot, and q - 1 = expm1(log q) at the label
        dlogits_BV = log_q_BV.exp().scatter_(1, labels_B1, log_q_label_B1.expm1())
        dlogits_BV *= objective.ce_weight * weights_B1
    if teacher_logits_BV is None:
        return torch.zeros_like(ce_B), ce_B, dlogits_BV

    if temperature != 1.0:
        log_q_BV = torch.log_softmax(student_logits_BV.to(dtype) / temperature, dim=-1)
    log_p_BV = torch.log_softmax(teacher_logits_BV.to(dtype) / temperature, dim=-1)
    divergence_B, w_BV = _DIVERGENCE[objective.divergence](log_p_BV, log_q_BV, objective.parameter)
    if dlogits_BV is not None:
        w_BV.addcmul_(log_q_BV.exp_(), w_BV.sum(-1, keepdim=True), value=-1)
        dlogits_BV.addcmul_(w_BV, objective.kd_weight * temperature * weights_B1)
    return temperature**2 * divergence_B, ce_B, dlogits_BV


def _forward_kl(log_p_BV: Tensor, log_q_BV: Tensor, _: float) -> tuple[Tensor, Tensor]:
    p_BV = log_p_BV.exp()
    return (p_BV * (log_p_BV - log_q_BV)).sum(-1), p_BV.neg_()  # f = -p / q


def _reverse_kl(log_p_BV: Tensor, log_q_BV: Tensor, _: float) -> tuple[Tensor, Tensor]:
    w_BV = log_q_BV.exp() * (log_q_BV - log_p_BV)  # f = log q - log p + 1
    return w_BV.sum(-1), w_BV


def _mixed_kl(log_p_BV: Tensor, log_q_BV: Tensor, mix_weight: float) -> tuple[Tensor, Tensor]:
    forward_B, forward_w_BV = _forward_kl(log_p_BV, log_q_BV, 0.0)
    reverse_B, reverse_w_BV = _reverse_kl(log_p_BV, log_q_BV, 0.0)
    return torch.lerp(reverse_B, forward_B, mix_weight), reverse_w_BV.lerp_(forward_w_BV, mix_weight)


def _jsd(log_p_BV: Tensor, log_q_BV: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    log_m_BV = log_mixture(log_p_BV, log_q_BV, beta)
    # the terms of m's own derivative add up to the constant 1, so f = (1 - beta) * (log q - log m)
    w_BV = (1 - beta) * log_q_BV.exp() * (log_q_BV - log_m_BV)
    return beta * (log_p_BV.exp() * (log_p_BV - log_m_BV)).sum(-1) + w_BV.sum(-1), w_BV


def _skew_kl(log_p_BV: Tensor, log_q_BV: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    log_m_BV = log_mixture(log_p_BV, log_q_BV, alpha)
    p_BV = log_p_BV.exp()
    # f = -(1 - alpha) * p / m, and q / m <= 1 / (1 - alpha)
    w_BV = -(1 - alpha) * p_BV * (log_q_BV - log_m_BV).exp()
    return (p_BV * (log_p_BV - log_m_BV)).sum(-1), w_BV


def _skew_reverse_kl(log_p_BV: Tensor, log_q_BV: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    log_ratio_BV = log_q_BV - log_mixture(log_q_BV, log_p_BV, alpha)
    q_BV = log_q_BV.exp()
    # f = log(q / m) + 1 - alpha * q / m, and q / m <= 1 / alpha
    w_BV = q_BV * (log_ratio_BV - alpha * log_ratio_BV.exp())
    return (q_BV * log_ratio_BV).sum(-1), w_BV


def _tvd(log_p_BV: Tensor, log_q_BV: Tensor, _: float) -> tuple[Tensor, Tensor]:
    q_BV = log_q_BV.exp()
    difference_BV = q_BV - log_p_BV.exp()
    tvd_B = 0.5 * difference_BV.abs().sum(-1)
    return tvd_B, q_BV.mul_(difference_BV.sign_()).mul_(0.5)  # f = sign(q - p) / 2


# (log p, log q, parameter) -> (divergence of each row, w)
_DIVERGENCE: dict[str, Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]] = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "mixed_kl": _mixed_kl,
    "jsd": _jsd,
    "skew_kl": _skew_kl,
    "skew_reverse_kl": _skew_reverse_kl,
    "tvd": _tvd,
}
