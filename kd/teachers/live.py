"""Teachers that compute their hidden states: whole on each device, or in a ZeRO-3 engine."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from kd.data.collate import Batch
from kd.engine.engine import Engine
from kd.engine.generate import generating
from kd.engine.zero3 import gathered
from kd.losses import DenseTargets, Head
from kd.models.head import head_of, hidden_states
from kd.models.probe import Probed


class TeacherModule(nn.Module):
    """What runs, and what the teacher's engine wraps: the backbone only; not the head."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)

    def forward(self, **model_inputs: Any) -> Tensor:
        return hidden_states(self.model, model_inputs)


class LiveTeacher:
    """A Teacher whose weights are on this device: whole, a plain module, or its shard of them, in
    an engine.

    Its head is frozen and read in every micro-batch: of a partitioned one a whole copy is kept,
    made when the head is first wanted.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        run: TeacherModule | Engine,
        *,
        keeps_packed_apart: bool = True,
    ) -> None:
        """run: a TeacherModule of the model, or an engine around one."""
        self.model = model
        self.keeps_packed_apart = keeps_packed_apart
        self._run = run
        self._head: Head | None = None

    @property
    def weights(self) -> list[Tensor]:
        """What this rank holds of the teacher: all of it, or its shards."""
        return list(self.model.parameters())

    @property
    def head(self) -> Head:
        """Whole. Collective the first time: every rank must ask for it."""
        if self._head is None:
            head = head_of(self.model)
            with gathered(head.weight_VH, head.bias_V):
                is_whole = not hasattr(head.weight_VH, "ds_id")
                self._head = head if is_whole else _copy_of(head)
        return self._head

    @contextlib.contextmanager
    def targets(self, batch: Batch) -> Iterator[DenseTargets]:
        yield DenseTargets(self.hidden_states(**batch.model_inputs), self.head)

    @torch.no_grad()
    def probe(self, input_ids_BL: Tensor) -> Probed:
        """For verify_weights. Collective: every rank must call this."""
        hidden_BLH = self.hidden_states(input_ids=input_ids_BL)
        return Probed(hidden_BLH, F.linear(hidden_BLH, self.head.weight_VH, self.head.bias_V))

    def generating(
        self, *, whole: bool
    ) -> contextlib.AbstractContextManager[tuple[PreTrainedModel, bool]]:
        """As Student.generating. Collective: every rank must enter it."""
        engine = None if isinstance(self._run, TeacherModule) else self._run
        return generating(self.model, engine, whole=whole)

    @torch.no_grad()
    def hidden_states(self, **model_inputs: Any) -> Tensor:
        """Last hidden states (B, L, H). Collective: every rank must call this."""
        return self._run(**model_inputs)  # of an engine not its module: its hooks prefetch


def _copy_of(head: Head) -> Head:
    bias_V = None if head.bias_V is None else head.bias_V.detach().clone()
    return head._replace(weight_VH=head.weight_VH.detach().clone(), bias_V=bias_V)
