"""distillation_loss: divergence and cross-entropy from hidden states and lm_heads, never from (N,
V) logits.

Shapes: ... any leading shape, N supervised rows, H hidden size (the student's and the teacher's may
differ), V rows of a head (likewise), or the shared vocabulary once the heads are sliced to it.
"""

import importlib.util
import logging
import os
from typing import Literal, overload

import torch
from torch import Tensor

from kd.constants import IGNORE_INDEX, LOGITS_GIB
from kd.losses.checks import check_choice, check_positive, check_size, check_tensors
from kd.losses.chunk_plan import ChunkPlan, plan_chunks
from kd.losses.chunked import chunked_loss
from kd.losses.divergences import Divergence, Objective
from kd.losses.inputs import DistillationLoss, RowDiagnostics, supervised_inputs
from kd.losses.reference import reference_diagnostics, reference_loss
from kd.losses.row_functions import RowFunction, torch_rows
from kd.losses.targets import Head

log = logging.getLogger(__name__)

BACKENDS = ("auto", "reference", "torch", "triton")


@overload
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
    logits_gib: float = LOGITS_GIB,
    logits_dtype: torch.dtype | None = None,
    reduction: Literal["sum", "mean"] = "sum",
    ignore_index: int = IGNORE_INDEX,
    row_index: Tensor | None = None,
    backend: Literal["auto", "reference", "torch", "triton"] = "auto",
    return_diagnostics: Literal[False] = False,
) -> DistillationLoss: ...


@overload
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
    logits_gib: float = LOGITS_GIB,
    logits_dtype: torch.dtype | None = None,
    reduction: Literal["sum", "mean"] = "sum",
    ignore_index: int = IGNORE_INDEX,
    row_index: Tensor | None = None,
    backend: Literal["auto", "reference", "torch", "triton"] = "auto",
    return_diagnostics: Literal[True],
) -> tuple[DistillationLoss, RowDiagnostics | None]: ...


@torch.compiler.disable
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
    logits_gib: float = LOGITS_GIB,
    logits_dtype: torch.dtype | None = None,
    reduction: Literal["sum", "mean"] = "sum",
    ignore_index: int = IGNORE_INDEX,
    row_index: Tensor | None = None,
    backend: Literal["auto", "reference", "torch", "triton"] = "auto",
    return_diagnostics: bool = False,
) -> DistillationLoss | tuple[DistillationLoss, RowDiagnostics | None]:
    """Return kd_weight * T^2 * divergence(teacher, student) + ce_weight * cross-entropy over
    supervised rows.

    Gradients reach student_hidden, student_head and student_bias, each where it requires one; none
    reach the teacher or token_weights. Without a supervised row the loss is a zero attached to the
    graph. Autocast is off inside. With `row_index` the host never waits for the device.

    Args:
        student_hidden: (..., Hs), last hidden states, already shifted: row i predicts labels[i].
        student_head: (Vs, Hs), the lm_head, same dtype.
        teacher_hidden: (..., Ht), aligned with student_hidden.
        teacher_head: (Vt, Ht), same dtype as teacher_hidden. With kd_weight=0 both may be None.
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
        vocab_size: upper bound of the shared vocabulary V = min(Vs, Vt, vocab_size), whatever
            kd_weight is. Heads are sliced to V; rows beyond it take no part and get a zero
            gradient.
        chunk_size: rows of the student whose logits exist at a time, the teacher's an eighth of
            them; None: as many as `logits_gib` hold.
        logits_gib: what the logits of both models may take at a time (`kd.losses.chunk_plan`); a
            row of each always exists, and a chunk_size replaces it.
        logits_dtype: dtype in which logits and their gradient are stored; None: float32, or float64
            where hidden states are. bfloat16 saves memory and costs accuracy; softmax sums stay in
            float32.
        reduction: "sum", or "mean" = sum / sum of token weights (the number of supervised rows
            without them).
        ignore_index: label of rows that are not supervised.
        row_index: (N), int64 indices of the supervised rows in the flattened labels, none of them
            twice; None: found from labels.
        backend: "triton" (a kernel for CUDA), "torch", "reference" (full logits, plain autograd),
            or "auto": "triton" on CUDA where it is installed, else "torch".
        return_diagnostics: return (loss, diagnostics), of each row and from the same pass;
            diagnostics are None without a teacher, or with kd_weight=0.

    Raises:
        ValueError: an argument out of range or of the wrong shape, dtype, layout or device; a
            backend that is not available; on the CPU a label outside the shared vocabulary, an
            index in row_index that is no label's or is there twice, a token weight that is
            negative or not finite. Elsewhere these are asynchronous assertions.
        TypeError: an argument of another type, such as an array of NumPy or a bool for a number.
    """
    check_tensors(
        student_hidden=student_hidden,
        student_head=student_head,
        teacher_hidden=teacher_hidden,
        teacher_head=teacher_head,
        labels=labels,
        token_weights=token_weights,
        student_bias=student_bias,
        teacher_bias=teacher_bias,
        row_index=row_index,
    )
    check_choice("backend", backend, BACKENDS)
    check_choice("reduction", reduction, ("sum", "mean"))
    check_size("chunk_size", chunk_size)
    check_positive("logits_gib", logits_gib, f"the default is {LOGITS_GIB}")
    objective = Objective(divergence, beta, alpha, mix_weight, temperature, kd_weight, ce_weight)
    student = Head(student_head, student_bias, student_softcap, student_scale)
    teacher = None
    if teacher_hidden is not None and teacher_head is not None:
        teacher = Head(teacher_head, teacher_bias, teacher_softcap, teacher_scale)
    elif kd_weight != 0 or teacher_hidden is not teacher_head:
        missing = "teacher_hidden" if teacher_hidden is None else "teacher_head"
        raise ValueError(
            f"{missing}=None, kd_weight={kd_weight!r}; pass it, or no teacher and kd_weight=0"
        )
    with torch.autocast(labels.device.type, enabled=False):
        inputs = supervised_inputs(
            student_hidden,
            student,
            teacher_hidden,
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
        has_teacher = inputs.teacher_head is not None
        if backend == "reference":
            result = reference_loss(inputs)
            with_diagnostics = return_diagnostics and has_teacher
            diagnostics = reference_diagnostics(inputs) if with_diagnostics else None
        else:
            name, row_function = _row_function(backend, labels.device)
            plan = plan_chunks(
                inputs.vocab_size,
                inputs.logits_dtype,
                has_teacher=has_teacher,
                chunk_size=chunk_size,
                logits_gib=logits_gib,
            )
            num_rows = inputs.labels_N.numel()
            _log_plan(name, plan, num_rows, inputs.vocab_size, inputs.logits_dtype)
            result, diagnostics = chunked_loss(
                inputs, plan, row_function, with_diagnostics=return_diagnostics
            )
    return (result, diagnostics) if return_diagnostics else result


def resolve_backend(backend: str, device: torch.device) -> str:
    """Return the backend that "auto" means on this device.

    Raises:
        ValueError: the backend cannot run there.
    """
    if backend == "auto":
        return "triton" if device.type == "cuda" and importlib.util.find_spec("triton") else "torch"
    if backend == "triton":
        if not importlib.util.find_spec("triton"):
            raise ValueError(
                "backend='triton' needs the package triton; install it, or use 'torch'"
            )
        if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError(
                f"backend='triton' runs on CUDA, but the tensors are on {device}; use 'auto' or "
                "'torch'"
            )
    return backend


def _row_function(backend: str, device: torch.device) -> tuple[str, RowFunction]:
    """Return the backend that is meant, by name, and what it is."""
    name = resolve_backend(backend, device)
    if name == "torch":
        return name, torch_rows
    from kd.losses.triton_rows import triton_rows

    return name, triton_rows


_LOGGED: set[tuple[object, ...]] = set()


def _log_plan(
    backend: str, plan: ChunkPlan, num_rows: int, vocab_size: int, logits_dtype: torch.dtype
) -> None:
    """Say once per plan what the loss will hold. num_rows: of the first call."""
    key = (backend, plan, vocab_size, logits_dtype)
    if key in _LOGGED:
        return
    _LOGGED.add(key)
    dtype = str(logits_dtype).removeprefix("torch.")
    size_gib = sum(plan) * vocab_size * logits_dtype.itemsize / 2**30
    if num_rows <= min(rows for rows in plan if rows):
        log.info("logits    in %s by backend %s, all rows at once", dtype, backend)
        return
    log.info(
        "logits    in %s by backend %s, in chunks of %d student and %d teacher rows of %d tokens, "
        "at most %.2f GiB (loss.logits_gib)",
        dtype,
        backend,
        plan.student_rows,
        plan.teacher_rows,
        vocab_size,
        size_gib,
    )
