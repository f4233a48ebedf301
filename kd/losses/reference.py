"""The specification: the loss on full (N, V) logits in any dtype, differentiated by plain autograd.

With p the teacher's and q the student's distribution over the shared vocabulary at temperature T,
and KL(a, b) = sum_v a_v * (log a_v - log b_v), the divergence of one row is

    forward_kl       KL(p, q)                       KL(teacher || student), teacher entropy included
    reverse_kl       KL(q, p)                       KL(student || teacher)
    mixed_kl         a KL(p, q) + (1 - a) KL(q, p)  a = mix_weight
    jsd              b KL(p, m) + (1 - b) KL(q, m)  b = beta, m = b p + (1 - b) q; arXiv 2306.13649
    skew_kl          KL(p, a p + (1 - a) q)         a = alpha; arXiv 2402.03898
    skew_reverse_kl  KL(q, a q + (1 - a) p)         a = alpha; arXiv 2402.03898
    tvd              1/2 sum_v |p_v - q_v|          arXiv 2307.15190

and kd = T^2 * divergence, so that the gradient does not fade as T grows (arXiv 1503.02531, section
2). Cross-entropy takes the same student logits at T = 1.

Shapes: N rows, V shared vocabulary, H hidden size (the student's and the teacher's may differ).
"""

import math
from typing import assert_never

import torch
import torch.nn.functional as F
from torch import Tensor

from kd.losses.divergences import Objective
from kd.losses.heads import shared_head
from kd.losses.inputs import DistillationLoss, Inputs, RowDiagnostics, sum_rows
from kd.losses.targets import Head


def reference_loss(inputs: Inputs) -> DistillationLoss:
    """Return the loss, with every row computed in `inputs.logits_dtype`."""
    student_logits_NV, teacher_logits_NV = reference_logits(inputs)
    ce_N = F.cross_entropy(student_logits_NV, inputs.labels_N, reduction="none")
    kd_N = torch.zeros_like(ce_N)
    if teacher_logits_NV is not None:
        kd_N = kd_rows(student_logits_NV, teacher_logits_NV, inputs.objective)
    return sum_rows(inputs, kd_N, ce_N)


def reference_logits(inputs: Inputs) -> tuple[Tensor, Tensor | None]:
    """Return the logits of all supervised rows over the shared vocabulary: the student's, and the
    teacher's if any.
    """

    def logits(hidden_MH: Tensor, head: Head) -> Tensor:
        hidden_NH = hidden_MH.index_select(0, inputs.row_index_N)
        return full_logits(hidden_NH, shared_head(head, inputs.vocab_size), inputs.logits_dtype)

    teacher_logits_NV = None
    if inputs.teacher_hidden_MH is not None and inputs.teacher_head is not None:
        with torch.no_grad():
            teacher_logits_NV = logits(inputs.teacher_hidden_MH, inputs.teacher_head)
    return logits(inputs.student_hidden_MH, inputs.student_head), teacher_logits_NV


@torch.no_grad()
def reference_diagnostics(inputs: Inputs) -> RowDiagnostics:
    """Return the diagnostics of each row; the inputs must have a teacher."""
    student_logits_NV, teacher_logits_NV = reference_logits(inputs)
    assert teacher_logits_NV is not None
    log_q_NV = torch.log_softmax(student_logits_NV / inputs.objective.temperature, dim=-1)
    log_p_NV = torch.log_softmax(teacher_logits_NV / inputs.objective.temperature, dim=-1)
    agrees_N = student_logits_NV.argmax(-1) == teacher_logits_NV.argmax(-1)
    return RowDiagnostics(
        forward_kl=_kl(log_p_NV, log_q_NV),
        reverse_kl=_kl(log_q_NV, log_p_NV),
        student_entropy=-(log_q_NV.exp() * log_q_NV).sum(-1),
        teacher_entropy=-(log_p_NV.exp() * log_p_NV).sum(-1),
        top1_agreement=agrees_N.to(log_q_NV.dtype),
    )


def full_logits(hidden_NH: Tensor, head: Head, dtype: torch.dtype) -> Tensor:
    """Return softcap(scale * (hidden W^T + bias)), (N, V) in `dtype`; softcap(x) = cap * tanh(x /
    cap).
    """
    logits_NV = hidden_NH.to(dtype) @ head.weight_VH.to(dtype).T
    if head.bias_V is not None:
        logits_NV = logits_NV + head.bias_V.to(dtype)
    logits_NV = head.scale * logits_NV
    return (
        logits_NV if head.softcap is None else head.softcap * torch.tanh(logits_NV / head.softcap)
    )


def kd_rows(student_logits_NV: Tensor, teacher_logits_NV: Tensor, objective: Objective) -> Tensor:
    """Return kd_N = T^2 * divergence of each row, as defined at the top of this file."""
    temperature, weight = objective.temperature, objective.parameter
    log_q_NV = torch.log_softmax(student_logits_NV / temperature, dim=-1)
    log_p_NV = torch.log_softmax(teacher_logits_NV / temperature, dim=-1)
    match objective.divergence:
        case "forward_kl":
            divergence_N = _kl(log_p_NV, log_q_NV)
        case "reverse_kl":
            divergence_N = _kl(log_q_NV, log_p_NV)
        case "mixed_kl":
            divergence_N = weight * _kl(log_p_NV, log_q_NV) + (1 - weight) * _kl(log_q_NV, log_p_NV)
        case "jsd":
            log_m_NV = log_mixture(log_p_NV, log_q_NV, weight)
            divergence_N = weight * _kl(log_p_NV, log_m_NV) + (1 - weight) * _kl(log_q_NV, log_m_NV)
        case "skew_kl":
            divergence_N = _kl(log_p_NV, log_mixture(log_p_NV, log_q_NV, weight))
        case "skew_reverse_kl":
            divergence_N = _kl(log_q_NV, log_mixture(log_q_NV, log_p_NV, weight))
        case "tvd":
            divergence_N = 0.5 * (log_p_NV.exp() - log_q_NV.exp()).abs().sum(-1)
        case unknown:
            assert_never(unknown)
    return temperature**2 * divergence_N


def top_k_kd_rows(
    student_logits_NV: Tensor, ids_NK: Tensor, logprobs_NK: Tensor, tail: str, objective: Objective
) -> Tensor:
    """Return kd_N over K + 1 outcomes, the teacher's K tokens and all others as one, at the
    objective's temperature.

    The teacher's mass of the others is 1 - sum(p) with tail "bucket" and nothing with "ignore"; p
    is normalised.
    """
    p_NK = logprobs_NK.exp()
    p_tail_N = (1 - p_NK.sum(-1)).clamp_min(0) if tail == "bucket" else torch.zeros_like(p_NK[:, 0])
    p_NO = torch.cat([p_NK, p_tail_N[:, None]], dim=1)
    q_NV = torch.softmax(student_logits_NV / objective.temperature, dim=-1)
    is_tail_NV = torch.ones_like(q_NV, dtype=torch.bool).scatter(1, ids_NK, False)
    q_NO = torch.cat([q_NV.gather(1, ids_NK), (q_NV * is_tail_NV).sum(-1, keepdim=True)], dim=1)
    tiny = torch.finfo(q_NV.dtype).tiny
    log_p_NO, log_q_NO = ((x / x.sum(-1, keepdim=True)).clamp_min(tiny).log() for x in (p_NO, q_NO))
    # kd_rows divides by it, and log-probabilities at T are logits of themselves
    temperature = objective.temperature
    return kd_rows(temperature * log_q_NO, temperature * log_p_NO, objective)


def log_mixture(log_a_NV: Tensor, log_b_NV: Tensor, weight: float) -> Tensor:
    """Return log(weight * a + (1 - weight) * b)."""
    return torch.logaddexp(log_a_NV + math.log(weight), log_b_NV + math.log1p(-weight))


def _kl(log_a_NV: Tensor, log_b_NV: Tensor) -> Tensor:
    return (log_a_NV.exp() * (log_a_NV - log_b_NV)).sum(-1)
