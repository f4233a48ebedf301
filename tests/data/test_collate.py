from dataclasses import replace

import numpy as np
import torch

from kd.constants import IGNORE_INDEX
from kd.data.collate import collate
from kd.data.dataset import Example

PAD = 0


def example(length: int, row: int = 0) -> Example:
    labels = np.where(np.arange(length) % 3 == 1, 100 + np.arange(length), IGNORE_INDEX)
    return Example(
        np.arange(100, 100 + length), labels, row, np.array([length, 0, 0]), read_start=0
    )


def test_labels_are_what_each_position_predicts() -> None:
    examples = [example(5, row=7), example(12, row=3), example(1, row=9)]
    batch = collate(examples, PAD)
    assert batch.input_ids.shape == batch.labels.shape == (3, 12)
    assert [place[:3] for place in batch.places] == [(7, 0, 5), (3, 0, 12), (9, 0, 1)]
    assert batch.num_input_tokens == 18
    for b, e in enumerate(examples):
        length = len(e.input_ids)
        assert batch.input_ids[b, :length].tolist() == e.input_ids.tolist()
        assert (batch.input_ids[b, length:] == PAD).all()
        assert batch.labels[b, : length - 1].tolist() == e.labels[1:].tolist()
        assert (batch.labels[b, length - 1 :] == IGNORE_INDEX).all()


def test_the_row_index_lists_the_supervised_positions() -> None:
    batch = collate([example(5), example(12)], PAD)
    assert batch.num_supervised_tokens == 2 + 4
    assert batch.row_index.dtype == torch.int64
    mask = torch.zeros(batch.labels.numel(), dtype=torch.bool)
    mask[batch.row_index] = True
    assert torch.equal(mask.view_as(batch.labels), batch.labels != IGNORE_INDEX)
    # A supervised position predicts the next input token.
    following = batch.input_ids.roll(-1, dims=1).flatten()[batch.row_index]
    assert torch.equal(batch.labels.flatten()[batch.row_index], following)


def test_no_examples_give_padding_without_a_label() -> None:
    batch = collate([], PAD)
    assert batch.input_ids.tolist() == [[PAD]]
    assert batch.labels.tolist() == [[IGNORE_INDEX]]
    assert (batch.num_supervised_tokens, batch.num_input_tokens, batch.places) == (0, 0, ())
    assert (batch.region_index.shape, batch.region_index.dtype) == ((0,), torch.int64)


def test_a_batch_moves_as_a_whole() -> None:
    batch = collate([example(5)], PAD)
    moved = batch.to("meta")
    tensors = (moved.input_ids, moved.labels, moved.row_index, moved.region_index)
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert (moved.num_input_tokens, moved.places) == (batch.num_input_tokens, batch.places)


def test_a_place_tells_where_in_its_trace_a_sequence_begins() -> None:
    middle = replace(example(5, row=7), num_tokens_3=np.array([9, 2, 3]), read_start=6)
    (place,) = collate([middle], PAD).places
    assert (place.row, place.read_start, place.length) == (7, 6, 5)


def test_the_models_get_what_model_inputs_name_and_nothing_else() -> None:
    batch = collate([example(5), example(12)], PAD)
    assert batch.model_inputs.keys() == {"input_ids"}
    assert batch.input_ids is batch.model_inputs["input_ids"]
    row = collate([example(5)], PAD).model_inputs
    assert row.keys() == {"input_ids", "cu_seq_lens", "max_length"}
