"""What the benchmark measures: turns, floors, memory and errors, each against a figure known
beforehand.
"""

import time
from functools import partial

import measure
import pytest
import torch
from measure import (
    bare_floor,
    errors,
    floor_fraction,
    forward_backward,
    num_flop,
    peak_bytes,
    peak_of_call,
    planned_floor,
    spread,
    time_in_turn,
)
from peers import PEERS, Shape, make_problem
from torch.utils.flop_counter import FlopCounterMode

from kd.losses.chunk_plan import ChunkPlan

pytestmark = pytest.mark.benchmark

CPU = torch.device("cpu")
SHAPE = Shape(16, 24, 60)


@pytest.fixture
def problem():
    return make_problem(SHAPE, 50, "forward_kl", dtype=torch.float32, device=CPU)


def flop(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def test_calls_are_timed_in_turn_and_equally_often():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    samples = time_in_turn(calls, CPU, seconds=1e-9, min_rounds=4)
    assert "".join(order) == "abc" * (2 + 4)
    assert [len(values) for values in samples.values()] == [4, 4, 4]


def test_rounds_fill_the_seconds_asked_for():
    samples = time_in_turn({"sleep": lambda: time.sleep(0.02)}, CPU, seconds=0.6)
    assert 5 < len(samples["sleep"]) <= 30
    assert min(samples["sleep"]) >= 20


def test_spread_and_fraction_of_a_floor_are_percentiles_of_the_rounds():
    assert spread([5.0, 1.0, 2.0, 3.0, 4.0, 6.0]) == {"median": 3.5, "p20": 2.0, "p80": 5.0}
    # a busy machine slows a whole round: the rounds' ratios are 1/2, 1/2, 1/4
    assert floor_fraction([1.0, 10.0, 1.0], [2.0, 20.0, 4.0]) == 0.5


@pytest.mark.parametrize("slice_rows", [50, 16])
def test_the_bare_floor_is_the_four_products(problem, slice_rows):
    assert flop(bare_floor(problem, slice_rows)) == num_flop(SHAPE, 50)


@pytest.mark.parametrize("plan", [ChunkPlan(16, 5), ChunkPlan(1000, 100)])
def test_the_planned_floor_is_the_four_products_in_chunks(problem, plan):
    assert flop(planned_floor(problem, plan, torch.float32)) == num_flop(SHAPE, 50)


def test_the_loss_itself_does_the_products_of_the_floor_and_no_more(problem):
    assert flop(lambda: forward_backward(PEERS["ours"].loss, problem)) == num_flop(SHAPE, 50)


def test_the_bare_floor_is_sliced_when_memory_is_short(problem, monkeypatch):
    monkeypatch.setattr(measure, "_free_bytes", lambda device: 2**40)
    assert measure.rows_that_fit(problem, 0) == 50
    rows_bytes = 20 * SHAPE.vocab_size * 4
    gradient_bytes = 4 * SHAPE.student_hidden_size * (50 + SHAPE.vocab_size)
    free_bytes = measure.SPARE_BYTES + rows_bytes + gradient_bytes + rows_bytes
    monkeypatch.setattr(measure, "_free_bytes", lambda device: free_bytes)
    assert measure.rows_that_fit(problem, rows_bytes) == 13
    assert measure.rows_that_fit(problem, 0) == 25


@pytest.mark.parametrize("is_kept", [False, True])
def test_peak_memory_counts_what_a_call_keeps_and_what_it_frees_again(is_kept):
    kept = []

    def call():
        tensor = torch.ones(2**26)
        if is_kept:
            kept.append(tensor)

    peak = peak_bytes(call, CPU)
    assert 0.95 * 2**28 < peak < 1.1 * 2**28


def test_peak_memory_of_a_loss_counts_its_gradients():
    problem = make_problem(Shape(1024, 8, 20000), 4, "forward_kl", dtype=torch.float32, device=CPU)
    call = partial(forward_backward, PEERS["eager"].loss, problem)
    assert 0.95 < peak_of_call(call, problem) / (4 * 1024 * 20000) < 1.3


def test_errors_are_relative_and_say_how_far_the_pair_is_apart():
    def one_percent_more(problem):
        return 1.01 * PEERS["eager"].loss(problem)

    cases = errors(one_percent_more, SHAPE, 50, "reverse_kl", dtype=torch.float32, device=CPU)
    assert set(cases) == {"random", "matched"}
    for case in cases.values():
        assert case["num_tokens"] == 50
        assert case["vocab_size"] == 60
        for name in ("loss", "grad_hidden", "grad_head"):
            assert case[name] == pytest.approx(0.01, rel=1e-2)
    assert cases["matched"]["kl"] < 0.1 < 1 < cases["random"]["kl"]


def test_an_error_that_is_not_finite_is_none():
    expected = torch.ones(3, dtype=torch.float64)
    assert measure.relative_error(torch.tensor([1.0, float("nan"), 1.0]), expected) is None
