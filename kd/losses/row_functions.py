"""Row functions: from one chunk's logits to each row's values, and the gradient of the logits in
their place.

This is the seam between the chunk loop and a kernel: `RowFunction` is the contract, `torch_rows`
the plain implementation of it, `kd.losses.triton_rows` the kernel, and `kd.losses.sparse` has one
for a teacher of K tokens.

Shapes: C rows of a chunk, B rows of a block of it, V shared vocabulary, K tokens of the teacher, O
= K + 1 outcomes.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kd.losses.divergences import Objective
from kd.losses.heads import finish_logits, logits_backward_
from kd.losses.targets import Head

# Logits worked on at a time, for each of which up to ten intermediates exist. On a CPU few, to stay
# in its cache and in memory that malloc keeps: with twice as many it returns them to the system,
# and each block pays for new pages.
CPU_BLOCK_ELEMENTS = 2**17
BLOCK_ELEMENTS = 2**23


class RowChunk(NamedTuple):
    """What a row function reads of C rows, and where it writes."""

    student_CV: Tensor  # hidden W^T, before bias, scale and softcap; may be overwritten
    teacher_CV: Tensor | None  # likewise
    labels_C: Tensor
    weights_C: Tensor  # their dtype is that of all sums
    kd_C: Tensor  # out: T^2 * divergence, unweighted; zero without a teacher
    ce_C: Tensor  # out: cross-entropy, unweighted
    # out: gradient in student_CV, whose storage it may share as gradient_view does
    dlogits_CV: Tensor | None
    # out: the fields of RowDiagnostics; None without a teacher or where nobody asks
    diagnostics_C5: Tensor | None
    # Of a teacher of K tokens: which they are, and log-probabilities of them and of all others.
    top_CK: Tensor | None = None
    log_p_CO: Tensor | None = None

    def part(self, rows: slice, teacher_CV: Tensor | None = None) -> "RowChunk":
        """Some rows alone, with the teacher's logits of them if those are given; what is written to
        a part is written to the whole.
        """
        if teacher_CV is None and self.teacher_CV is not None:
            teacher_CV = self.teacher_CV[rows]
        return RowChunk(
            self.student_CV[rows],
            teacher_CV,
            self.labels_C[rows],
            self.weights_C[rows],
            self.kd_C[rows],
            self.ce_C[rows],
            None if self.dlogits_CV is None else self.dlogits_CV[rows],
            None if self.diagnostics_C5 is None else self.diagnostics_C5[rows],
            None if self.top_CK is None else self.top_CK[rows],
            None if self.log_p_CO is None else self.log_p_CO[rows],
        )

    def blocks(self) -> Iterator["RowChunk"]:
        """Yield parts of as many rows as to work on at a time: on a CPU at least one for each
        thread.
        """
        num_rows, vocab_size = self.student_CV.shape
        if self.student_CV.is_cpu:
            step = max(torch.get_num_threads(), CPU_BLOCK_ELEMENTS // vocab_size)
        else:
            step = max(1, BLOCK_ELEMENTS // vocab_size)
        for start in range(0, num_rows, step):
            yield self.part(slice(start, start + step))


# What a backend implements, called as row_function(rows, objective, student, teacher): fill `kd_C`,
# `ce_C` and, where they are given, `dlogits_CV` and `diagnostics_C5`. dlogits_CV is the gradient of
# sum(weights * (kd_weight * kd + ce_weight * ce)). Of the heads, already sliced to V, a row
# function reads bias, scale and softcap only; the teacher's is None without one.
RowFunction = Callable[[RowChunk, Objective, Head, Head | None], None]


def torch_rows(rows: RowChunk, objective: Objective, student: Head, teacher: Head | None) -> None:
    """The `RowFunction` in plain PyTorch."""
    for block in rows.blocks():
        _torch_block(block, objective, student, teacher)


def _torch_block(rows: RowChunk, objective: Objective, student: Head, teacher: Head | None) -> None:
    # A function of its own, so that the intermediates of one block are gone before the next.
    temperature, dtype = objective.temperature, rows.weights_C.dtype
    weights_B1, dlogits_BV = rows.weights_C[:, None], None
    logits_BV = finish_logits(rows.student_CV, student, dtype)
    q1_BV, lse_q1_B1, top_q_B1 = softmax(logits_BV)  # at T = 1, for cross-entropy
    log_q1_label_B1 = logits_BV.gather(1, rows.labels_C[:, None]) - lse_q1_B1
    torch.neg(log_q1_label_B1.squeeze(1), out=rows.ce_C)
    rows.kd_C.zero_()
    if rows.teacher_CV is not None and teacher is not None:
        x_BV, q_BV, lse_q_B1 = logits_BV, q1_BV, lse_q1_B1
        y_BV = finish_logits(rows.teacher_CV, teacher, dtype)
        if temperature != 1.0:
            x_BV, y_BV = logits_BV / temperature, y_BV / temperature
            q_BV, lse_q_B1, top_q_B1 = softmax(x_BV)
        p_BV, lse_p_B1, top_p_B1 = softmax(y_BV)
        log_ratio_BV = torch.sub(y_BV, x_BV).add_(lse_q_B1 - lse_p_B1)
        if rows.diagnostics_C5 is not None:
            agrees_B = (y_BV == top_p_B1).logical_and_(x_BV == top_q_B1).any(-1)
            torch.stack(
                (
                    torch.linalg.vecdot(p_BV, log_ratio_BV),
                    -torch.linalg.vecdot(q_BV, log_ratio_BV),
                    lse_q_B1.squeeze(1) - torch.linalg.vecdot(q_BV, x_BV),
                    lse_p_B1.squeeze(1) - torch.linalg.vecdot(p_BV, y_BV),
                    agrees_B.to(dtype),
                ),
                dim=1,
                out=rows.diagnostics_C5,
            )
        divergence_B, w_BV = objective.spec.of_rows(p_BV, q_BV, log_ratio_BV, objective.parameter)
        rows.kd_C.add_(divergence_B, alpha=temperature**2)
        if rows.dlogits_CV is not None:
            w_sum_B1 = w_BV.sum(-1, keepdim=True)
            scale_B1 = objective.kd_weight * temperature * weights_B1
            dlogits_BV = w_BV.mul_(scale_B1).addcmul_(q_BV, scale_B1 * w_sum_B1, value=-1)
    if rows.dlogits_CV is None:
        return
    if dlogits_BV is None or objective.ce_weight:
        dlogits_BV = torch.zeros_like(logits_BV) if dlogits_BV is None else dlogits_BV
        scale_B1 = objective.ce_weight * weights_B1
        add_ce_gradient_(dlogits_BV, q1_BV, log_q1_label_B1, rows.labels_C, scale_B1)
    rows.dlogits_CV.copy_(logits_backward_(dlogits_BV, logits_BV, student))


def softmax(logits_BV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (probabilities, log(sum(exp)), maximum) in new memory, the last two (B, 1).

    log(sum(exp)) is read off the largest probability, without another exp().
    """
    probability_BV, top_B1 = torch.softmax(logits_BV, dim=-1), logits_BV.amax(-1, keepdim=True)
    return probability_BV, top_B1 - probability_BV.amax(-1, keepdim=True).log_(), top_B1


def add_ce_gradient_(
    dlogits_BV: Tensor, q_BV: Tensor, log_q_label_B1: Tensor, labels_B: Tensor, scale_B1: Tensor
) -> None:
    """Add scale * (q - onehot), where q - 1 = expm1(log q) at the label."""
    labels_B1 = labels_B[:, None]
    at_label_B1 = dlogits_BV.gather(1, labels_B1) + scale_B1 * log_q_label_B1.expm1()
    dlogits_BV.addcmul_(q_BV, scale_B1)
    dlogits_BV.scatter_(1, labels_B1, at_label_B1)
