"""plan_step() for any lengths, batch and number of ranks."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kd.data.loader import plan_step


@st.composite
def settings(draw):
    micro, ranks, accumulation = (draw(st.integers(1, 4)) for _ in range(3))
    global_batch_size = micro * ranks * accumulation
    num_examples = draw(st.integers(global_batch_size, 3 * global_batch_size + 2))
    lengths = draw(st.lists(st.integers(1, 50), min_size=num_examples, max_size=num_examples))
    options = {
        "seed": draw(st.integers(0, 2**31)),
        "global_batch_size": global_batch_size,
        "micro_batch_size": micro,
        "data_parallel_size": ranks,
    }
    return draw(st.integers(0, 20)), np.array(lengths), options


def indices(plan):
    return [int(i) for rank in plan.micro_batches for micro in rank for i in micro]


@given(settings())
def test_ranks_have_as_many_micro_batches_of_the_size_that_was_asked_for(case):
    step, lengths, options = case
    plan = plan_step(step, lengths, **options)
    assert len(plan.micro_batches) == options["data_parallel_size"]
    per_rank = options["global_batch_size"] // (
        options["data_parallel_size"] * options["micro_batch_size"]
    )
    assert {len(rank) for rank in plan.micro_batches} == {per_rank}
    sizes = {len(micro) for rank in plan.micro_batches for micro in rank}
    assert sizes == {options["micro_batch_size"]}


@given(settings())
def test_the_global_batch_does_not_depend_on_ranks_and_micro_batches(case):
    step, lengths, options = case
    alone = {"data_parallel_size": 1, "micro_batch_size": options["global_batch_size"]}
    whole = indices(plan_step(step, lengths, **options | alone))
    assert sorted(indices(plan_step(step, lengths, **options))) == sorted(whole)
    assert len(set(whole)) == len(whole) == options["global_batch_size"]


@given(settings())
def test_an_epoch_visits_no_example_twice(case):
    _, lengths, options = case
    steps = range(len(lengths) // options["global_batch_size"])
    visited = [i for step in steps for i in indices(plan_step(step, lengths, **options))]
    assert len(set(visited)) == len(visited) == len(steps) * options["global_batch_size"]
    assert set(visited) <= set(range(len(lengths)))


@given(settings())
def test_what_runs_side_by_side_is_about_equally_long(case):
    """No sequence of a micro-batch is longer than one of the micro-batch before it, on any rank."""
    step, lengths, options = case
    plan = plan_step(step, lengths, **options)
    for before, after in zip(
        range(len(plan.micro_batches[0]) - 1), range(1, len(plan.micro_batches[0])), strict=True
    ):
        shortest = min(lengths[rank[before]].min() for rank in plan.micro_batches)
        longest = max(lengths[rank[after]].max() for rank in plan.micro_batches)
        assert shortest >= longest


@given(settings())
def test_the_same_step_is_planned_alike_whatever_was_planned_before(case):
    step, lengths, options = case
    first = indices(plan_step(step, lengths, **options))
    for other in range(3):
        plan_step(other, lengths, **options | {"seed": options["seed"] + 1})
    assert indices(plan_step(step, lengths, **options)) == first
