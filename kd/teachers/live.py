"""A teacher that computes its hidden states, in a ZeRO-3 engine of its own."""

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from kd.data.collate import Batch
from kd.engine.engine import Engine
from kd.engine.zero3 import gathered
from kd.losses import DenseTargets
from kd.models.head import backbone, head_of
from kd.models.probe import Probed


class TeacherModule(nn.Module):
    """What the teacher's engine wraps: its forward() is the backbone only, so that the head is
    gathered apart.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)

    def forward(self, **model_inputs: Tensor) -> Tensor:
        return backbone(self.model)(**model_inputs, use_cache=False).last_hidden_state


class LiveTeacher:
    """A Teacher whose engine wraps a TeacherModule: weights partitioned, no optimizer."""

    def __init__(self, model: PreTrainedModel, engine: Engine) -> None:
        self.model = model
        self.engine = engine

    @contextlib.contextmanager
    def targets(self, batch: Batch) -> Iterator[DenseTargets]:
        hidden_BLH = self.hidden_states(**batch.model_inputs)
        head = head_of(self.model)
        with gathered(head.weight_VH, head.bias_V):
            yield DenseTargets(hidden_BLH, head)

    def probe(self, input_ids_BL: Tensor) -> Probed:
        """For verify_weights. Collective: every rank must call this.

        The head is gathered apart, as for targets(): the engine fetches ahead what once followed.
        """
        hidden_BLH, head = self.hidden_states(input_ids=input_ids_BL), head_of(self.model)
        with gathered(head.weight_VH, head.bias_V):
            return Probed(hidden_BLH, F.linear(hidden_BLH, head.weight_VH, head.bias_V))

    @torch.no_grad()
    def hidden_states(self, **model_inputs: Tensor) -> Tensor:
        """Last hidden states (B, L, H). Collective: every rank must call this."""
        return self.engine(**model_inputs)  # not its module: its hooks know what to prefetch
