"""What a student learns from: a teacher's hidden states and head, its most likely tokens, tokens
drawn from it, or what a student's own head makes of its probabilities.

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


@dataclass(frozen=True)
class SampledTargets:
    """K tokens drawn from the teacher at each position, at the loss's temperature, with
    replacement, out of the vocab_size tokens that both models share: int64 ids (B, L, K), and its
    entropy in nats (B, L).
    """

    ids_BLK: Tensor
    entropy_BL: Tensor
    vocab_size: int


@dataclass(frozen=True)
class VectorTargets:
    """The teacher's probabilities times the student's head, at the loss's temperature (B, L, H of
    the student), times its bias (B, L), and their entropy in nats (B, L); over the vocab_size
    tokens that both models share.
    """

    vector_BLH: Tensor
    bias_BL: Tensor
    entropy_BL: Tensor
    vocab_size: int


Targets = DenseTargets | TopKTargets | SampledTargets | VectorTargets
