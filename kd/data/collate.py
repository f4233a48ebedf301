"""Examples -> one Batch of CPU tensors: padded to the right or packed, labels shifted, supervised
positions listed and placed.

There is no attention mask. Attention is causal and padding is on the right, so no real token ever
sees a pad, and pads are never supervised; without a mask, attention keeps its fast path. Packed
sequences are separated by their positions, from which each attention makes the mask that it needs,
or by the offsets at which they begin.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kd.constants import IGNORE_INDEX
from kd.data.dataset import Example
from kd.data.regions import NUM_REGIONS, regions_of
from kd.data.step_plan import SequenceLayout


class Place(NamedTuple):
    """Which tokens of which trace a sequence holds."""

    row: int  # of the file or hub dataset, counted from 0
    read_start: int  # of the sequence's first token in the whole trace
    length: int  # tokens
    key: bytes = b""  # of the whole trace (kd.data.dataset)


@dataclass(frozen=True)
class Batch:
    """A micro-batch of B sequences, padded to L tokens, or packed into one row of L; all tensors
    int64.

    model_inputs is what kd.models.head.hidden_states gives to both backbones: input_ids (B, L), and
    in one row also where its sequences begin and end, cu_seq_lens (sequences + 1,) in int32, and
    max_length, the tokens of the longest; position_ids (1, L) when packed.
    labels are already shifted: labels[b, t] is the token that hidden state t predicts, or
    IGNORE_INDEX.
    row_index lists the supervised positions as flat indices into B * L, in rising order;
    region_index, aligned with it, says where in its whole trace each predicted token is
    (kd.data.regions).
    places has an entry for each sequence, and none for a batch of padding.
    """

    model_inputs: dict[str, Any]
    labels: Tensor  # (B, L)
    row_index: Tensor  # (num_supervised_tokens,)
    region_index: Tensor  # (num_supervised_tokens,)
    places: tuple[Place, ...]
    num_sources: int = 1  # of data.sources; region_index is source * NUM_REGIONS + region
    is_sampled: bool = False  # the responses are a model's, of kd.rollouts

    @property
    def input_ids(self) -> Tensor:
        input_ids: Tensor = self.model_inputs["input_ids"]
        return input_ids

    @property
    def starts(self) -> list[int]:
        """Where each sequence begins, as a flat index into B * L."""
        lengths = [place.length for place in self.places]
        if "position_ids" in self.model_inputs:
            return [0, *itertools.accumulate(lengths)][: len(lengths)]
        return [i * self.input_ids.shape[1] for i in range(len(lengths))]

    @property
    def num_input_tokens(self) -> int:
        """Tokens that the models read, not counting padding."""
        return sum(place.length for place in self.places)

    @property
    def num_supervised_tokens(self) -> int:
        return self.row_index.numel()

    def to(self, device: torch.device | str) -> "Batch":
        def move(value: Any) -> Any:
            return value.to(device, non_blocking=True) if torch.is_tensor(value) else value

        return replace(
            self,
            model_inputs={name: move(tensor) for name, tensor in self.model_inputs.items()},
            labels=move(self.labels),
            row_index=move(self.row_index),
            region_index=move(self.region_index),
        )


def collate(
    examples: Sequence[Example],
    pad_token_id: int,
    layout: SequenceLayout = "padded",
    num_sources: int = 1,
) -> Batch:
    """Pad examples to the longest, or pack them into one row, one behind the other.

    No examples give a batch of padding without a supervised position, so that a rank with nothing
    to do still runs the model and takes part in every collective.
    """
    lengths = [len(example.input_ids) for example in examples]
    longest = max(lengths, default=1)
    starts = [i * longest for i in range(len(examples))]
    shape = (max(len(examples), 1), longest)
    if layout == "packed":
        starts = [0, *np.cumsum(lengths[:-1]).tolist()] if examples else []
        shape = (1, max(sum(lengths), 1))
    # Flat: a sequence's place is where it starts
    input_ids = np.full(shape[0] * shape[1], pad_token_id, dtype=np.int64)
    labels = np.full_like(input_ids, IGNORE_INDEX)
    regions = [np.empty(0, dtype=np.int64)]
    for start, example in zip(starts, examples, strict=True):
        stop = start + len(example.input_ids)
        input_ids[start:stop] = example.input_ids
        labels[start : stop - 1] = example.labels[1:]
        predicted = 1 + np.flatnonzero(example.labels[1:] != IGNORE_INDEX)
        region_index = regions_of(example.read_start + predicted, example.num_tokens_3)
        regions.append(example.source * NUM_REGIONS + region_index)
    model_inputs = {"input_ids": torch.from_numpy(input_ids).view(shape)}
    if layout == "packed":
        positions = np.concatenate([np.arange(length) for length in lengths or [1]])
        model_inputs["position_ids"] = torch.from_numpy(positions)[None]
    if shape[0] == 1:
        model_inputs |= _where_sequences_begin(lengths or [1])
    return Batch(
        model_inputs,
        labels=torch.from_numpy(labels).view(shape),
        row_index=torch.from_numpy(np.flatnonzero(labels != IGNORE_INDEX)),
        region_index=torch.from_numpy(np.concatenate(regions)),
        places=tuple(Place(e.row, e.read_start, len(e.input_ids), e.key) for e in examples),
        num_sources=num_sources,
    )


def _where_sequences_begin(lengths: Sequence[int]) -> dict[str, Any]:
    """For attention that takes sequences of any length in one row, without a mask."""
    cu_seq_lens = np.cumsum([0, *lengths], dtype=np.int32)
    return {"cu_seq_lens": torch.from_numpy(cu_seq_lens), "max_length": max(lengths)}
