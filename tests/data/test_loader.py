from collections.abc import Callable

import numpy as np
import pytest
import torch
from tiny import layout_of
from transformers import PreTrainedTokenizerFast

from kd.data.collate import Batch
from kd.data.dataset import Examples, load_data
from kd.data.loader import Loader, validation_batches
from kd.data.step_plan import BatchShape
from kd.errors import UserError
from kd.recipe import Recipe

WORLDS = [1, 2, 4]


@pytest.fixture
def examples(recipe: Callable[..., Recipe], tiny: PreTrainedTokenizerFast) -> Examples:
    """20 examples of five lengths."""
    return load_data(recipe(), tiny).train


def make_loader(examples: Examples, seed: int = 0, micro_batch_size: int = 2) -> Loader:
    return Loader(examples, BatchShape(8, micro_batch_size), seed=seed, pad_token_id=0)


def ids(batches: list[Batch]) -> list[int]:
    return [place.row for batch in batches for place in batch.places]


def sequences(batches: list[Batch]) -> set[tuple[int, ...]]:
    return {tuple(row[row != 0].tolist()) for batch in batches for row in batch.input_ids}


@pytest.mark.parametrize("micro_batch_size", [1, 2])
@pytest.mark.parametrize("world_size", WORLDS)
def test_the_ranks_of_a_step_share_out_the_batch_of_a_single_process(
    examples: Examples, world_size: int, micro_batch_size: int
) -> None:
    loader = make_loader(examples, micro_batch_size=micro_batch_size)
    for step in range(5):
        whole = make_loader(examples, micro_batch_size=8).micro_batches(step, layout_of(0, 1))
        shares = [
            loader.micro_batches(step, layout_of(rank, world_size)) for rank in range(world_size)
        ]
        assert {len(share) for share in shares} == {8 // (micro_batch_size * world_size)}
        together = [batch for share in shares for batch in share]
        assert all(len(batch.places) == micro_batch_size for batch in together)
        assert sorted(ids(together)) == sorted(ids(whole))
        assert sequences(together) == sequences(whole)
        assert (
            sum(batch.num_supervised_tokens for batch in together) == whole[0].num_supervised_tokens
        )


def test_an_epoch_visits_no_example_twice_and_drops_the_partial_batch(examples: Examples) -> None:
    loader = make_loader(examples)
    assert loader.steps_per_epoch == 2
    epochs = [
        [row for step in steps for row in ids(loader.micro_batches(step, layout_of(0, 1)))]
        for steps in ((0, 1), (2, 3))
    ]
    assert all(len(epoch) == len(set(epoch)) == 16 for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_a_step_does_not_depend_on_those_before_it(examples: Examples) -> None:
    resumed = make_loader(examples).micro_batches(7, layout_of(1, 2))
    running = make_loader(examples)
    for step in range(7):
        running.micro_batches(step, layout_of(1, 2))
    for ours, theirs in zip(running.micro_batches(7, layout_of(1, 2)), resumed, strict=True):
        assert torch.equal(ours.input_ids, theirs.input_ids)
        assert torch.equal(ours.labels, theirs.labels)


def test_the_seed_sets_the_order(examples: Examples) -> None:
    orders = [
        ids(make_loader(examples, seed).micro_batches(0, layout_of(0, 1))) for seed in (0, 0, 1)
    ]
    assert orders[0] == orders[1]
    assert sorted(orders[0]) != sorted(orders[2])


def test_examples_that_run_side_by_side_are_about_equally_long(examples: Examples) -> None:
    lengths = [
        batch.input_ids.shape[1]
        for batch in make_loader(examples).micro_batches(0, layout_of(0, 1))
    ]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] > lengths[-1]


def test_fewer_examples_than_a_global_batch_are_the_users_error(examples: Examples) -> None:
    with pytest.raises(UserError, match=r"training\.global_batch_size = 8 needs .* there are 5"):
        make_loader(examples.select(np.arange(5)))


@pytest.mark.parametrize("num_examples", [1, 3, 7, 8, 20])
@pytest.mark.parametrize("world_size", WORLDS)
def test_validation_visits_all_once_in_as_many_batches_on_each_rank(
    examples: Examples, world_size: int, num_examples: int
) -> None:
    held_out = examples.select(np.arange(num_examples))
    shares = [
        list(validation_batches(held_out, BatchShape(8, 2), layout_of(rank, world_size), 0))
        for rank in range(world_size)
    ]
    assert len({len(share) for share in shares}) == 1
    expected = [held_out[i].row for i in range(num_examples)]
    assert sorted(row for share in shares for row in ids(share)) == sorted(expected)
    assert (
        sum(b.num_supervised_tokens for share in shares for b in share)
        == held_out.num_supervised_tokens.sum()
    )
