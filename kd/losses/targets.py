"""What a student learns from: a teacher's hidden states and head, or its most likely tokens.

Shapes: B sequences, L tokens of each, V rows of a head, H hidden size, K tokens of the teacher.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor


class Head(NamedTuple):
    """An lm_head and what follows it: softcap(scale * (hidden W^T + bias))."""

    weight_VH: Tensor
    bias_V: Tensor | None
    softcap: float | None
    scale: float


@dataclass(frozen=True)
class DenseTargets:
    """The teacher's last hidden states (B, L, H), without gradient, and its head, whole."""

    hidden_BLH: Tensor
    head: Head


@dataclass(frozen=True)
class TopKTargets:
    """The teacher's K most likely tokens at each position: int64 ids (B, L, K), and their
    log-probabilities at the loss's temperature, of its whole vocabulary.

    tail: what becomes of the mass of all other tokens (kd.losses.sparse).
    """

    ids_BLK: Tensor
    logprobs_BLK: Tensor
    tail: Literal["bucket", "ignore"] = "bucket"


Targets = DenseTargets | TopKTargets
