"""Examples -> one Batch of CPU tensors: padded to the right, labels shifted, supervised positions
listed and placed.

There is no attention mask. Attention is causal and padding stands to the right, so that no real
token ever sees a pad, and what pads compute is never supervised; without a mask, attention keeps
its fast path.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from kd.constants import IGNORE_INDEX
from kd.data.dataset import Example
from kd.data.regions import regions_of


@dataclass(frozen=True)
class Batch:
    """B sequences of L tokens; all tensors int64.

    labels are already shifted: labels[b, t] is the token that hidden state t predicts, or
    IGNORE_INDEX. row_index lists the supervised positions as flat indices into B * L, in rising
    order; region_index, aligned with it, tells where in its whole trace each predicted token stands
    (kd.data.regions).
    """

    input_ids: torch.Tensor  # (B, L)
    labels: torch.Tensor  # (B, L)
    row_index: torch.Tensor  # (num_supervised,)
    region_index: torch.Tensor  # (num_supervised,)
    num_input_tokens: int  # without padding
    ids: tuple[int, ...]  # dataset row of each sequence

    @property
    def num_supervised(self) -> int:
        return self.row_index.numel()

    def to(self, device: torch.device | str) -> "Batch":
        input_ids, labels, row_index, region_index = (
            tensor.to(device, non_blocking=True)
            for tensor in (self.input_ids, self.labels, self.row_index, self.region_index)
        )
        return replace(
            self, input_ids=input_ids, labels=labels, row_index=row_index, region_index=region_index
        )


def collate(examples: Sequence[Example], pad_token_id: int, pad_to_multiple_of: int = 1) -> Batch:
    """Pad examples to the longest, and further to a multiple of `pad_to_multiple_of`.

    No examples give a batch of padding without a supervised position, so that a rank with nothing
    to do still runs the model and takes part in every collective.
    """
    longest = max((len(example.input_ids) for example in examples), default=1)
    shape = (max(len(examples), 1), -(-longest // pad_to_multiple_of) * pad_to_multiple_of)
    input_ids = torch.full(shape, pad_token_id, dtype=torch.int64)
    labels = torch.full(shape, IGNORE_INDEX, dtype=torch.int64)
    regions = [np.empty(0, dtype=np.int64)]
    for i, example in enumerate(examples):
        length = len(example.input_ids)
        input_ids[i, :length] = torch.from_numpy(example.input_ids)
        labels[i, : length - 1] = torch.from_numpy(example.labels[1:])
        predicted = 1 + np.flatnonzero(example.labels[1:] != IGNORE_INDEX)
        regions.append(regions_of(example.read_start + predicted, example.num_tokens_3))
    return Batch(
        input_ids=input_ids,
        labels=labels,
        row_index=(labels.flatten() != IGNORE_INDEX).nonzero().squeeze(1),
        region_index=torch.from_numpy(np.concatenate(regions)),
        num_input_tokens=sum(len(example.input_ids) for example in examples),
        ids=tuple(example.row for example in examples),
    )
