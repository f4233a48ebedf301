"""Learning rates are those of the schedulers that they are named after."""

import itertools

import pytest
import torch

from kd.recipe import TrainingSection
from kd.training.schedule import learning_rate


def training(**changes: object) -> TrainingSection:
    return TrainingSection.model_validate({"learning_rate": 0.01, **changes})


@pytest.mark.parametrize("total_steps", [20, 97, 1000])
@pytest.mark.parametrize("warmup_fraction", [0.1, 0.3])
def test_one_cycle_is_that_of_torch(total_steps, warmup_fraction):
    section = training(schedule="one_cycle", warmup_fraction=warmup_fraction)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=0.01,
        total_steps=total_steps,
        pct_start=warmup_fraction,
        cycle_momentum=False,
    )
    for step in range(total_steps):
        expected = optimizer.param_groups[0]["lr"]
        assert learning_rate(step, total_steps, section) == pytest.approx(expected, rel=1e-9), step
        optimizer.step()
        scheduler.step()


def test_cosine_warms_up_linearly_and_falls_to_zero():
    section = training(schedule="cosine", warmup_fraction=0.1)
    rates = [learning_rate(step, 100, section) for step in range(101)]
    assert rates[0] == pytest.approx(0.01 / 11)
    assert rates[10] == max(rates) == pytest.approx(0.01)
    assert rates[55] == pytest.approx(0.005)
    assert rates[100] == pytest.approx(0.0, abs=1e-12)
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[10:]))


def test_constant_stays_after_its_warm_up():
    section = training(schedule="constant", warmup_fraction=0.0)
    assert {learning_rate(step, 7, section) for step in range(7)} == {0.01}


@pytest.mark.parametrize("schedule", ["one_cycle", "cosine", "constant"])
def test_a_run_of_one_step_has_a_learning_rate(schedule):
    assert 0 < learning_rate(0, 1, training(schedule=schedule, warmup_fraction=0.5)) <= 0.01
