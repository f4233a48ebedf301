"""sparse_distillation_loss: the loss from a teacher of which only the K most likely tokens of each
row are known.

Student and teacher are compared over K + 1 outcomes: the teacher's K tokens, and all others as one.
Every divergence of these is at most that of the full distributions (data-processing inequality),
and never negative.

Shapes: ... any leading shape, N supervised rows, C rows of a chunk, B rows of a block of it, K
tokens of the teacher, O = K + 1 outcomes, V vocabulary, H hidden size.

Gradient. With w and q over outcomes as in `kd.losses.divergences`, g = w - q * sum(w) is the
gradient in the logit of an outcome; a token of the tail has the share softmax(s / T) within the
tail of the last outcome's.
"""

import math
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from kd.constants import IGNORE_INDEX, LOGITS_GIB
from kd.losses.checks import check_choice, check_positive, check_size, check_tensors, check_top_k
from kd.losses.chunk_plan import plan_chunks
from kd.losses.chunked import chunked_loss
from kd.losses.divergences import Divergence, Objective
from kd.losses.heads import finish_logits, logits_backward_
from kd.losses.inputs import DistillationLoss, sum_rows, supervised_inputs
from kd.losses.reference import reference_logits, top_k_kd_rows
from kd.losses.row_functions import RowChunk, add_ce_gradient_, softmax
from kd.losses.targets import Head

TAILS = ("bucket", "ignore")


def sparse_distillation_loss(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_ids: Tensor,
    teacher_logprobs: Tensor,
    labels: Tensor,
    *,
    tail: Literal["bucket", "ignore"] = "bucket",
    divergence: Divergence = "forward_kl",
    beta: float = 0.5,
    alpha: float = 0.1,
    mix_weight: float = 0.5,
    temperature: float = 1.0,
    kd_weight: float = 0.5,
    ce_weight: float = 0.5,
    token_weights: Tensor | None = None,
    student_bias: Tensor | None = None,
    student_softcap: float | None = None,
    student_scale: float = 1.0,
    vocab_size: int | None = None,
    chunk_size: int | None = None,
    logits_gib: float = LOGITS_GIB,
    logits_dtype: torch.dtype | None = None,
    reduction: Literal["sum", "mean"] = "sum",
    ignore_index: int = IGNORE_INDEX,
    row_index: Tensor | None = None,
    backend: Literal["auto", "reference", "torch"] = "auto",
) -> DistillationLoss:
    """Return what `distillation_loss` does, from the teacher's K most likely tokens: with K = V the
    two agree.

    Arguments that are not named here are those of `distillation_loss`, but that kd is reported at
    kd_weight=0 too. Memory and products are only those of the student, 2 * N * V * 3 * H FLOP.

    Args:
        teacher_ids: (..., K), int64, distinct tokens below the vocabulary in each supervised row.
        teacher_logprobs: (..., K), their log-probabilities at `temperature`, of the teacher's whole
            vocabulary; -inf for a token that is there to fill K.
        tail: "bucket": the mass that the K tokens leave is the teacher's probability of all other
            tokens together. "ignore": it is dropped, and the teacher's K probabilities are scaled
            to sum to 1; the student's probability of other tokens remains, and is pushed towards 0.
            reverse_kl and mixed_kl are then infinite, and refused.
        backend: "torch", "reference" (full logits, plain autograd), or "auto", which is "torch".

    Raises:
        ValueError: as `distillation_loss`; log-probabilities that are positive or NaN, sum to more
            than 1 or, with tail "ignore", are all -inf; ids that repeat or leave the vocabulary (on
            the CPU; elsewhere an asynchronous assertion).
        TypeError: as `distillation_loss`.
    """
    check_tensors(
        student_hidden=student_hidden,
        student_head=student_head,
        teacher_ids=teacher_ids,
        teacher_logprobs=teacher_logprobs,
        labels=labels,
        token_weights=token_weights,
        student_bias=student_bias,
        row_index=row_index,
    )
    check_choice("backend", backend, ("auto", "reference", "torch"))
    check_choice("reduction", reduction, ("sum", "mean"))
    check_choice("tail", tail, TAILS)
    check_size("chunk_size", chunk_size)
    check_positive("logits_gib", logits_gib, f"the default is {LOGITS_GIB}")
    objective = Objective(divergence, beta, alpha, mix_weight, temperature, kd_weight, ce_weight)
    if tail == "ignore" and objective.spec.infinite_without_tail:
        raise ValueError(
            f"tail='ignore', divergence={divergence!r}: infinite wherever p is 0; choose "
            "tail='bucket'"
        )
    student = Head(student_head, student_bias, student_softcap, student_scale)
    with torch.autocast(labels.device.type, enabled=False):
        inputs = supervised_inputs(
            student_hidden,
            student,
            None,
            None,
            labels,
            objective,
            token_weights=token_weights,
            row_index=row_index,
            ignore_index=ignore_index,
            reduction=reduction,
            vocab_size=vocab_size,
            logits_dtype=logits_dtype,
        )
        check_top_k(
            teacher_ids, teacher_logprobs, labels, inputs.row_index_N, inputs.vocab_size, tail
        )
        top_NK, logprobs_NK = (
            tensor.detach().reshape(-1, tensor.shape[-1]).index_select(0, inputs.row_index_N)
            for tensor in (teacher_ids, teacher_logprobs)
        )
        logprobs_NK = logprobs_NK.to(inputs.weights_N.dtype)
        if backend == "reference":
            logits_NV, _ = reference_logits(inputs)
            ce_N = torch.nn.functional.cross_entropy(logits_NV, inputs.labels_N, reduction="none")
            kd_N = top_k_kd_rows(logits_NV, top_NK, logprobs_NK, tail, objective)
            return sum_rows(inputs, kd_N, ce_N)
        inputs = replace(inputs, top_NK=top_NK, log_p_NO=_with_tail(logprobs_NK, tail))
        plan = plan_chunks(
            inputs.vocab_size,
            inputs.logits_dtype,
            has_teacher=False,
            chunk_size=chunk_size,
            logits_gib=logits_gib,
        )
        result, _ = chunked_loss(inputs, plan, top_k_rows)
        return result


def _with_tail(logprobs_NK: Tensor, tail: str) -> Tensor:
    """Return normalised log-probabilities of the outcomes, (N, O), all finite."""
    least = torch.finfo(logprobs_NK.dtype).tiny
    p_tail_N1 = torch.zeros_like(logprobs_NK[:, :1])
    if tail == "bucket":
        p_tail_N1 = 1 - logprobs_NK.exp().sum(-1, keepdim=True)
    log_p_NO = torch.cat([logprobs_NK, p_tail_N1.clamp_min(least).log()], dim=1)
    return torch.log_softmax(log_p_NO.clamp_min(math.log(least)), dim=1)


def top_k_rows(rows: RowChunk, objective: Objective, student: Head, _: Head | None = None) -> None:
    """The `RowFunction` of a teacher of which `rows` hold the K tokens."""
    for block in rows.blocks():
        _top_k_block(block, objective, student)


def _top_k_block(rows: RowChunk, objective: Objective, student: Head) -> None:
    temperature, dtype = objective.temperature, rows.weights_C.dtype
    assert rows.top_CK is not None
    assert rows.log_p_CO is not None
    top_BK, log_p_BO = rows.top_CK, rows.log_p_CO
    logits_BV = finish_logits(rows.student_CV, student, dtype)
    q1_BV, lse_q1_B1, _ = softmax(logits_BV)  # at T = 1, for cross-entropy
    log_q1_label_B1 = logits_BV.gather(1, rows.labels_C[:, None]) - lse_q1_B1
    torch.neg(log_q1_label_B1.squeeze(1), out=rows.ce_C)

    tail_BV = logits_BV / temperature
    x_top_BK = tail_BV.gather(1, top_BK)
    tail_BV.scatter_(1, top_BK, -torch.inf)
    # clamped, since all V tokens may be the teacher's: then the tail is empty
    lse_tail_B1 = torch.logsumexp(tail_BV, dim=-1, keepdim=True).clamp_min(torch.finfo(dtype).min)
    log_q_BO = torch.log_softmax(torch.cat([x_top_BK, lse_tail_B1], dim=1), dim=1)
    log_q_BO.clamp_min_(math.log(torch.finfo(dtype).tiny))
    q_BO = log_q_BO.exp()
    divergence_B, w_BO = objective.spec.of_rows(
        log_p_BO.exp(), q_BO, log_p_BO - log_q_BO, objective.parameter
    )
    # below 0 only by rounding
    torch.mul(divergence_B.clamp_min(0), temperature**2, out=rows.kd_C)
    if rows.dlogits_CV is None:
        return

    scale_B1 = objective.kd_weight * temperature * rows.weights_C[:, None]
    g_BO = scale_B1 * (w_BO - q_BO * w_BO.sum(-1, keepdim=True))
    dlogits_BV = tail_BV.sub_(lse_tail_B1).exp_().mul_(g_BO[:, -1:])
    dlogits_BV.scatter_(1, top_BK, g_BO[:, :-1])
    if objective.ce_weight:
        scale_B1 = objective.ce_weight * rows.weights_C[:, None]
        add_ce_gradient_(dlogits_BV, q1_BV, log_q1_label_B1, rows.labels_C, scale_B1)
    rows.dlogits_CV.copy_(logits_backward_(dlogits_BV, logits_BV, student))
