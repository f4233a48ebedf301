"""Projection: logits = softcap(scale * (hidden W^T + bias)), its backward, and the products both are made of.

Shapes: N rows, C rows of a chunk, V rows of the head or the shared vocabulary, H hidden size.

Precision: CUDA multiplies bf16 operands on tensor cores and can return the fp32 accumulator as it is
(out_dtype; with an fp32 `input` of addmm since torch 2.10, pytorch pull 167931), so operands stay bf16 there.
Other devices have no such kernel: operands are upcast, the head once per call at the cost of 4 * V * H bytes.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Projection:
    """The logits of one model before they are computed: hidden states, an lm_head, and what follows it.

    A model that divides its logits by s has scale = 1 / s; softcap(x) = softcap * tanh(x / softcap).
    """

    hidden_NH: Tensor
    weight_VH: Tensor
    bias_V: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0

    def select(self, row_index_N: Tensor, vocab_size: int) -> "Projection":
        """The given rows of hidden states (..., H) and the first `vocab_size` tokens of the head.

        Autograd gives whatever is left out a zero gradient.
        """
        weight_VH, bias_V = self.weight_VH, self.bias_V
        if vocab_size < weight_VH.shape[0]:  # slicing all of it would copy the head's gradient for nothing
            weight_VH, bias_V = weight_VH[:vocab_size], None if bias_V is None else bias_V[:vocab_size]
        hidden_NH = self.hidden_NH.reshape(-1, self.hidden_NH.shape[-1]).index_select(0, row_index_N)
        return replace(self, hidden_NH=hidden_NH, weight_VH=weight_VH, bias_V=bias_V)

    def with_operand_head(self, dtype: torch.dtype) -> "Projection":
        """The same with its head cast, once for all chunks, to what products accumulated in `dtype` take."""
        return replace(self, weight_VH=operand(self.weight_VH, dtype))


def logits_of(hidden_CH: Tensor, projection: Projection, dtype: torch.dtype) -> Tensor:
    """Return fresh logits (C, V) in `dtype`. Both factors are operands; not differentiable."""
    logits_CV = mm(hidden_CH, projection.weight_VH.T, dtype)
    if projection.bias_V is not None:
        logits_CV += projection.bias_V
    if projection.scale != 1.0:
        logits_CV *= projection.scale
    if projection.softcap is not None:
        logits_CV.div_(projection.softcap).tanh_().mul_(projection.softcap)
    return logits_CV


def softcap_slope(logits_CV: Tensor, projection: Projection) -> Tensor | None:
    """Return d softcap(x) / dx = 1 - tanh(x / cap)^2 = 1 - (logits / cap)^2, (C, V), or None without one."""
    if projection.softcap is None:
        return None
    return 1 - (logits_CV / projection.softcap).square_()


def logits_backward_(dlogits_CV: Tensor, slope_CV: Tensor | None, projection: Projection) -> Tensor:
    """Turn the gradient of the logits into that of hidden W^T + bias, in place."""
    if slope_CV is not None:
        dlogits_CV *= slope_CV
    if projection.scale != 1.0:
        dlogits_CV *= projection.scale
    return dlogits_CV


def operand(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor` in the dtype in which it enters a product that is accumulated in `dtype`."""
    stays_bf16 = tensor.is_cuda and tensor.dtype == torch.bfloat16 and dtype == torch.float32
    return tensor if stays_bf16 else tensor.to(dtype)


def mm(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a @ b, rounded once, to `dtype`."""
    if a.dtype == torch.bfloat16 and dtype == torch.float32:
        return torch.mm(a, b, out_dtype=dtype)
    return torch.mm(a, b).to(dtype)


def addmm_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, accumulated in the dtype of `total`."""
    if a.dtype == torch.bfloat16 and total.dtype == torch.float32:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        torch.addmm(total, a, b, out=total)
