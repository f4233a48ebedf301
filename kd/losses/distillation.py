"""distillation_loss: divergence and cross-entropy from hidden states and lm_heads, never from (N, V) logits.

Shapes: ... any leading shape, N supervised rows, H hidden size (the student's and the teacher's may differ),
V rows of a head (likewise), or the shared vocabulary once the heads are sliced to it.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from kd.constants import IGNORE_INDEX
from kd.losses.checks import check_choice, check_size
from kd.losses.chunked import chunked_loss
from kd.losses.heads import Projection
from kd.losses.inputs import supervised_inputs
from kd.losses.objective import Divergence, Objective
from kd.losses.reference import reference_loss
from kd.losses.rows import torch_rows

BACKENDS = ("auto", "reference", "torch", "triton")


class DistillationLoss(NamedTuple):
    """loss = kd_weight * kd + ce_weight * ce. Scalars on the device; only `loss` carries a gradient.

    kd: T^2 * divergence; ce: cross-entropy. Sums or means over supervised rows, in nats.
    num_tokens: int64, the number of supervised rows.
    """

    loss: Tensor
    kd: Tensor
    ce: Tensor
    num_tokens: Tensor


def distillation_loss(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor | None,
    teacher_head: Tensor | None,
    labels: Tensor,
    *,
    divergence: Divergence = "forward_kl",
    beta: float = 0.5,
    alpha: float = 0.1,
    mix_weight: float = 0.5,
    temperature: float = 1.0,
    kd_weight: float = 0.5,
    ce_weight: float = 0.5,
    token_weights: Tensor | None = None,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    student_scale: float = 1.0,
    teacher_scale: float = 1.0,
    vocab_size: int | None = None,
    chunk_size: int | None = None,
    logits_dtype: torch.dtype | None = None,
    reduction: Literal["sum", "mean"] = "sum",
    ignore_index: int = IGNORE_INDEX,
    row_index: Tensor | None = None,
    backend: Literal["auto", "reference", "torch", "triton"] = "auto",
) -> DistillationLoss:
    """Return kd_weight * T^2 * divergence(teacher, student) + ce_weight * cross-entropy over supervised rows.

    Gradients reach student_hidden, student_head and student_bias, each where it requires one; none reach the
    teacher or token_weights. Without a supervised row the loss is a zero attached to the graph. Autocast is
    off inside. With `row_index` the host never waits for the device.

    Args:
        student_hidden: (..., Hs), last hidden states, already shifted: row i predicts labels[i].
        student_head: (Vs, Hs), the lm_head, same dtype.
        teacher_hidden: (..., Ht), aligned with student_hidden.
        teacher_head: (Vt, Ht), same dtype as teacher_hidden. If kd_weight is 0 both may be None.
        labels: (...), int64 token ids below the shared vocabulary, or ignore_index.
        divergence: one of `kd.losses.DIVERGENCES`, defined in `kd.losses.reference`.
        beta: weight of the teacher in the mixture of jsd, 0 < beta < 1.
        alpha: skew of skew_kl and skew_reverse_kl, 0 < alpha < 1.
        mix_weight: weight of forward_kl in mixed_kl, the rest is reverse_kl.
        temperature: T > 0 of both distributions in kd; ce is at T = 1.
        kd_weight: at 0 the teacher's product is skipped, and kd reported as 0.
        ce_weight: at 0 ce is still reported.
        token_weights: (...), weights >= 0 that multiply kd and ce of each row.
        student_bias, teacher_bias: (Vs) and (Vt), same dtype as the head.
        student_softcap, teacher_softcap: cap > 0; logits = cap * tanh(logits / cap).
        student_scale, teacher_scale: logits = softcap(scale * (hidden W^T + bias)).
        vocab_size: upper bound of the shared vocabulary V = min(Vs, Vt, vocab_size), whatever kd_weight is.
            Heads are sliced to V; rows beyond it take no part and get a zero gradient.
        chunk_size: rows whose logits exist at a time; None: as many as 2 GiB of logits hold, both models
            together. Intermediates take up to 0.3 GiB more.
        logits_dtype: dtype in which logits and their gradient are stored; None: float32, or float64 where
            hidden states are. bfloat16 saves memory and costs accuracy; softmax sums stay in float32.
        reduction: "sum", or "mean" = sum / sum of token weights (the number of supervised rows without them).
        ignore_index: label of rows that are not supervised.
        row_index: (N), int64 indices of the supervised rows in the flattened labels; None: found from labels.
        backend: "torch", "reference" (full logits, plain autograd), or "auto", which is "torch".

    Raises:
        ValueError: an argument out of range or of the wrong shape, dtype or device; a backend not available;
            on the CPU a label outside the shared vocabulary, elsewhere an asynchronous assertion.
    """
    check_choice("backend", backend, BACKENDS)
    if backend == "triton":
        raise ValueError("backend='triton' is not available; use 'auto' or 'torch'")
    check_choice("reduction", reduction, ("sum", "mean"))
    check_size("chunk_size", chunk_size)
    objective = Objective(divergence, beta, alpha, mix_weight, temperature, kd_weight, ce_weight)
    student = Projection(student_hidden, student_head, student_bias, student_softcap, student_scale)
    teacher = None
    if teacher_hidden is not None and teacher_head is not None:
        teacher = Projection(teacher_hidden, teacher_head, teacher_bias, teacher_softcap, teacher_scale)
    elif kd_weight != 0 or teacher_hidden is not teacher_head:
        missing = "teacher_hidden" if teacher_hidden is None else "teacher_head"
        raise ValueError(f"{missing}=None, kd_weight={kd_weight!r}; pass it, or no teacher and kd_weight=0")
    with torch.autocast(labels.device.type, enabled=False):
        inputs = supervised_inputs(
            student,
            teacher,
            labels,
            objective,
            token_weights=token_weights,
            row_index=row_index,
            ignore_index=ignore_index,
            reduction=reduction,
            vocab_size=vocab_size,
            logits_dtype=logits_dtype,
        )
        if backend == "reference":
            loss, kd, ce = reference_loss(inputs)
        else:
            loss, kd, ce = chunked_loss(inputs, torch_rows, chunk_size)
    num_tokens = torch.full((), inputs.labels_N.shape[0], device=labels.device)
    return DistillationLoss(loss, kd.detach(), ce.detach(), num_tokens)
