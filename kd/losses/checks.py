"""Checks of the loss's arguments: every refusal is a ValueError, or a TypeError for another type,
that names argument, value and remedy.

The host never reads values of tensors that are not on the CPU, since it would wait for the device:
there the same conditions are asynchronous assertions.

Shapes: ... any leading shape, N supervised rows, H hidden size, V rows of a head.
"""

import difflib
from fractions import Fraction
from numbers import Integral, Real

import torch
from torch import Tensor

from kd.losses.targets import Head

LOGITS_DTYPES = (torch.bfloat16, torch.float32, torch.float64)
HIDDEN_DTYPES = (torch.float16, *LOGITS_DTYPES)
FLOAT32 = torch.finfo(torch.float32)
# Probabilities of one row that are rounded to bfloat16 sum to a little more than 1.
MAX_SUM = 1.05
OPTIONAL = ("teacher_hidden", "teacher_head", "token_weights", "row_index")


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise a ValueError that names the nearest choice unless `value` is one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        nearest = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"{name}={value!r} is not one of {', '.join(choices)}; did you mean {nearest!r}?"
        )


def check_tensors(**tensors: Tensor | None) -> None:
    """Raise an error for an argument, given by its name, that is no dense tensor; some may be
    None.
    """
    for name, tensor in tensors.items():
        if tensor is None and (name in OPTIONAL or name.endswith("_bias")):
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"{name} is a {type(tensor).__module__}.{type(tensor).__qualname__}; pass a tensor "
                "(torch.as_tensor makes one)"
            )
        if tensor.layout != torch.strided:
            raise ValueError(f"{name} has the layout {tensor.layout}; pass {name}.to_dense()")


def check_number(name: str, value: object) -> None:
    """Raise a TypeError for what tensors are not multiplied by: a bool, a fraction, a tensor, a
    text.
    """
    if isinstance(value, bool | Fraction) or not isinstance(value, Real):
        raise TypeError(f"{name}={value!r} is a {type(value).__qualname__}; pass a float")


def check_positive(name: str, value: float, remedy: str) -> None:
    """Raise an error for a number that is not positive and finite, in float32 as well."""
    check_number(name, value)
    if not FLOAT32.tiny <= value <= FLOAT32.max:
        raise ValueError(f"{name}={value!r} must be positive and finite in float32; {remedy}")


def check_integer(name: str, value: int) -> None:
    """Raise an error for what is no integer of 64 bits; a bool is none."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}={value!r} is a {type(value).__qualname__}; pass an int")
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name}={value!r} must fit into 64 bits")


def check_model(side: str, hidden: Tensor, head: Head, labels: Tensor) -> None:
    """Raise a ValueError for shapes, dtypes, devices or numbers of one model that do not fit."""
    weight, bias = head.weight_VH, head.bias_V
    if hidden.dim() == 0 or hidden.shape[-1] == 0:
        raise ValueError(
            f"{side}_hidden is {_shape(hidden)}; its last dimension, the hidden size, must be at "
            "least 1"
        )
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
    if weight.shape[0] == 0:
        raise ValueError(f"{side}_head is {_shape(weight)}; it needs a row per token")
    if hidden.dtype not in HIDDEN_DTYPES or weight.dtype != hidden.dtype:
        raise ValueError(
            f"{side}_head is {weight.dtype} and {side}_hidden {hidden.dtype}; cast one, so that "
            f"both are of one of {HIDDEN_DTYPES}"
        )
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != weight.dtype):
        raise ValueError(
            f"{side}_bias is {bias.dtype} {_shape(bias)}; it must be {weight.dtype} "
            f"{_shape(weight[:, 0])}, like the rows of {side}_head"
        )
    _check_device(f"{side}_hidden", hidden, labels)
    _check_device(f"{side}_head", weight, labels)
    _check_device(f"{side}_bias", bias, labels)
    if head.softcap is not None:
        check_positive(f"{side}_softcap", head.softcap, "None is no cap")
    check_positive(f"{side}_scale", head.scale, "1.0 is no scale")


def check_size(name: str, size: int | None) -> None:
    """Raise an error for a size that is no integer, or below 1."""
    if size is None:
        return
    check_integer(name, size)
    if size < 1:
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
    if token_weights is not None and token_weights.is_complex():
        raise ValueError(f"token_weights is {token_weights.dtype}; pass real numbers")
    if row_index is not None and (row_index.dim() != 1 or row_index.dtype != torch.int64):
        raise ValueError(
            f"row_index is {row_index.dtype} {_shape(row_index)}; pass torch.int64 (N) indices of "
            "flat labels"
        )
    _check_device("token_weights", token_weights, labels)
    _check_device("row_index", row_index, labels)


def check_row_index(row_index_N: Tensor, num_labels: int) -> None:
    """Raise a ValueError for an index of no label, or of one twice; off the CPU assert it without
    waiting.
    """
    _check_all(
        (row_index_N >= 0) & (row_index_N < num_labels),
        f"row_index must lie in [0, {num_labels}), the number of labels; give indices of flat "
        "labels, without negative ones",
    )
    sorted_N = row_index_N.sort().values
    _check_all(sorted_N[1:] != sorted_N[:-1], "row_index holds an index twice; give each row once")


def check_weights(weights_N: Tensor) -> None:
    """Raise a ValueError for a weight of a supervised row that is negative or not finite; off the
    CPU assert it without waiting.
    """
    _check_all(
        (weights_N >= 0) & weights_N.isfinite(),
        f"token_weights of supervised rows must be at least 0 and finite in {weights_N.dtype}; 0 "
        "leaves a row out",
    )


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
    ids: Tensor,
    logprobs: Tensor,
    labels: Tensor,
    row_index_N: Tensor,
    vocab_size: int,
    tail: str,
) -> None:
    """Raise a ValueError for a teacher's K tokens that do not fit labels and vocabulary, of
    supervised rows only.
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
    sum_N = logprobs_NK.float().exp().sum(1)
    _check_all(
        sum_N <= MAX_SUM,
        "teacher_logprobs of a row have probabilities that sum to more than 1; take log_softmax "
        "of the teacher's whole vocabulary, at the loss's temperature",
    )
    if tail == "ignore":
        _check_all(
            sum_N > 0,
            "teacher_logprobs of a row are all -inf, and tail='ignore' drops the rest; leave the "
            "row out of labels and row_index",
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
