"""forward_kl from all that it needs of the teacher: an expected logit and an entropy.

    KL(p || q) = logsumexp(s / T) - E_p[s] / T - H(p)

for the student's logits s, over the shared vocabulary. The expectation comes from tokens that were
drawn from p, where it is unbiased and so is the gradient, or, for a head that does not change, from
one vector c = sum_v p_v W_v: E_p[s] = scale * (<h, c> + <p, b>), and the KL is exact.

Shapes: ... any leading shape, N supervised rows, C rows of a chunk, K draws, V vocabulary, H the
student's hidden size.
"""

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from kd.constants import IGNORE_INDEX, LOGITS_GIB
from kd.losses.checks import check_positive, check_size, check_tensors
from kd.losses.chunk_plan import plan_chunks
from kd.losses.chunked import chunked_loss
from kd.losses.divergences import Objective
from kd.losses.heads import finish_logits, logits_backward_
from kd.losses.inputs import DistillationLoss, supervised_inputs
from kd.losses.row_functions import RowChunk, add_ce_gradient_, softmax
from kd.losses.targets import Head, SampledTargets, VectorTargets


def expected_logit_loss(
    student_hidden: Tensor,
    student_head: Tensor,
    targets: SampledTargets | VectorTargets,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    kd_weight: float = 0.5,
    ce_weight: float = 0.5,
    student_bias: Tensor | None = None,
    student_softcap: float | None = None,
    student_scale: float = 1.0,
    chunk_size: int | None = None,
    logits_dtype: torch.dtype | None = None,
    logits_gib: float = LOGITS_GIB,
    reduction: Literal["sum", "mean"] = "sum",
    ignore_index: int = IGNORE_INDEX,
    row_index: Tensor | None = None,
) -> DistillationLoss:
    """Return what `distillation_loss` does under forward_kl, whose arguments these are.

    A row's kd may be below 0 for draws, whose expectation is not exact.

    Args:
        targets: at `temperature`; of (..., K) ids or a (..., H) vector, and entropies (...).

    Raises:
        ValueError: for a vector, a head with a softcap or one that is trained; and as
            `distillation_loss`.
    """
    is_vector = isinstance(targets, VectorTargets)
    if is_vector and student_softcap is not None:
        raise ValueError(
            f"student_softcap = {student_softcap}: a vector cannot give the expectation of a "
            "capped logit; use drawn tokens, or the teacher's hidden states"
        )
    if is_vector and student_head.requires_grad:
        raise ValueError(
            "student_head requires a gradient, but a vector is valid only for the head that it "
            "was made with: freeze the head, or use the teacher's hidden states"
        )
    check_tensors(
        student_hidden=student_hidden,
        student_head=student_head,
        labels=labels,
        student_bias=student_bias,
        row_index=row_index,
    )
    check_size("chunk_size", chunk_size)
    check_positive("logits_gib", logits_gib, f"the default is {LOGITS_GIB}")
    objective = Objective("forward_kl", 0.5, 0.1, 0.5, temperature, kd_weight, ce_weight)
    head = Head(student_head, student_bias, student_softcap, student_scale)
    with torch.autocast(labels.device.type, enabled=False):
        inputs = supervised_inputs(
            student_hidden,
            head,
            None,
            None,
            labels,
            objective,
            token_weights=None,
            row_index=row_index,
            ignore_index=ignore_index,
            reduction=reduction,
            vocab_size=targets.vocab_size,
            logits_dtype=logits_dtype,
        )
        dtype = inputs.weights_N.dtype

        def of_rows(tensor: Tensor) -> Tensor:
            flat = tensor.detach().reshape(labels.numel(), *tensor.shape[labels.dim() :])
            return flat.index_select(0, inputs.row_index_N)

        if isinstance(targets, SampledTargets):
            inputs = replace(inputs, top_NK=of_rows(targets.ids_BLK))
        plan = plan_chunks(
            inputs.vocab_size,
            inputs.logits_dtype,
            has_teacher=False,
            chunk_size=chunk_size,
            logits_gib=logits_gib,
        )
        result, _ = chunked_loss(inputs, plan, expected_logit_rows)
        # What is left of KL: nothing of it goes through the vocabulary
        rest_N = -(temperature**2) * of_rows(targets.entropy_BL).to(dtype)
        if isinstance(targets, VectorTargets):
            hidden_NH = inputs.student_hidden_MH.index_select(0, inputs.row_index_N)
            expected_N = (hidden_NH.to(dtype) * of_rows(targets.vector_BLH).to(dtype)).sum(-1)
            expected_N = expected_N + of_rows(targets.bias_BL).to(dtype)
            rest_N = rest_N - temperature * student_scale * expected_N
        rest = (rest_N * inputs.weights_N).sum()
        kd = result.kd + rest.detach()
        return result._replace(loss=result.loss + kd_weight * rest, kd=kd)


def expected_logit_rows(
    rows: RowChunk, objective: Objective, student: Head, _: Head | None = None
) -> None:
    """The `RowFunction` of T^2 * logsumexp(s / T), less T times the mean of s over drawn tokens
    where there are any.
    """
    for block in rows.blocks():
        _block(block, objective, student)


def _block(rows: RowChunk, objective: Objective, student: Head) -> None:
    temperature, dtype = objective.temperature, rows.weights_C.dtype
    logits_BV = finish_logits(rows.student_CV, student, dtype)
    q1_BV, lse_q1_B1, _ = softmax(logits_BV)  # at T = 1, for cross-entropy
    log_q1_label_B1 = logits_BV.gather(1, rows.labels_C[:, None]) - lse_q1_B1
    torch.neg(log_q1_label_B1.squeeze(1), out=rows.ce_C)
    q_BV, lse_q_B1 = q1_BV, lse_q1_B1
    if temperature != 1.0:
        q_BV, lse_q_B1, _ = softmax(logits_BV / temperature)
    kd_B = temperature**2 * lse_q_B1.squeeze(1)
    if rows.top_CK is not None:
        kd_B -= temperature * logits_BV.gather(1, rows.top_CK).mean(1)
    rows.kd_C.copy_(kd_B)
    if rows.dlogits_CV is None:
        return
    scale_B1 = objective.kd_weight * temperature * rows.weights_C[:, None]
    dlogits_BV = q_BV * scale_B1
    if rows.top_CK is not None:
        num_draws = rows.top_CK.shape[1]
        dlogits_BV.scatter_add_(1, rows.top_CK, (-scale_B1 / num_draws).expand_as(rows.top_CK))
    if objective.ce_weight:
        scale_B1 = objective.ce_weight * rows.weights_C[:, None]
        add_ce_gradient_(dlogits_BV, q1_BV, log_q1_label_B1, rows.labels_C, scale_B1)
    rows.dlogits_CV.copy_(logits_backward_(dlogits_BV, logits_BV, student))
