"""Logits = softcap(scale * (hidden W^T + bias)), and the products that chunks of them are made of.

A model that divides its logits by s has scale = 1 / s; softcap(x) = cap * tanh(x / cap).

Shapes: C rows of a chunk, V rows of the head or the shared vocabulary, H hidden size.

Precision: CUDA multiplies bf16 operands on tensor cores and can return the fp32 accumulator as it
is (out_dtype; with an fp32 `input` of addmm since torch 2.10, pytorch pull 167931), so operands
stay bf16 there. Other devices have no such kernel: operands are upcast, the head once per call at
the cost of 4 * V * H bytes.
"""

import torch
from torch import Tensor

from kd.losses.targets import Head

ALIGNED_COLUMNS = 16


def shared_head(head: Head, vocab_size: int, dtype: torch.dtype | None = None) -> Head:
    """Return the head of the first `vocab_size` tokens, its bias contiguous, as kernels read it.

    With a dtype its weight is cast, once for all chunks, to what products accumulated in that dtype
    take.
    """
    weight_VH, bias_V = head.weight_VH[:vocab_size], head.bias_V
    return head._replace(
        weight_VH=weight_VH if dtype is None else operand(weight_VH, dtype),
        bias_V=None if bias_V is None else bias_V[:vocab_size].contiguous(),
    )


def logits_buffer(weight_VH: Tensor, num_rows: int, dtype: torch.dtype) -> Tensor:
    """Return an uninitialised (num_rows, V); on CUDA each row begins where fast kernels want it."""
    vocab_size = weight_VH.shape[0]
    num_columns = vocab_size + (-vocab_size % ALIGNED_COLUMNS if weight_VH.is_cuda else 0)
    return weight_VH.new_empty((num_rows, num_columns), dtype=dtype)[:, :vocab_size]


def gradient_view(logits_CV: Tensor, dtype: torch.dtype) -> Tensor:
    """Return (C, V) on the storage of a logits_buffer, for a gradient whose products take operands
    in `dtype`.

    It is each row's second half where that holds `dtype`, else the logits themselves.

    A row written from its end to its start then never overwrites a logit not yet read: in a row of
    D columns of 4 bytes, gradient v begins at byte 2 * D + 2 * v >= 4 * v, where logit v does or
    behind it.
    """
    if dtype.itemsize >= logits_CV.dtype.itemsize:
        return logits_CV
    num_rows, num_columns = logits_CV.shape[0], logits_CV.stride(0)
    whole = logits_CV.as_strided((num_rows, num_columns), (num_columns, 1)).view(dtype)
    return whole[:, num_columns : num_columns + logits_CV.shape[1]]


def finish_logits(logits_CV: Tensor, head: Head, dtype: torch.dtype) -> Tensor:
    """Turn hidden W^T, where possible in place, into softcap(scale * (hidden W^T + bias)) in
    `dtype`.
    """
    logits_CV = logits_CV.to(dtype)
    if head.bias_V is not None:
        logits_CV += head.bias_V
    if head.scale != 1.0:
        logits_CV *= head.scale
    if head.softcap is not None:
        logits_CV.div_(head.softcap).tanh_().mul_(head.softcap)
    return logits_CV


def logits_backward_(dlogits_CV: Tensor, logits_CV: Tensor, head: Head) -> Tensor:
    """Turn the gradient of finished logits into that of hidden W^T, in place; the logits are
    overwritten.
    """
    if head.softcap is not None:
        # d softcap(x) / dx = 1 - tanh(x / cap)^2 = 1 - (logits / cap)^2
        dlogits_CV *= logits_CV.div_(head.softcap).square_().neg_().add_(1)
    if head.scale != 1.0:
        dlogits_CV *= head.scale
    return dlogits_CV


def operand(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor` in the dtype in which it enters a product that is accumulated in `dtype`."""
    stays_bf16 = tensor.is_cuda and tensor.dtype == torch.bfloat16 and dtype == torch.float32
    return tensor if stays_bf16 else tensor.to(dtype)


def product(
    a: Tensor, b: Tensor, *, dtype: torch.dtype | None = None, out: Tensor | None = None
) -> Tensor:
    """Return a @ b, rounded once, in `dtype` or into `out`."""
    dtype = out.dtype if out is not None else dtype
    if a.dtype == dtype:
        return torch.mm(a, b, out=out)
    if a.dtype == torch.bfloat16 and dtype == torch.float32:
        return (
            torch.mm(a, b, out_dtype=dtype, out=out)
            if out is not None
            else torch.mm(a, b, out_dtype=dtype)
        )
    narrowed = torch.mm(a, b)
    return out.copy_(narrowed) if out is not None else narrowed.to(dtype)


def addmm_(total: Tensor, a: Tensor, b: Tensor, *, is_first: bool) -> None:
    """total += a @ b, or total = a @ b if `is_first`, accumulated in the dtype of `total`."""
    beta = 0.0 if is_first else 1.0  # at 0 whatever is in `total` is not read
    if a.dtype == torch.bfloat16 and total.dtype == torch.float32:
        torch.addmm(total, a, b, beta=beta, out_dtype=total.dtype, out=total)
    else:
        torch.addmm(total, a, b, beta=beta, out=total)
