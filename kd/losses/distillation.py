"""distillation_loss: divergence and cross-entropy from hidden states and lm_heads, never from (N,
V) logits.

Shapes: ... any leading shape, N supervised rows, H hidden size (the student's and the teacher's may
    differ),
V rows of a head (likewise), or the shared vocabulary once the heads are sliced to it.
"""

import functools
import importlib.util
import inspect
import logging
import os
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from kd.constants import IGNORE_INDEX
from kd.losses.checks import check_choice, check_size
from kd.losses.chunk_plan import ChunkPlan, plan_chunks
from kd.losses.chunked import RowValues, chunked_loss, fill_from_teacher
from kd.losses.heads import Projection
from kd.losses.inputs import Inputs, supervised_inputs
from kd.losses.objective import Divergence, Objective
from kd.losses.reference import reference_diagnostics, reference_loss
from kd.losses.row_functions import RowFunction, torch_rows

log = logging.getLogger(__name__)

BACKENDS = ("auto", "reference", "torch", "triton")


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
    group: dist.ProcessGroup | None = None,
    backend: Literal["auto", "reference", "torch", "triton"] = "auto",
) -> DistillationLoss:
    """Return kd_weight * T^2 * divergence(teacher, student) + ce_weight * cross-entropy over
    supervised rows.

    Gradients reach student_hidden, student_head and student_bias, each where it requires one; none
    reach the teacher or token_weights. Without a supervised row the loss is a zero attached to the
    graph. Autocast is off inside. With `row_index` the host never waits for the device.

    Args: student_hidden: (..., Hs), last hidden states, already shifted: row i predicts labels[i].
        student_head: (Vs, Hs), the lm_head, same dtype. teacher_hidden: (..., Ht), aligned with
        student_hidden. teacher_head: (Vt, Ht), same dtype as teacher_hidden. If kd_weight is 0 both
        may be None. labels: (...), int64 token ids below the shared vocabulary, or ignore_index.
        divergence: one of `kd.losses.DIVERGENCES`, defined in `kd.losses.reference`. beta: weight
        of the teacher in the mixture of jsd, 0 < beta < 1. alpha: skew of skew_kl and
        skew_reverse_kl, 0 < alpha < 1. mix_weight: weight of forward_kl in mixed_kl, the rest is
        reverse_kl. temperature: T > 0 of both distributions in kd; ce is at T = 1. kd_weight: at 0
        the teacher's product is skipped, and kd reported as 0. ce_weight: at 0 ce is still
        reported. token_weights: (...), weights >= 0 that multiply kd and ce of each row.
        student_bias, teacher_bias: (Vs) and (Vt), same dtype as the head. student_softcap,
        teacher_softcap: cap > 0; logits = cap * tanh(logits / cap). student_scale, teacher_scale:
        logits = softcap(scale * (hidden W^T + bias)). vocab_size: upper bound of the shared
        vocabulary V = min(Vs, Vt, vocab_size), whatever kd_weight is.
            Heads are sliced to V; rows beyond it take no part and get a zero gradient.
        chunk_size: rows of the student whose logits exist at a time, the teacher's an eighth of
            them; None: as many as 2 GiB of logits hold (`kd.losses.chunk_plan`).
        logits_dtype: dtype in which logits and their gradient are stored; None: float32, or float64
            where hidden states are. bfloat16 saves memory and costs accuracy; softmax sums stay in
            float32.
        reduction: "sum", or "mean" = sum / sum of token weights (the number of supervised rows
            without them).
        ignore_index: label of rows that are not supervised.
        row_index: (N), int64 indices of the supervised rows in the flattened labels, none of them
            twice; None: found from labels.
        group: ranks over which the first vocab_size tokens of both heads are split, as torch.chunk
            splits them: with S = ceil(vocab_size / ranks), rank r passes rows [r * S, (r + 1) * S)
            of both heads and biases, and the vocab_size of the whole. All else is the same on all
            ranks, as are all results but the gradients of head and bias, which are those of the
            rank's slice.
        backend: "triton" (a kernel for CUDA), "torch", "reference" (full logits, plain autograd),
            or "auto": "triton" on CUDA where it is installed, else "torch".

    Raises: ValueError: an argument out of range or of the wrong shape, dtype or device; a backend
        not available;
            on the CPU a label outside the shared vocabulary, elsewhere an asynchronous assertion.
    """
    return _distill(locals(), wants_diagnostics=False)[0]


def distillation_loss_with_diagnostics(
    *args: Any, **options: Any
) -> tuple[DistillationLoss, RowDiagnostics | None]:
    """As `distillation_loss`, whose arguments it takes, with what the same pass over the logits
    tells of each row.

    Without a teacher, or with kd_weight=0, there are no diagnostics.
    """
    call = inspect.signature(distillation_loss).bind(*args, **options)
    call.apply_defaults()
    return _distill(call.arguments, wants_diagnostics=True)


distillation_loss_with_diagnostics.__signature__ = inspect.signature(distillation_loss).replace(  # type: ignore[attr-defined]
    return_annotation=tuple[DistillationLoss, RowDiagnostics | None]
)


@torch.compiler.disable
def _distill(
    arguments: dict[str, Any], wants_diagnostics: bool
) -> tuple[DistillationLoss, RowDiagnostics | None]:
    """The arguments of `distillation_loss` by name."""
    a = SimpleNamespace(**arguments)
    check_choice("backend", a.backend, BACKENDS)
    check_choice("reduction", a.reduction, ("sum", "mean"))
    check_size("chunk_size", a.chunk_size)
    objective = Objective(
        a.divergence, a.beta, a.alpha, a.mix_weight, a.temperature, a.kd_weight, a.ce_weight
    )
    student = Projection(
        a.student_hidden, a.student_head, a.student_bias, a.student_softcap, a.student_scale
    )
    teacher = None
    if a.teacher_hidden is not None and a.teacher_head is not None:
        teacher = Projection(
            a.teacher_hidden, a.teacher_head, a.teacher_bias, a.teacher_softcap, a.teacher_scale
        )
    elif a.kd_weight != 0 or a.teacher_hidden is not a.teacher_head:
        missing = "teacher_hidden" if a.teacher_hidden is None else "teacher_head"
        raise ValueError(
            f"{missing}=None, kd_weight={a.kd_weight!r}; pass it, or no teacher and kd_weight=0"
        )
    with torch.autocast(a.labels.device.type, enabled=False):
        inputs = supervised_inputs(
            student,
            teacher,
            a.labels,
            objective,
            token_weights=a.token_weights,
            row_index=a.row_index,
            ignore_index=a.ignore_index,
            reduction=a.reduction,
            vocab_size=a.vocab_size,
            logits_dtype=a.logits_dtype,
            group=a.group,
        )
        wants_diagnostics = wants_diagnostics and inputs.teacher is not None
        run = (
            _by_reference
            if a.backend == "reference"
            else functools.partial(_by_chunks, a.backend, a.chunk_size)
        )
        loss, kd, ce, diagnostics_N5 = run(inputs, wants_diagnostics)
    num_tokens = torch.full((), inputs.labels_N.shape[0], device=a.labels.device)
    diagnostics = None if diagnostics_N5 is None else RowDiagnostics(*diagnostics_N5.unbind(1))
    return DistillationLoss(loss, kd.detach(), ce.detach(), num_tokens), diagnostics


def _by_reference(
    inputs: Inputs, wants_diagnostics: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    if inputs.shard is not None:
        raise ValueError(
            "backend='reference' takes whole heads; with a group choose 'torch' or 'triton'"
        )
    return *reference_loss(inputs), reference_diagnostics(inputs) if wants_diagnostics else None


def _by_chunks(
    backend: str, chunk_size: int | None, inputs: Inputs, wants_diagnostics: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    backend = resolve_backend(backend, inputs.labels_N.device)
    row_function = _row_function(backend)
    has_teacher = inputs.teacher is not None
    plan = plan_chunks(
        inputs.plan_vocab_size, inputs.logits_dtype, has_teacher=has_teacher, chunk_size=chunk_size
    )
    _log_plan(backend, plan, inputs.vocab_size, inputs.logits_dtype)
    values = RowValues.empty(inputs, diagnostics=wants_diagnostics)
    fill = fill_from_teacher(inputs, row_function, plan, values)
    return *chunked_loss(inputs, fill, values, plan.student_rows), values.diagnostics_N5


def resolve_backend(backend: str, device: torch.device) -> str:
    """Return the backend that "auto" stands for on this device.

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
                f"backend='triton' runs on CUDA and the tensors are on {device}; use 'auto' or "
                f"'torch'"
            )
    return backend


def _row_function(backend: str) -> RowFunction:
    if backend == "torch":
        return torch_rows
    from kd.losses.triton_rows import triton_rows

    return triton_rows


@functools.cache
def _log_plan(backend: str, plan: ChunkPlan, vocab_size: int, logits_dtype: torch.dtype) -> None:
    """Say once per plan what the loss will hold."""
    size_gib = sum(plan) * vocab_size * logits_dtype.itemsize / 2**30
    log.info(
        "loss: backend %s, logits in %s, chunks of %d student and %d teacher rows of %d tokens (at "
        "most %.2f GiB)",
        backend,
        str(logits_dtype).removeprefix("torch."),
        plan.student_rows,
        plan.teacher_rows,
        vocab_size,
        size_gib,
    )
