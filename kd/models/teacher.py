"""The seam behind which a teacher stands: hidden states for a batch, and the head that turns them into logits.

ZeroTeacher computes them. A cached teacher (states of the full sequence serve every first-x % run) and a served one
offer the same two methods.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, Protocol

import torch

from kd.engine.zero3 import gathered
from kd.models.head import Head, backbone, head_of


class Teacher(Protocol):
    def hidden_states(self, input_ids_BL: torch.Tensor) -> torch.Tensor:
        """Last hidden states (B, L, Ht), without gradient. Every rank must call it."""

    def head(self) -> contextlib.AbstractContextManager[Head]:
        """The head, whole inside the context. Every rank must enter it."""


class ZeroTeacher:
    """A teacher in a ZeRO-3 engine of its own: weights partitioned over all ranks, no optimizer."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.model = engine.module.eval().requires_grad_(False)

    @torch.no_grad()
    def hidden_states(self, input_ids_BL: torch.Tensor) -> torch.Tensor:
        return backbone(self.model)(input_ids=input_ids_BL, use_cache=False).last_hidden_state

    @contextlib.contextmanager
    def head(self) -> Iterator[Head]:
        head = head_of(self.model)
        with gathered(head.weight_VH, head.bias_V):
            yield head
