"""plan_step() for any lengths, batch, budget of tokens and number of ranks."""

from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kd.data.step_plan import BatchShape, StepPlan, Work, deal, plan_step, rollouts_of_step
from kd.data.truncate import IntArray

WORK = Work(linear=2.1e10, quadratic=3.0e5)  # of a 7B teacher and a 1.5B student, about


class Case(NamedTuple):
    step: int
    lengths: IntArray
    shape: BatchShape
    seed: int
    num_ranks: int

    def plan(self, **changes: Any) -> StepPlan:
        case = self._replace(**changes)
        return plan_step(
            case.step,
            case.lengths,
            case.shape,
            seed=case.seed,
            data_parallel_size=case.num_ranks,
        )


@st.composite
def cases(draw: st.DrawFn, *, with_budget: bool | None = None) -> Case:
    """Any number of ranks, also more than sequences, and any micro-batch."""
    global_batch_size = draw(st.integers(1, 24))
    num_examples = draw(st.integers(global_batch_size, 3 * global_batch_size + 2))
    lengths = draw(st.lists(st.integers(1, 50), min_size=num_examples, max_size=num_examples))
    budget = st.none() if with_budget is False else st.integers(1, 120)
    shape = BatchShape(
        global_batch_size,
        draw(st.integers(1, 5)),
        draw(budget if with_budget is not None else st.none() | budget),
        draw(st.sampled_from(["padded", "packed"])),
        draw(st.sampled_from([Work(), WORK])),
    )
    seed, ranks = draw(st.integers(0, 2**31)), draw(st.integers(1, 9))
    return Case(draw(st.integers(0, 20)), np.array(lengths), shape, seed, ranks)


def indices(plan: StepPlan) -> list[int]:
    return [int(i) for rank in plan.micro_batches for micro in rank for i in micro]


@given(cases())
def test_ranks_have_as_many_micro_batches(case: Case) -> None:
    plan = case.plan()
    assert len(plan.micro_batches) == case.num_ranks
    assert len({len(rank) for rank in plan.micro_batches}) == 1
    assert len(plan.micro_batches[0]) >= 1


@given(cases(with_budget=False))
def test_micro_batches_have_the_size_that_was_asked_for_until_none_is_left(case: Case) -> None:
    plan, size = case.plan(), case.shape.micro_batch_size
    side_by_side = zip(*plan.micro_batches, strict=True)
    sizes = [len(micro) for row in side_by_side for micro in row]
    full, rest = divmod(case.shape.global_batch_size, size)
    expected = [size] * full + [rest] * (rest > 0)
    assert sizes == expected + [0] * (len(sizes) - len(expected))
    assert len(sizes) - len(expected) < case.num_ranks


@given(cases(with_budget=True))
def test_a_micro_batch_keeps_to_its_budget_unless_one_sequence_is_longer(case: Case) -> None:
    for rank in case.plan().micro_batches:
        for micro in rank:
            lengths = case.lengths[micro]
            packed = case.shape.layout == "packed"
            tokens = lengths.sum() if packed else len(micro) * lengths.max(initial=0)
            assert tokens <= case.shape.max_tokens or len(micro) == 1


@given(cases())
def test_the_global_batch_depends_on_neither_ranks_nor_how_it_is_cut_up(case: Case) -> None:
    whole = indices(case.plan(shape=BatchShape(case.shape.global_batch_size), num_ranks=1))
    assert sorted(indices(case.plan())) == sorted(whole)
    assert len(set(whole)) == len(whole) == case.shape.global_batch_size


@given(cases(), st.data())
def test_sampled_sequences_take_the_place_of_some_of_the_global_batch(
    case: Case, data: st.DataObject
) -> None:
    """A prompt's samples stand in a row, and no sequence that is kept gives a prompt."""
    per_prompt = data.draw(st.integers(1, 3))
    num_prompts = data.draw(st.integers(0, case.shape.global_batch_size // per_prompt))
    shape = replace(case.shape, num_rollouts=num_prompts * per_prompt)
    arguments = case.step, len(case.lengths), shape, per_prompt
    sampled = rollouts_of_step(*arguments, seed=case.seed).tolist()
    prompts = sampled[::per_prompt]
    assert sampled == [i for i in prompts for _ in range(per_prompt)]
    assert len(set(prompts)) == num_prompts
    kept, whole = indices(case.plan(shape=shape)), indices(case.plan())
    assert len(kept) == case.shape.global_batch_size - shape.num_rollouts
    assert set(kept) | set(prompts) <= set(whole)
    assert not set(kept) & set(prompts)


def test_other_prompts_are_sampled_in_other_steps_and_by_other_seeds() -> None:
    shape = BatchShape(32, num_rollouts=8)
    chosen = {
        (seed, step): tuple(rollouts_of_step(step, 320, shape, 1, seed=seed))
        for seed in range(3)
        for step in range(30)
    }
    assert len(set(chosen.values())) == len(chosen)


@given(cases())
def test_an_epoch_visits_no_example_twice(case: Case) -> None:
    steps = range(len(case.lengths) // case.shape.global_batch_size)
    visited = [i for step in steps for i in indices(case.plan(step=step))]
    assert len(set(visited)) == len(visited) == len(steps) * case.shape.global_batch_size
    assert set(visited) <= set(range(len(case.lengths)))


@given(cases(with_budget=False))
def test_what_runs_side_by_side_is_about_equally_long(case: Case) -> None:
    """No sequence is longer than one of the micro-batches before it, on any rank."""
    rows = list(zip(*case.plan().micro_batches, strict=True))
    for before, after in pairwise(rows):
        shortest = min(case.lengths[micro].min(initial=50) for micro in before)
        assert shortest >= max(case.lengths[micro].max(initial=0) for micro in after)


@given(cases(with_budget=True))
def test_what_runs_first_takes_longest(case: Case) -> None:
    def work(micro: IntArray) -> float:
        return work_of(case.lengths[micro], case.shape.layout, case.shape.work)

    rows = list(zip(*case.plan().micro_batches, strict=True))
    for before, after in pairwise(rows):
        assert min(map(work, before)) >= max(map(work, after)) * (1 - 1e-12)


@given(cases())
def test_the_same_step_is_planned_alike_whatever_was_planned_before(case: Case) -> None:
    first = indices(case.plan())
    for other in range(3):
        case.plan(step=other, seed=case.seed + 1)
    assert indices(case.plan()) == first


@pytest.mark.parametrize("num_ranks", range(1, 33))
def test_eight_sequences_are_dealt_over_any_number_of_ranks(num_ranks: int) -> None:
    lengths = np.arange(100, 108)
    for shape in (BatchShape(8), BatchShape(8, max_tokens=300), BatchShape(8, 3)):
        dealt = deal(lengths, shape, num_ranks)
        assert sorted(int(i) for rank in dealt for micro in rank for i in micro) == list(range(8))
        assert {len(rank) for rank in dealt} == {len(dealt[0])}
    assert len(deal(lengths, BatchShape(8), num_ranks)[0]) == -(-8 // num_ranks)


# Where more than half of all sequences are as long as the cap, four fill a padded micro-batch, and
# not all that is left divides over the ranks.
@pytest.mark.parametrize(
    ("layout", "keep", "least"),
    [("packed", 1.0, 0.95), ("packed", 0.5, 0.95), ("padded", 1.0, 0.85), ("padded", 0.5, 0.92)],
)
@pytest.mark.parametrize("num_ranks", [8, 32])
def test_ranks_wait_little_for_one_another_on_long_tailed_lengths(
    num_ranks: int, layout: str, keep: float, least: float
) -> None:
    """The useful share: work, padding left out, over what all ranks do while the slowest works."""
    random = np.random.default_rng(0)
    full = np.minimum(np.exp(random.normal(np.log(4500), 0.55, 20 * num_ranks)), 4096)
    lengths = (keep * full).astype(np.int64)
    shape = BatchShape(len(full), max_tokens=16384, layout=layout, work=WORK)
    dealt = deal(lengths, shape, num_ranks)
    loads = np.array([[work_of(lengths[micro], layout) for micro in rank] for rank in dealt])
    share = WORK.of(lengths).sum() / (num_ranks * loads.max(axis=0).sum())
    assert share >= least
    one_by_one = deal(lengths, BatchShape(len(full)), num_ranks)
    assert len(dealt[0]) < len(one_by_one[0]) / 3


def work_of(lengths: IntArray, layout: str, work: Work = WORK) -> float:
    """Of a micro-batch, padding included."""
    each = work.of(lengths)
    return float(each.sum() if layout == "packed" else len(each) * each.max(initial=0.0))
