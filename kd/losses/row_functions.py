"""Row functions: from one chunk's logits to each row's values, and the gradient of the logits in
their place.

This is the seam between the chunk loop and a kernel: `RowFunction` is the contract, `torch_rows`
the plain implementation of it, `kd.losses.triton_rows` the kernel.

Shapes: C rows of a chunk, B rows of a block of it, V shared vocabulary or this rank's slice of it.

Gradient. Let q = softmax(s / T), D the divergence, f = dD/dq and w = q * f. Then T^2 * dD/ds = T *
(w - q * sum(w)), and adding a multiple of q to w changes nothing. Each w below is written without a
division by a probability, so that it stays finite where q underflows: forward_kl has f = -p / q,
but w = -p. Every divergence is a function of p, q and log(p / q).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from kd.losses.chunk_plan import TILE_ROWS
from kd.losses.heads import Projection, finish_logits, logits_backward_
from kd.losses.objective import Objective
from kd.losses.sharding import Softmax, VocabShard, all_ranks_sum_, gather_labels, softmax

# Logits worked on at a time, for each of which up to ten intermediates exist. On a CPU few, to stay
# in its cache and in memory that malloc keeps: with twice as many it returns them to the system,
# and each block pays for new pages.
CPU_BLOCK_ELEMENTS = 2**17
BLOCK_ELEMENTS = 2**23

DIAGNOSTICS = ("forward_kl", "reverse_kl", "student_entropy", "teacher_entropy", "top1_agreement")


class Rows(NamedTuple):
    """What a row function reads of C rows, and where it writes."""

    student_CV: Tensor  # hidden W^T, before bias, scale and softcap; may be overwritten
    teacher_CV: Tensor | None  # likewise
    labels_C: Tensor
    weights_C: Tensor  # their dtype is that of all sums
    kd_C: Tensor  # out: T^2 * divergence, unweighted; zero without a teacher
    ce_C: Tensor  # out: cross-entropy, unweighted
    dlogits_CV: (
        Tensor | None
    )  # out: gradient in student_CV, whose storage it may share as gradient_view does
    diagnostics_C5: Tensor | None  # out: DIAGNOSTICS; None without a teacher or where nobody asks

    def block(self, rows: slice) -> "Rows":
        """The same of some rows alone."""
        parts: dict[str, Any] = {
            name: None if tensor is None else tensor[rows]
            for name, tensor in self._asdict().items()
        }
        return Rows(**parts)


class RowSpec(NamedTuple):
    """What to compute of each row. Of the projections a row function reads bias, scale and softcap
    alone.
    """

    objective: Objective
    student: Projection
    teacher: Projection | None
    shard: VocabShard | None = None


class RowFunction(Protocol):
    """What a backend implements: fill `kd_C`, `ce_C` and, where they are given, `dlogits_CV` and
    `diagnostics_C5`.

    dlogits_CV is the gradient of sum(weights * (kd_weight * kd + ce_weight * ce)). With a shard, V
    is a slice, and all its ranks must call with the same number of rows.
    """

    def __call__(self, rows: Rows, spec: RowSpec) -> None: ...


def torch_rows(rows: Rows, spec: RowSpec) -> None:
    """The `RowFunction` in plain PyTorch."""
    num_rows = rows.student_CV.shape[0]
    # The blocks of a shard wait for those of other ranks: on all of them as many, and few.
    step = TILE_ROWS if spec.shard else block_rows(rows.student_CV)
    for start in range(0, num_rows, step):
        _block(rows.block(slice(start, start + step)), spec)


def block_rows(logits_CV: Tensor) -> int:
    """Return how many rows of these logits to work on at a time: on a CPU, at least one for each
    thread.
    """
    if logits_CV.is_cpu:
        return max(torch.get_num_threads(), CPU_BLOCK_ELEMENTS // logits_CV.shape[1])
    return max(1, BLOCK_ELEMENTS // logits_CV.shape[1])


def _block(rows: Rows, spec: RowSpec) -> None:
    objective, shard, dtype = spec.objective, spec.shard, rows.weights_C.dtype
    weights_B1, temperature, dlogits_BV = rows.weights_C[:, None], objective.temperature, None
    logits_BV = finish_logits(rows.student_CV, spec.student, dtype)
    q1 = softmax(logits_BV, shard)  # at T = 1, for cross-entropy
    log_q1_label_B1 = gather_labels(logits_BV, rows.labels_C, shard) - q1.lse_B1
    torch.neg(log_q1_label_B1.squeeze(1), out=rows.ce_C)
    rows.kd_C.zero_()
    if rows.teacher_CV is not None and spec.teacher is not None:
        q = q1 if temperature == 1.0 else softmax(logits_BV / temperature, shard)
        teacher_BV = finish_logits(rows.teacher_CV, spec.teacher, dtype)
        p = softmax(teacher_BV if temperature == 1.0 else teacher_BV / temperature, shard)
        log_ratio_BV = torch.sub(p.logits_BV, q.logits_BV).add_(q.lse_B1 - p.lse_B1)
        if rows.diagnostics_C5 is not None:
            rows.diagnostics_C5.copy_(_diagnostics(p, q, log_ratio_BV, shard))
        kd_of = DIVERGENCE[objective.divergence]
        divergence_B, w_BV = kd_of(
            p.probability_BV, q.probability_BV, log_ratio_BV, objective.parameter
        )
        rows.kd_C.add_(all_ranks_sum_(divergence_B, shard), alpha=temperature**2)
        if rows.dlogits_CV is not None:
            w_sum_B1 = all_ranks_sum_(w_BV.sum(-1, keepdim=True), shard)
            scale_B1 = objective.kd_weight * temperature * weights_B1
            dlogits_BV = w_BV.mul_(scale_B1).addcmul_(
                q.probability_BV, scale_B1 * w_sum_B1, value=-1
            )
    if rows.dlogits_CV is None:
        return
    if dlogits_BV is None or objective.ce_weight:
        dlogits_BV = torch.zeros_like(logits_BV) if dlogits_BV is None else dlogits_BV
        scale_B1 = objective.ce_weight * weights_B1
        add_ce_gradient_(
            dlogits_BV, q1.probability_BV, log_q1_label_B1, rows.labels_C, scale_B1, shard
        )
    rows.dlogits_CV.copy_(logits_backward_(dlogits_BV, logits_BV, spec.student))


def add_ce_gradient_(
    dlogits_BV: Tensor,
    q_BV: Tensor,
    log_q_label_B1: Tensor,
    labels_B: Tensor,
    scale_B1: Tensor,
    shard: VocabShard | None = None,
) -> None:
    """Add scale * (q - onehot), where q - 1 = expm1(log q) at the label."""
    is_mine_B = None
    if shard is not None:
        labels_B, is_mine_B = shard.local_labels(labels_B)
    labels_B1 = labels_B[:, None]
    at_label_B1 = dlogits_BV.gather(1, labels_B1) + scale_B1 * log_q_label_B1.expm1()
    dlogits_BV.addcmul_(q_BV, scale_B1)
    if is_mine_B is not None:
        at_label_B1 = torch.where(is_mine_B[:, None], at_label_B1, dlogits_BV.gather(1, labels_B1))
    dlogits_BV.scatter_(1, labels_B1, at_label_B1)


def _diagnostics(p: Softmax, q: Softmax, log_ratio_BV: Tensor, shard: VocabShard | None) -> Tensor:
    """Return DIAGNOSTICS of each row, (B, 5). Models agree where one token is the most likely of
    both.
    """
    agrees_BV = (p.logits_BV == p.top_B1).logical_and_(q.logits_BV == q.top_B1)
    sums = (
        _dot(p.probability_BV, log_ratio_BV),
        -_dot(q.probability_BV, log_ratio_BV),
        -_dot(q.probability_BV, q.logits_BV),
        -_dot(p.probability_BV, p.logits_BV),
        agrees_BV.any(-1).to(log_ratio_BV.dtype),
    )
    diagnostics_B5 = all_ranks_sum_(torch.stack(sums, dim=1), shard)
    diagnostics_B5[:, 2:4] += torch.cat([q.lse_B1, p.lse_B1], dim=1)
    diagnostics_B5[:, 4].clamp_max_(1.0)  # slices may tie
    return diagnostics_B5


def _dot(a_BV: Tensor, b_BV: Tensor) -> Tensor:
    return torch.linalg.vecdot(a_BV, b_BV)


# Each takes p, q, log(p / q) and the divergence's parameter, and returns the divergence of each row
# and w. It may overwrite p and log(p / q).


def _forward_kl(
    p_BV: Tensor, q_BV: Tensor, log_ratio_BV: Tensor, _: float
) -> tuple[Tensor, Tensor]:
    return log_ratio_BV.mul_(p_BV).sum(-1), p_BV.neg_()  # f = -p / q


def _reverse_kl(
    p_BV: Tensor, q_BV: Tensor, log_ratio_BV: Tensor, _: float
) -> tuple[Tensor, Tensor]:
    w_BV = log_ratio_BV.neg_().mul_(q_BV)  # f = log q - log p + 1
    return w_BV.sum(-1), w_BV


def _mixed_kl(
    p_BV: Tensor, q_BV: Tensor, log_ratio_BV: Tensor, mix_weight: float
) -> tuple[Tensor, Tensor]:
    forward_B = _dot(p_BV, log_ratio_BV)
    reverse_B, reverse_w_BV = _reverse_kl(p_BV, q_BV, log_ratio_BV, 0.0)
    return torch.lerp(reverse_B, forward_B, mix_weight), reverse_w_BV.lerp_(p_BV.neg_(), mix_weight)


def _jsd(p_BV: Tensor, q_BV: Tensor, log_ratio_BV: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    log_p_over_m_BV = _log_over_mixture(log_ratio_BV, beta)
    # the terms of m's own derivative add up to the constant 1, so f = (1 - beta) * (log q - log m)
    w_BV = torch.sub(log_p_over_m_BV, log_ratio_BV).mul_(q_BV).mul_(1 - beta)
    return beta * _dot(p_BV, log_p_over_m_BV) + w_BV.sum(-1), w_BV


def _skew_kl(
    p_BV: Tensor, q_BV: Tensor, log_ratio_BV: Tensor, alpha: float
) -> tuple[Tensor, Tensor]:
    log_p_over_m_BV = _log_over_mixture(log_ratio_BV, alpha)
    skew_kl_B = _dot(p_BV, log_p_over_m_BV)
    # f = -(1 - alpha) * p / m, and q / m <= 1 / (1 - alpha)
    return skew_kl_B, log_p_over_m_BV.sub_(log_ratio_BV).exp_().mul_(p_BV).mul_(alpha - 1)


def _skew_reverse_kl(
    p_BV: Tensor, q_BV: Tensor, log_ratio_BV: Tensor, alpha: float
) -> tuple[Tensor, Tensor]:
    log_q_over_m_BV = _log_over_mixture(log_ratio_BV.neg_(), alpha)
    skew_reverse_kl_B = _dot(q_BV, log_q_over_m_BV)
    # f = log(q / m) + 1 - alpha * q / m, and q / m <= 1 / alpha
    return skew_reverse_kl_B, log_q_over_m_BV.sub_(log_q_over_m_BV.exp(), alpha=alpha).mul_(q_BV)


def _tvd(p_BV: Tensor, q_BV: Tensor, log_ratio_BV: Tensor, _: float) -> tuple[Tensor, Tensor]:
    difference_BV = torch.sub(q_BV, p_BV)
    tvd_B = 0.5 * difference_BV.abs().sum(-1)
    return tvd_B, difference_BV.sign_().mul_(q_BV).mul_(0.5)  # f = sign(q - p) / 2


def _log_over_mixture(log_ratio_BV: Tensor, weight: float) -> Tensor:
    """Return log(a / m), where m = weight * a + (1 - weight) * b and log_ratio = log(a / b)."""
    log_weight = torch.full(
        (), math.log(weight), dtype=log_ratio_BV.dtype, device=log_ratio_BV.device
    )
    return torch.logaddexp(math.log1p(-weight) - log_ratio_BV, log_weight).neg_()


DIVERGENCE: dict[str, Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]] = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "mixed_kl": _mixed_kl,
    "jsd": _jsd,
    "skew_kl": _skew_kl,
    "skew_reverse_kl": _skew_reverse_kl,
    "tvd": _tvd,
}
