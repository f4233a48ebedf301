"""triton_rows: the `RowFunction` as one launch of a Triton kernel; the twin of `torch_rows`.

With a shard each pass of the kernel is a launch of its own, and `sums` carries a row's numbers from
one to the next, reduced over the ranks in between.

Shapes: C rows of a chunk, V shared vocabulary or this rank's slice of it; 12 and 3: columns of
    `sums`.
"""

import torch
import triton
from torch import Tensor

from kd.losses.heads import Projection
from kd.losses.row_functions import Rows, RowSpec
from kd.losses.sharding import VocabShard
from kd.losses.triton_kernel import NUM_SUMS, row_kernel

MAX_BLOCK = (
    1024  # with twice as many, registers for diagnostics leave room for fewer rows at a time
)
NUM_WARPS = 8

SUMS, MIXTURE, GRADIENT = 0, 1, 2
MIXTURES = ("jsd", "skew_kl", "skew_reverse_kl", "tvd")

# Columns of `sums`, which `row_kernel` explains.
LSES, REVERSE_KL, FORWARD_KL = slice(3), slice(3, 4), slice(5, 6)
MEANS_OF_Q, MEANS_OF_P, MEANS_AND_LABEL = slice(3, 5), slice(5, 7), slice(3, 8)
TOPS, OF_MIXTURE = slice(8, 10), slice(10, 12)


def triton_rows(rows: Rows, spec: RowSpec) -> None:
    """The `RowFunction` on CUDA; under TRITON_INTERPRET=1 on the CPU, for tests."""
    num_rows = rows.student_CV.shape[0]
    if num_rows == 0:
        return
    is_mixture = rows.teacher_CV is not None and spec.objective.divergence in MIXTURES
    if spec.shard is None:
        _launch(rows, spec, None, SUMS, GRADIENT)
        return
    sums_C12 = rows.weights_C.new_empty(num_rows, NUM_SUMS.value)
    _launch(rows, spec, sums_C12, SUMS, SUMS)
    _reduce_sums_(sums_C12, spec.shard)
    if is_mixture:
        _launch(rows, spec, sums_C12, MIXTURE, MIXTURE)
        sums_C12[:, OF_MIXTURE] = spec.shard.sum_(sums_C12[:, OF_MIXTURE].contiguous())
    _launch(rows, spec, sums_C12, GRADIENT, GRADIENT)
    if rows.diagnostics_C5 is not None:
        rows.diagnostics_C5[:, 4] = spec.shard.max_(rows.diagnostics_C5[:, 4].contiguous())


def _reduce_sums_(sums_C12: Tensor, shard: VocabShard) -> None:
    """From sums over a slice of the vocabulary to sums over all of it: means by each slice's share
    of the mass.
    """
    slice_C3 = sums_C12[:, LSES].clone()
    sums_C12[:, LSES] = shard.logsumexp(slice_C3)
    # log of the slice's share of the mass: what log q and log p of its tokens change by
    log_share_q_C1, log_share_p_C1, _ = (slice_C3 - sums_C12[:, LSES]).split(1, dim=1)
    sums_C12[:, REVERSE_KL] += log_share_q_C1 - log_share_p_C1
    sums_C12[:, FORWARD_KL] += log_share_p_C1 - log_share_q_C1
    sums_C12[:, MEANS_OF_Q] *= log_share_q_C1.exp()
    sums_C12[:, MEANS_OF_P] *= log_share_p_C1.exp()
    sums_C12[:, MEANS_AND_LABEL] = shard.sum_(sums_C12[:, MEANS_AND_LABEL].contiguous())
    sums_C12[:, TOPS] = shard.max_(sums_C12[:, TOPS].contiguous())


def _launch(
    rows: Rows, spec: RowSpec, sums_C12: Tensor | None, first_pass: int, last_pass: int
) -> None:
    objective, student, teacher = spec.objective, spec.student, spec.teacher or spec.student
    num_rows, vocab_size = rows.student_CV.shape
    has_teacher = rows.teacher_CV is not None
    dlogits_CV = rows.dlogits_CV
    # Triton launches on the current device, whatever the tensors'.
    with torch.cuda.device_of(rows.student_CV):
        row_kernel[(num_rows,)](
            rows.student_CV,
            rows.teacher_CV,
            student.bias_V,
            teacher.bias_V if has_teacher else None,
            rows.labels_C,
            rows.weights_C,
            rows.kd_C,
            rows.ce_C,
            dlogits_CV,
            rows.diagnostics_C5,
            sums_C12,
            rows.student_CV.stride(0),
            rows.teacher_CV.stride(0) if rows.teacher_CV is not None else 0,
            dlogits_CV.stride(0) if dlogits_CV is not None else 0,
            spec.shard.offset if spec.shard else 0,
            objective.temperature,
            objective.parameter,
            objective.kd_weight,
            objective.ce_weight,
            student.softcap or 1.0,
            teacher.softcap or 1.0,
            student.scale,
            teacher.scale,
            V=vocab_size,
            BLOCK=min(MAX_BLOCK, triton.next_power_of_2(vocab_size)),
            DIVERGENCE=objective.divergence if has_teacher else "none",
            IS_MIXTURE=has_teacher and objective.divergence in MIXTURES,
            TEMPERED=objective.temperature != 1.0,
            STUDENT_FINISH=_finish_of(student),
            TEACHER_FINISH=_finish_of(teacher),
            FIRST=first_pass,
            LAST=last_pass,
            num_warps=NUM_WARPS,
        )


def _finish_of(model: Projection) -> int:
    """Which of scale and softcap follow the product, as the kernel's constant: bit 0 and bit 1."""
    return (model.scale != 1.0) + 2 * (model.softcap is not None)
