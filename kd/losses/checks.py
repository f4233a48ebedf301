"""Checks of the loss's arguments: every refusal is a ValueError that names argument, value and
remedy.

Shapes: ... any leading shape, N supervised rows, H hidden size, V rows of a head.
"""

import difflib
import math

import torch
from torch import Tensor

from kd.losses.targets import Head

LOGITS_DTYPES = (torch.bfloat16, torch.float32, torch.float64)


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise a ValueError that names the nearest choice unless `value` is one of `choices`."""
    if value not in choices:
        nearest = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"{name}={value!r} is not one of {', '.join(choices)}; did you mean {nearest!r}?"
        )


def check_model(side: str, hidden: Tensor, head: Head, labels: Tensor) -> None:
    """Raise a ValueError for shapes, dtypes, devices or numbers of one model that do not fit."""
    weight, bias = head.weight_VH, head.bias_V
    if hidden.shape[:-1] != labels.shape:
        raise ValueError(
            f"{side}_hidden is {_shape(hidden)} and labels {_shape(labels)}; labels must have the "
            "shape of the hidden states without their last dimension"
        )
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{side}_head is {_shape(weight)} and {side}_hidden {_shape(hidden)}; the head must be "
            f"(vocabulary, {hidden.shape[-1]}), gathered if it is sharded"
        )
    if not hidden.is_floating_point() or weight.dtype != hidden.dtype:
        raise ValueError(
            f"{side}_head is {weight.dtype} and {side}_hidden {hidden.dtype}; cast one, so that "
            "both are of the same floating dtype"
        )
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != weight.dtype):
        raise ValueError(
            f"{side}_bias is {bias.dtype} {_shape(bias)}; it must be {weight.dtype} "
            f"{_shape(weight[:, 0])}, like the rows of {side}_head"
        )
    _check_device(f"{side}_hidden", hidden, labels)
    _check_device(f"{side}_head", weight, labels)
    _check_device(f"{side}_bias", bias, labels)
    if head.softcap is not None and not 0 < head.softcap < math.inf:
        raise ValueError(
            f"{side}_softcap={head.softcap!r} must be positive and finite; None is no cap"
        )
    if not 0 < head.scale < math.inf:
        raise ValueError(
            f"{side}_scale={head.scale!r} must be positive and finite; 1.0 is no scale"
        )


def check_size(name: str, size: int | None) -> None:
    """Raise a ValueError for a size below 1."""
    if size is not None and size < 1:
        raise ValueError(f"{name}={size!r} must be at least 1; None chooses it")


def check_logits_dtype(logits_dtype: torch.dtype | None) -> None:
    """Raise a ValueError for a dtype in which logits are not stored."""
    if logits_dtype is not None and logits_dtype not in LOGITS_DTYPES:
        raise ValueError(
            f"logits_dtype={logits_dtype!r} must be one of {LOGITS_DTYPES}; None chooses it"
        )


def check_rows(labels: Tensor, token_weights: Tensor | None, row_index: Tensor | None) -> None:
    """Raise a ValueError for labels, weights or an index that do not fit one another."""
    if labels.dtype != torch.int64:
        raise ValueError(f"labels are {labels.dtype}; cast them to torch.int64")
    if token_weights is not None and token_weights.shape != labels.shape:
        raise ValueError(
            f"token_weights is {_shape(token_weights)} and labels {_shape(labels)}; give one "
            "weight per label"
        )
    if row_index is not None and (row_index.dim() != 1 or row_index.dtype != torch.int64):
        raise ValueError(
            f"row_index is {row_index.dtype} {_shape(row_index)}; give torch.int64 (N) indices of "
            "flat labels"
        )
    _check_device("token_weights", token_weights, labels)
    _check_device("row_index", row_index, labels)


def check_labels(labels_N: Tensor, vocab_size: int) -> None:
    """Raise a ValueError for a label outside the shared vocabulary; off the CPU assert it without
    waiting.
    """
    inside = ((labels_N >= 0) & (labels_N < vocab_size)).all()
    if not labels_N.is_cpu:
        torch._assert_async(inside, f"labels of supervised rows must lie in [0, {vocab_size})")
    elif not inside:
        raise ValueError(
            f"labels of supervised rows span [{labels_N.min()}, {labels_N.max()}], the shared "
            f"vocabulary [0, {vocab_size}); set others to ignore_index, and leave their rows out "
            "of row_index"
        )


def check_top_k(
    ids: Tensor, logprobs: Tensor, labels: Tensor, row_index_N: Tensor, vocab_size: int
) -> None:
    """Raise a ValueError for a teacher's K tokens that do not fit labels and vocabulary, of
    supervised rows alone.
    """
    if (
        ids.shape[:-1] != labels.shape
        or ids.dim() == labels.dim()
        or ids.shape[-1] == 0
        or ids.dtype != torch.int64
    ):
        raise ValueError(
            f"teacher_ids is {ids.dtype} {_shape(ids)} and labels {_shape(labels)}; give "
            "torch.int64, the shape of labels with a last dimension of K >= 1 tokens"
        )
    if logprobs.shape != ids.shape or not logprobs.is_floating_point():
        raise ValueError(
            f"teacher_logprobs is {logprobs.dtype} {_shape(logprobs)} and teacher_ids "
            f"{_shape(ids)}; give one floating log-probability per id"
        )
    _check_device("teacher_ids", ids, labels)
    _check_device("teacher_logprobs", logprobs, labels)
    ids_NK, logprobs_NK = (
        tensor.reshape(-1, ids.shape[-1])[row_index_N] for tensor in (ids, logprobs)
    )
    sorted_NK = ids_NK.sort(dim=1).values
    _check_all(
        (ids_NK >= 0) & (ids_NK < vocab_size),
        f"teacher_ids must lie in [0, {vocab_size}); leave others out",
    )
    _check_all(
        sorted_NK[:, 1:] != sorted_NK[:, :-1],
        "teacher_ids of a row must be distinct; fill K with any other ids and a log-probability of "
        "-inf",
    )
    _check_all(
        logprobs_NK <= 1e-3,
        "teacher_logprobs must be log-probabilities, at most 0 and not NaN; take log_softmax",
    )


def _check_all(holds: Tensor, message: str) -> None:
    """Raise a ValueError unless all of `holds` is true; off the CPU assert it without waiting."""
    if not holds.is_cpu:
        torch._assert_async(holds.all(), message)
    elif not holds.all():
        raise ValueError(message)


def _check_device(name: str, tensor: Tensor | None, labels: Tensor) -> None:
    if tensor is not None and tensor.device != labels.device:
        raise ValueError(
            f"{name} is on {tensor.device} and labels on {labels.device}; move one of them"
        )


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))
