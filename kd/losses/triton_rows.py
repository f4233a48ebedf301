"""triton_rows: the `RowFunction` as one launch of a Triton kernel; the twin of `torch_rows`.

Shapes: C rows of a chunk, V shared vocabulary.
"""

import torch
import triton

from kd.losses.divergences import Objective
from kd.losses.row_functions import RowChunk
from kd.losses.targets import Head
from kd.losses.triton_kernel import row_kernel

# With twice as many columns, registers for diagnostics leave room for fewer rows at a time.
MAX_BLOCK = 1024
NUM_WARPS = 8
# With 64 registers a thread, four rows of NUM_WARPS run on a multiprocessor at a time, not three.
KL_REGISTERS = 64


def triton_rows(rows: RowChunk, objective: Objective, student: Head, teacher: Head | None) -> None:
    """The `RowFunction` on CUDA; under TRITON_INTERPRET=1 on the CPU, for tests."""
    num_rows, vocab_size = rows.student_CV.shape
    if num_rows == 0:
        return
    dlogits_CV, has_teacher = rows.dlogits_CV, rows.teacher_CV is not None
    other = teacher or student  # its numbers are compiled in, and without a teacher not read
    # Triton launches on the current device, whatever the tensors'.
    with torch.cuda.device_of(rows.student_CV):
        row_kernel[(num_rows,)](
            rows.student_CV,
            rows.teacher_CV,
            student.bias_V,
            other.bias_V if has_teacher else None,
            rows.labels_C,
            rows.weights_C,
            rows.kd_C,
            rows.ce_C,
            dlogits_CV,
            rows.diagnostics_C5,
            rows.student_CV.stride(0),
            rows.teacher_CV.stride(0) if rows.teacher_CV is not None else 0,
            dlogits_CV.stride(0) if dlogits_CV is not None else 0,
            objective.temperature,
            objective.parameter,
            objective.kd_weight,
            objective.ce_weight,
            student.softcap or 1.0,
            other.softcap or 1.0,
            student.scale,
            other.scale,
            V=vocab_size,
            BLOCK=min(MAX_BLOCK, triton.next_power_of_2(vocab_size)),
            DIVERGENCE=objective.divergence if has_teacher else "none",
            IS_MIXTURE=has_teacher and objective.spec.is_mixture,
            TEMPERED=objective.temperature != 1.0,
            STUDENT_FINISH=_finish_of(student),
            TEACHER_FINISH=_finish_of(other),
            num_warps=NUM_WARPS,
            maxnreg=_max_registers(rows, objective, student, other),
        )


def _finish_of(head: Head) -> int:
    """Which of scale and softcap follow the product, as the kernel's constant: bit 0 and bit 1."""
    return (head.scale != 1.0) + 2 * (head.softcap is not None)


def _max_registers(
    rows: RowChunk, objective: Objective, student: Head, teacher: Head
) -> int | None:
    """A limit where the compiler, left alone, takes more registers and with it spills none: a KL
    with diagnostics at T = 1, of logits as the products leave them. Others take fewer, or spill.
    """
    needs_fewer = rows.diagnostics_C5 is None or objective.spec.is_mixture
    is_finished = any(_finish_of(head) or head.bias_V is not None for head in (student, teacher))
    if needs_fewer or is_finished or objective.temperature != 1.0:
        return None
    return KL_REGISTERS
