"""The loss over chunks of rows: what training calls. It holds one chunk's logits at a time, never (N, V).

Values and gradients are computed together, while a chunk's logits are at hand, so that no product is done
twice: 2 * N * V * (3 * Hs + Ht) FLOP, one Hs less for a frozen head. Backward multiplies by grad_output.

Beside the chunk there is a gradient of the size of each input that requires one, and the head's once more in
fp32, in which it is accumulated.

Shapes: N supervised rows, C rows of a chunk, V shared vocabulary, H hidden size (Hs student, Ht teacher).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kd.losses.heads import addmm_, logits_backward_, logits_of, mm, operand, softcap_slope
from kd.losses.inputs import Inputs
from kd.losses.rows import RowFunction

LOGITS_BUDGET_BYTES = 2 * 2**30

# of student hidden states, head weight and head bias; None where none is required
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def chunk_rows(num_rows: int, row_bytes: int, budget_bytes: int = LOGITS_BUDGET_BYTES) -> int:
    """Return how many of `num_rows` rows, whose logits take `row_bytes` each, one chunk holds: at least 1."""
    return max(1, min(num_rows, budget_bytes // row_bytes))


def chunked_loss(inputs: Inputs, rows: RowFunction, chunk_size: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return (loss, kd, ce), scalars in the dtype of the row weights; only `loss` carries a gradient.

    A `chunk_size` of None is as many rows as `LOGITS_BUDGET_BYTES` of logits, all models together, hold.
    """
    student = inputs.student
    if chunk_size is None:
        num_buffers = 1 + (inputs.teacher is not None) + (student.softcap is not None)
        row_bytes = num_buffers * student.weight_VH.shape[0] * inputs.logits_dtype.itemsize
        chunk_size = chunk_rows(inputs.labels_N.shape[0], row_bytes)
    wanted = (student.hidden_NH, student.weight_VH, student.bias_V)
    needs_grad = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in wanted]
    kd, ce, gradients = _values_and_gradients(inputs, rows, chunk_size, needs_grad)
    loss = inputs.objective.kd_weight * kd + inputs.objective.ce_weight * ce
    if any(needs_grad):
        loss = _WithGradients.apply(loss, gradients, *wanted)
    return loss, kd, ce


@torch.no_grad()
def _values_and_gradients(
    inputs: Inputs, rows: RowFunction, chunk_size: int, needs_grad: list[bool]
) -> tuple[Tensor, Tensor, Gradients]:
    """The chunk loop: kd, ce, and the gradients of the loss for grad_output = 1."""
    labels_N, weights_N, dtype = inputs.labels_N, inputs.weights_N, inputs.weights_N.dtype
    student, teacher = inputs.student.with_operand_head(dtype), inputs.teacher
    teacher = None if teacher is None else teacher.with_operand_head(dtype)
    kd, ce = weights_N.new_zeros(()), weights_N.new_zeros(())
    needs_hidden, needs_weight, needs_bias = needs_grad
    grad_hidden_NH = torch.empty_like(student.hidden_NH) if needs_hidden else None
    grad_weight_VH = weights_N.new_zeros(student.weight_VH.shape) if needs_weight else None
    grad_bias_V = weights_N.new_zeros(student.weight_VH.shape[0]) if needs_bias else None

    for start in range(0, labels_N.shape[0], chunk_size):
        chunk = slice(start, start + chunk_size)
        weights_C = weights_N[chunk]
        hidden_CH = operand(student.hidden_NH[chunk], dtype)
        logits_CV = logits_of(hidden_CH, student, inputs.logits_dtype)
        slope_CV = softcap_slope(logits_CV, student) if any(needs_grad) else None
        teacher_logits_CV = None
        if teacher is not None:
            teacher_hidden_CH = operand(teacher.hidden_NH[chunk], dtype)
            teacher_logits_CV = logits_of(teacher_hidden_CH, teacher, inputs.logits_dtype)

        kd_C, ce_C, dlogits_CV = rows(
            logits_CV, teacher_logits_CV, labels_N[chunk], weights_C, inputs.objective, any(needs_grad)
        )
        del logits_CV, teacher_logits_CV  # room for the products
        kd += (kd_C * weights_C).sum()
        ce += (ce_C * weights_C).sum()
        if dlogits_CV is not None:
            dlogits_CV = logits_backward_(dlogits_CV, slope_CV, student)
            if grad_bias_V is not None:
                grad_bias_V += dlogits_CV.sum(0, dtype=dtype)
            dlogits_CV = dlogits_CV.to(student.weight_VH.dtype)
            if grad_hidden_NH is not None:
                grad_hidden_NH[chunk] = mm(dlogits_CV, student.weight_VH, grad_hidden_NH.dtype)
            if grad_weight_VH is not None:
                addmm_(grad_weight_VH, dlogits_CV.T, hidden_CH)
        del dlogits_CV, slope_CV  # or they live on beside the next chunk's

    head_dtype = inputs.student.weight_VH.dtype
    grad_weight_VH = None if grad_weight_VH is None else grad_weight_VH.to(head_dtype)
    grad_bias_V = None if grad_bias_V is None else grad_bias_V.to(head_dtype)
    return kd, ce, (grad_hidden_NH, grad_weight_VH, grad_bias_V)


class _WithGradients(torch.autograd.Function):
    """A loss whose gradients are known: forward keeps them and no input, backward scales them."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: Gradients, *inputs: Tensor | None) -> Tensor:
        ctx.save_for_backward(*gradients)
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        # on the device and out of place: grad_output is a loss scale, and backward may run again
        gradients = ctx.saved_tensors
        return None, None, *(None if gradient is None else gradient * grad_output for gradient in gradients)
