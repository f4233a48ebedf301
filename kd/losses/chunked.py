"""The loss over chunks of rows: what training calls. It holds one chunk's logits at a time, never
(N, V).

Values and gradients are computed together, while a chunk's logits are at hand, so that no product
is done
twice: 2 * N * V * (3 * Hs + Ht) FLOP, one Hs less for a frozen head. Backward multiplies by
    grad_output.

Beside the two models' chunks of logits (`kd.losses.chunk_plan`) there is a gradient of the size of
each input that requires one, and the head's once more in fp32, in which it is accumulated.

Shapes: M rows of hidden states, N of them supervised, C rows of the student's chunk and in
    teacher_rows of the
teacher's, V shared vocabulary or this rank's slice of it, H hidden size (Hs student, Ht teacher).
"""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kd.losses.chunk_plan import ChunkPlan
from kd.losses.heads import addmm_, gradient_view, logits_buffer, product
from kd.losses.inputs import Inputs
from kd.losses.row_functions import DIAGNOSTICS, RowFunction, Rows, RowSpec
from kd.losses.sharding import all_ranks_sum_

# of student hidden states, head weight and head bias; None where none is required
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


class RowValues(NamedTuple):
    """T^2 * divergence and cross-entropy of each row, unweighted, and DIAGNOSTICS where they are
    asked for.
    """

    kd_N: Tensor
    ce_N: Tensor
    diagnostics_N5: Tensor | None

    @classmethod
    def empty(cls, inputs: Inputs, *, diagnostics: bool = False) -> "RowValues":
        kd_N, ce_N = torch.empty_like(inputs.weights_N), torch.empty_like(inputs.weights_N)
        return cls(kd_N, ce_N, kd_N.new_empty(len(kd_N), len(DIAGNOSTICS)) if diagnostics else None)


class FillRows(Protocol):
    """Given the student's products of rows `chunk`, fill their values and, unless it is None,
    dlogits_CV.

    dlogits_CV is the gradient of the weighted sum of the rows in student_CV, whose storage it may
    share.
    """

    def __call__(self, chunk: slice, student_CV: Tensor, dlogits_CV: Tensor | None) -> None: ...


def fill_from_teacher(
    inputs: Inputs, row_function: RowFunction, plan: ChunkPlan, values: RowValues
) -> FillRows:
    """Return what fills `values` by `row_function` from the teacher's logits, a few rows at a
    time.
    """
    dtype, vocab_size = inputs.weights_N.dtype, inputs.vocab_size
    teacher = inputs.teacher and inputs.teacher.slice_head(vocab_size).with_operand_head(dtype)
    spec = RowSpec(inputs.objective, inputs.student.slice_head(vocab_size), teacher, inputs.shard)

    def fill(chunk: slice, student_CV: Tensor, dlogits_CV: Tensor | None) -> None:
        num_rows = student_CV.shape[0]
        step = plan.teacher_rows if teacher else num_rows
        buffer_CV = None
        if teacher is not None:
            buffer_CV = logits_buffer(teacher.weight_VH, min(step, num_rows), inputs.logits_dtype)
        for start in range(0, num_rows, step):
            part = slice(start, min(start + step, num_rows))
            index = slice(chunk.start + part.start, chunk.start + part.stop)
            teacher_CV = None
            if teacher is not None and buffer_CV is not None:
                teacher_CV = buffer_CV[: part.stop - part.start]
                product(
                    teacher.rows(inputs.row_index_N[index], dtype),
                    teacher.weight_VH.T,
                    out=teacher_CV,
                )
            rows = Rows(
                student_CV[part],
                teacher_CV,
                inputs.labels_N[index],
                inputs.weights_N[index],
                values.kd_N[index],
                values.ce_N[index],
                None if dlogits_CV is None else dlogits_CV[part],
                None if values.diagnostics_N5 is None else values.diagnostics_N5[index],
            )
            row_function(rows, spec)

    return fill


def chunked_loss(
    inputs: Inputs, fill: FillRows, values: RowValues, chunk_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (loss, kd, ce), scalars in the dtype of the row weights; only `loss` carries a
    gradient.

    `fill` fills `values`, of which they are the sums.
    """
    student, objective = inputs.student, inputs.objective
    learners = (student.hidden_MH, student.weight_VH, student.bias_V)
    needs_grad = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in learners]
    gradients = _gradients(inputs, fill, chunk_size, needs_grad)
    kd, ce = (values.kd_N * inputs.weights_N).sum(), (values.ce_N * inputs.weights_N).sum()
    loss = objective.kd_weight * kd + objective.ce_weight * ce
    if any(needs_grad):
        loss = _WithGradients.apply(loss, gradients, *learners)
    return loss, kd, ce


@torch.no_grad()
def _gradients(
    inputs: Inputs, fill: FillRows, chunk_size: int, needs_grad: list[bool]
) -> Gradients:
    """The chunk loop. Return the gradients of the loss for grad_output = 1: hidden states' in their
    own dtype, the head's in that of the sums."""
    num_rows, dtype = inputs.labels_N.shape[0], inputs.weights_N.dtype
    needs_hidden, needs_weight, needs_bias = needs_grad
    student = inputs.student.slice_head(inputs.vocab_size).with_operand_head(dtype)
    hidden_MH = inputs.student.hidden_MH
    # Unscaled, gradients of float16 would underflow.
    hidden_dtype = dtype if hidden_MH.dtype == torch.float16 else hidden_MH.dtype
    grad_hidden_MH = torch.zeros_like(hidden_MH, dtype=hidden_dtype) if needs_hidden else None
    grad_weight_VH = grad_bias_V = None
    if needs_weight:
        grad_weight_VH = _zeros_from(
            inputs.vocab_size if num_rows else 0, inputs.student.weight_VH, dtype
        )
    if needs_bias:
        grad_bias_V = inputs.weights_N.new_zeros(inputs.student.weight_VH.shape[0])
    buffer_CV = logits_buffer(student.weight_VH, min(chunk_size, num_rows), inputs.logits_dtype)

    for start in range(0, num_rows, chunk_size):
        chunk = slice(start, min(start + chunk_size, num_rows))
        index_C, student_CV = inputs.row_index_N[chunk], buffer_CV[: chunk.stop - start]
        hidden_CH = student.rows(index_C, dtype)
        product(hidden_CH, student.weight_VH.T, out=student_CV)
        dlogits_CV = gradient_view(student_CV, hidden_CH.dtype) if any(needs_grad) else None
        fill(chunk, student_CV, dlogits_CV)
        if dlogits_CV is None:
            continue
        dlogits_CV = dlogits_CV.to(
            hidden_CH.dtype
        )  # a copy where logits are narrower than the products' operands
        if grad_hidden_MH is not None:
            grad_CH = product(
                dlogits_CV, student.weight_VH, dtype=dtype if inputs.shard else hidden_dtype
            )
            grad_hidden_MH.index_copy_(
                0, index_C, all_ranks_sum_(grad_CH, inputs.shard).to(hidden_dtype)
            )
        if grad_weight_VH is not None:
            addmm_(
                grad_weight_VH[: inputs.vocab_size], dlogits_CV.T, hidden_CH, is_first=start == 0
            )
        if grad_bias_V is not None:
            grad_bias_V[: inputs.vocab_size] += dlogits_CV.sum(0, dtype=dtype)
    return grad_hidden_MH, grad_weight_VH, grad_bias_V


def _zeros_from(first_row: int, like_VH: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor like `like_VH` in `dtype`: zero from `first_row` on, uninitialised before."""
    tensor = torch.empty_like(like_VH, dtype=dtype, memory_format=torch.contiguous_format)
    tensor[first_row:].zero_()
    return tensor


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
