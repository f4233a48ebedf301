"""The losses that are compared, each as `(problem) -> scalar`: the sum over rows of one divergence,
in nats.

Same work for all: T = 1, no cross-entropy, equal vocabularies, every row supervised, gradients of
the student's hidden states and head. Each peer is called as its own trainer calls it; what is done
to its result is written in its function. The three divergences are the beta of 0, 0.5 and 1 of
Liger and TRL, whose beta is the weight of the teacher in the mixture, as here, and which all
include the teacher's entropy; at 0 and 1 both switch to a KL.

Shapes: N rows, V vocabulary, H hidden size (Hs student, Ht teacher).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kd.losses import distillation_loss

BETA = {"forward_kl": 0.0, "jsd": 0.5, "reverse_kl": 1.0}

# Random logits have this standard deviation: an entropy of 3 to 8 nats, as the vocabulary grows to
# 150k.
LOGITS_STD = 3.0
# Share of the variance of the logits that a matched teacher and student do not share: a KL of about
# 0.05.
MATCHED_OWN_SHARE = 0.006


@dataclass(frozen=True)
class Shape:
    student_hidden_size: int
    teacher_hidden_size: int
    vocab_size: int


@dataclass(frozen=True)
class Problem:
    """What each peer is given; student_hidden_NH and student_head_VH require a gradient."""

    student_hidden_NH: Tensor
    student_head_VH: Tensor
    teacher_hidden_NH: Tensor
    teacher_head_VH: Tensor
    labels_N: Tensor
    row_index_N: Tensor
    divergence: str


@dataclass(frozen=True)
class Peer:
    """A loss, the package it comes from (None: this one), where it runs, and the dtype in which it
    stores logits.
    """

    loss: Callable[[Problem], Tensor]
    package: str | None = None
    devices: tuple[str, ...] = ("cpu", "cuda")
    logits_dtype: torch.dtype = torch.float32


def make_problem(
    shape: Shape,
    num_tokens: int,
    divergence: str,
    *,
    dtype: torch.dtype,
    device: torch.device,
    is_matched: bool = False,
    seed: int = 0,
) -> Problem:
    """Random hidden states and heads; a matched student shares half its columns, and nearly all
    variance, with the teacher, so that their logits nearly agree in the way that any dtype can
    represent."""
    generator = torch.Generator(device).manual_seed(seed)
    sizes = (shape.student_hidden_size, shape.teacher_hidden_size)
    num_shared = min(sizes) // 2 if is_matched else 0

    def normal(num_rows: int, num_columns: int) -> Tensor:
        return torch.randn(num_rows, num_columns, generator=generator, device=device, dtype=dtype)

    shared_hidden, shared_head = (
        normal(num_tokens, num_shared),
        normal(shape.vocab_size, num_shared),
    )
    hidden, heads = [], []
    for size in sizes:
        own_size = size - num_shared
        hidden.append(torch.cat([shared_hidden, normal(num_tokens, own_size)], dim=1))
        own_share = MATCHED_OWN_SHARE if is_matched else 1.0
        scales = torch.full(
            (size,), LOGITS_STD * math.sqrt(own_share / own_size), device=device, dtype=dtype
        )
        scales[:num_shared] = LOGITS_STD * math.sqrt((1 - own_share) / max(1, num_shared))
        heads.append(
            torch.cat([shared_head, normal(shape.vocab_size, own_size)], dim=1).mul_(scales)
        )
    labels_N = torch.randint(shape.vocab_size, (num_tokens,), generator=generator, device=device)
    return Problem(
        student_hidden_NH=hidden[0].requires_grad_(),
        student_head_VH=heads[0].requires_grad_(),
        teacher_hidden_NH=hidden[1],
        teacher_head_VH=heads[1],
        labels_N=labels_N,
        row_index_N=torch.arange(num_tokens, device=device),
        divergence=divergence,
    )


def ours(
    problem: Problem, backend: str = "auto", logits_dtype: torch.dtype | None = None
) -> Tensor:
    """This project's loss; the rows are known, so the host never waits."""
    return distillation_loss(
        *_tensors(problem), **_options(problem), logits_dtype=logits_dtype, backend=backend
    ).loss


def ours_diagnostics(problem: Problem) -> Tensor:
    """The same with diagnostics of each row, as training calls it."""
    result, _ = distillation_loss(*_tensors(problem), **_options(problem), return_diagnostics=True)
    return result.loss


def _tensors(problem: Problem) -> tuple[Tensor, ...]:
    student = (problem.student_hidden_NH, problem.student_head_VH)
    return *student, problem.teacher_hidden_NH, problem.teacher_head_VH, problem.labels_N


def _options(problem: Problem) -> dict[str, Any]:
    rows = {"row_index": problem.row_index_N, "reduction": "sum"}
    return {"divergence": problem.divergence, "kd_weight": 1.0, "ce_weight": 0.0, **rows}


def eager(problem: Problem, is_compiled: bool = False) -> Tensor:
    """Full (N, V) logits in the inputs' dtype, widened to fp32 for the softmax; plain autograd."""
    loss = _compiled_full_logits_loss() if is_compiled else full_logits_loss
    return loss(
        problem.student_hidden_NH,
        problem.student_head_VH,
        problem.teacher_hidden_NH,
        problem.teacher_head_VH,
        problem.divergence,
    )


def full_logits_loss(
    student_hidden_NH: Tensor,
    student_head_VH: Tensor,
    teacher_hidden_NH: Tensor,
    teacher_head_VH: Tensor,
    divergence: str,
) -> Tensor:
    """The divergence written with torch's own functions; kl_div(log_b, log_a) is KL(a || b)."""
    kl = partial(F.kl_div, reduction="sum", log_target=True)
    log_q_NV = F.log_softmax((student_hidden_NH @ student_head_VH.T).float(), dim=-1)
    with torch.no_grad():
        log_p_NV = F.log_softmax((teacher_hidden_NH @ teacher_head_VH.T).float(), dim=-1)
    if divergence == "forward_kl":
        return kl(log_q_NV, log_p_NV)
    if divergence == "reverse_kl":
        return kl(log_p_NV, log_q_NV)
    log_m_NV = torch.logaddexp(log_p_NV, log_q_NV) - math.log(2)
    return 0.5 * (kl(log_m_NV, log_p_NV) + kl(log_m_NV, log_q_NV))


@cache
def _compiled_full_logits_loss() -> Callable[..., Tensor]:
    return torch.compile(full_logits_loss, dynamic=False)


def liger_jsd(problem: Problem, is_compiled: bool) -> Tensor:
    """LigerFusedLinearJSDLoss; it returns the mean over rows, here multiplied by N. Logits in the
    inputs' dtype.
    """
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss  # optional: extra "bench"

    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0,
        weight_soft_loss=1.0,
        beta=BETA[problem.divergence],
        compiled=is_compiled,
    )
    mean = loss(
        problem.student_hidden_NH,
        problem.student_head_VH,
        problem.teacher_hidden_NH,
        problem.teacher_head_VH,
        problem.labels_N,
    )
    return mean * problem.labels_N.numel()


def liger_triton(problem: Problem, accum_dtype: torch.dtype | None = None) -> Tensor:
    """liger_fused_linear_jsd; it returns the mean over rows, here multiplied by N. `accum_dtype` is
    the dtype of the head's gradient between chunks, by its default that of the head."""
    # Optional: extra "bench"
    from liger_kernel.transformers.functional import (
        liger_fused_linear_jsd,
    )

    mean = liger_fused_linear_jsd(
        problem.student_hidden_NH,
        problem.student_head_VH,
        problem.teacher_hidden_NH,
        problem.teacher_head_VH,
        problem.labels_N,
        jsd_beta=BETA[problem.divergence],
        accum_dtype=accum_dtype,
    )
    return mean * problem.labels_N.numel()


def trl(problem: Problem) -> Tensor:
    """The chunked loss of TRL's DistillationTrainer; num_items_in_batch=1 makes it a sum. It
    recomputes both models' logits in backward, in tiles of 4096 rows by 32768 columns, and always
    computes the student's entropy."""
    from trl.trainer.distillation_trainer import _chunked_divergence_loss  # optional: extra "bench"

    loss, _, _ = _chunked_divergence_loss(
        problem.student_hidden_NH[None],
        problem.teacher_hidden_NH[None],
        problem.student_head_VH,
        problem.teacher_head_VH,
        (problem.labels_N != -100)[None],
        BETA[problem.divergence],
        num_items_in_batch=1,
    )
    return loss


# In the order in which they are measured.
PEERS = {
    "ours": Peer(ours),
    "ours_diagnostics": Peer(ours_diagnostics),
    "ours_bf16_logits": Peer(
        partial(ours, logits_dtype=torch.bfloat16), devices=("cuda",), logits_dtype=torch.bfloat16
    ),
    "liger_compiled": Peer(partial(liger_jsd, is_compiled=True), package="liger_kernel"),
    "trl": Peer(trl, package="trl"),
    "eager": Peer(eager),
    "eager_compiled": Peer(partial(eager, is_compiled=True)),
    "liger": Peer(partial(liger_jsd, is_compiled=False), package="liger_kernel"),
    "liger_triton": Peer(liger_triton, package="liger_kernel", devices=("cuda",)),
    "liger_triton_fp32": Peer(
        partial(liger_triton, accum_dtype=torch.float32), package="liger_kernel", devices=("cuda",)
    ),
    "ours_torch": Peer(partial(ours, backend="torch"), devices=("cuda",)),
}
