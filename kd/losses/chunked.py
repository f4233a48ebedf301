"""The loss over chunks of rows: what training calls. It holds one chunk's logits at a time, never
(N, V).

Values and gradients are computed together, while a chunk's logits are at hand, so that no product
is done twice: 2 * N * V * (3 * Hs + Ht) FLOP, one Hs less for a frozen head. Backward multiplies by
grad_output.

Beside the two models' chunks of logits (`kd.losses.chunk_plan`) there is a gradient of the size of
each input that requires one, and the head's once more in fp32, in which it is accumulated.

Shapes: M rows of hidden states, N of them supervised, C rows of the student's chunk, P of the
teacher's part of it, V shared vocabulary, H hidden size (Hs student, Ht teacher).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kd.losses.chunk_plan import ChunkPlan, even_parts
from kd.losses.heads import addmm_, gradient_view, logits_buffer, operand, product, shared_head
from kd.losses.inputs import DistillationLoss, Inputs, RowDiagnostics, sum_rows
from kd.losses.row_functions import RowChunk, RowFunction

# of student hidden states, head weight and head bias; None where none is required
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def chunked_loss(
    inputs: Inputs, plan: ChunkPlan, row_function: RowFunction, *, with_diagnostics: bool = False
) -> tuple[DistillationLoss, RowDiagnostics | None]:
    """Return the loss, the only result with a gradient, and diagnostics if they are asked for
    and there is a teacher.

    For each chunk of the student's rows: its logits; for each part of it the teacher's, from which
    `row_function` makes values and, in the place of the student's logits, dlogits; and what these
    add to the gradients, which are those of the loss for grad_output = 1.
    """
    student_MH, teacher_MH = inputs.student_hidden_MH, inputs.teacher_hidden_MH
    learners = (student_MH, inputs.student_head.weight_VH, inputs.student_head.bias_V)
    needs_grad = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in learners]
    vocab_size, dtype, num_rows = inputs.vocab_size, inputs.weights_N.dtype, len(inputs.labels_N)
    teacher, diagnostics_N5 = None, None
    with torch.no_grad():
        student = shared_head(inputs.student_head, vocab_size, dtype)
        if inputs.teacher_head is not None:
            teacher = shared_head(inputs.teacher_head, vocab_size, dtype)
        gradients = _gradient_buffers(inputs, needs_grad)
        grad_hidden_MH, grad_weight_VH, grad_bias_V = gradients
        kd_N, ce_N = torch.empty_like(inputs.weights_N), torch.empty_like(inputs.weights_N)
        if with_diagnostics and teacher is not None:
            diagnostics_N5 = kd_N.new_empty(num_rows, len(RowDiagnostics._fields))
        # One size for all long batches, whatever their parts: its memory is found again.
        num_buffered = min(plan.student_rows, num_rows)
        buffer_CV = logits_buffer(student.weight_VH, num_buffered, inputs.logits_dtype)

        for chunk in even_parts(num_rows, plan.student_rows):
            index_C, num_chunk = inputs.row_index_N[chunk], chunk.stop - chunk.start
            hidden_CH = operand(student_MH.index_select(0, index_C), dtype)
            student_CV = product(hidden_CH, student.weight_VH.T, out=buffer_CV[:num_chunk])
            dlogits_CV = gradient_view(student_CV, hidden_CH.dtype) if any(needs_grad) else None
            rows = RowChunk(
                student_CV=student_CV,
                teacher_CV=None,
                labels_C=inputs.labels_N[chunk],
                weights_C=inputs.weights_N[chunk],
                kd_C=kd_N[chunk],
                ce_C=ce_N[chunk],
                dlogits_CV=dlogits_CV,
                diagnostics_C5=None if diagnostics_N5 is None else diagnostics_N5[chunk],
                top_CK=None if inputs.top_NK is None else inputs.top_NK[chunk],
                log_p_CO=None if inputs.log_p_NO is None else inputs.log_p_NO[chunk],
            )
            if teacher is None or teacher_MH is None:
                row_function(rows, inputs.objective, student, None)
            else:
                num_part = min(plan.teacher_rows, num_chunk)
                teacher_CV = logits_buffer(teacher.weight_VH, num_part, inputs.logits_dtype)
                for part in even_parts(num_chunk, plan.teacher_rows):
                    hidden_PH = operand(teacher_MH.index_select(0, index_C[part]), dtype)
                    teacher_PV = teacher_CV[: part.stop - part.start]
                    product(hidden_PH, teacher.weight_VH.T, out=teacher_PV)
                    row_function(rows.part(part, teacher_PV), inputs.objective, student, teacher)
                del teacher_CV, teacher_PV  # their memory is free for the products below
            if dlogits_CV is None:
                continue
            # a copy where logits are narrower than the products' operands
            dlogits_CV = dlogits_CV.to(hidden_CH.dtype)
            if grad_hidden_MH is not None:
                grad_CH = product(dlogits_CV, student.weight_VH, dtype=grad_hidden_MH.dtype)
                grad_hidden_MH.index_copy_(0, index_C, grad_CH)
            if grad_weight_VH is not None:
                grad_VH, is_first = grad_weight_VH[:vocab_size], chunk.start == 0
                addmm_(grad_VH, dlogits_CV.T, hidden_CH, is_first=is_first)
            if grad_bias_V is not None:
                grad_bias_V[:vocab_size] += dlogits_CV.sum(0, dtype=dtype)

        result = sum_rows(inputs, kd_N, ce_N)
    if any(needs_grad):
        result = result._replace(loss=_WithGradients.apply(result.loss, gradients, *learners))
    return result, None if diagnostics_N5 is None else RowDiagnostics(*diagnostics_N5.unbind(1))


def _gradient_buffers(inputs: Inputs, needs_grad: list[bool]) -> Gradients:
    """Return what the chunks add to: the gradient of hidden states in their own dtype, those of the
    head in that of the sums, of which the first chunk overwrites the shared vocabulary.
    """
    needs_hidden, needs_weight, needs_bias = needs_grad
    hidden_MH, head, dtype = inputs.student_hidden_MH, inputs.student_head, inputs.weights_N.dtype
    grad_hidden_MH = grad_weight_VH = grad_bias_V = None
    if needs_hidden:
        # Unscaled, gradients of float16 would underflow.
        hidden_dtype = dtype if hidden_MH.dtype == torch.float16 else hidden_MH.dtype
        grad_hidden_MH = torch.zeros_like(hidden_MH, dtype=hidden_dtype)
    if needs_weight:
        grad_weight_VH = torch.empty_like(
            head.weight_VH, dtype=dtype, memory_format=torch.contiguous_format
        )
        grad_weight_VH[inputs.vocab_size if len(inputs.labels_N) else 0 :].zero_()
    if needs_bias:
        grad_bias_V = inputs.weights_N.new_zeros(head.weight_VH.shape[0])
    return grad_hidden_MH, grad_weight_VH, grad_bias_V


class _WithGradients(torch.autograd.Function):
    """A loss whose gradients are known: forward keeps them, the head's in fp32, and no input;
    backward scales them.
    """

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: Gradients, *learners: Tensor | None) -> Tensor:
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [None if learner is None else learner.dtype for learner in learners]
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        # In place, unless the graph is kept and backward may run again.
        overwrites = not torch._C._autograd._get_current_graph_task_keep_graph()
        pairs = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return (
            None,
            None,
            *(
                None if g is None else _scaled(g, grad_output, dtype, overwrites)
                for g, dtype in pairs
            ),
        )


def _scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype, overwrites: bool) -> Tensor:
    """Return gradient * factor in `dtype`. The factor, a loss scale perhaps, is never read by the
    host.
    """
    out = (
        gradient
        if overwrites and gradient.dtype == dtype
        else torch.empty_like(gradient, dtype=dtype)
    )
    # of one dimension, since a factor of none would be rounded to the gradient's dtype first
    return torch.mul(gradient, factor.reshape(1), out=out)
