"""The seam behind which a teacher stands: hidden states for a batch, and the head that turns them
into logits.

ZeroTeacher computes them. A cached teacher (states of the full sequence serve every first-x % run)
and a served one offer the same two methods.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from kd.engine.zero3 import gathered
from kd.losses import Head
from kd.models.head import backbone, head_of


class Teacher(Protocol):
    def hidden_states(self, input_ids_BL: torch.Tensor) -> torch.Tensor:
        """Last hidden states (B, L, Ht), without gradient. Every rank must call it."""

    def head(self) -> contextlib.AbstractContextManager[Head]:
        """The head, whole inside the context. Every rank must enter it."""


class TeacherModule(nn.Module):
    """What the teacher's engine wraps: its forward() is the backbone alone, so that the head is
    gathered apart.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)

    def forward(self, input_ids_BL: torch.Tensor) -> torch.Tensor:
        return backbone(self.model)(input_ids=input_ids_BL, use_cache=False).last_hidden_state


class ZeroTeacher:
    """A teacher in a ZeRO-3 engine of its own, around a TeacherModule: weights partitioned, no
    optimizer.
    """

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.model: PreTrainedModel = engine.module.model

    @torch.no_grad()
    def hidden_states(self, input_ids_BL: torch.Tensor) -> torch.Tensor:
        return self.engine(input_ids_BL)  # not its module: the engine's hooks know what to prefetch

    @contextlib.contextmanager
    def head(self) -> Iterator[Head]:
        head = head_of(self.model)
        with gathered(head.weight_VH, head.bias_V):
            yield head
