"""Lines on progress: rates between lines and not of one step, and where time went, by a clock that
is set by hand.
"""

import logging
import re
from typing import Any

import pytest

from kd.training.progress_lines import ProgressLines, WallTime, duration


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    return now


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Any:
    caplog.set_level(logging.INFO, "kd.training")
    return lambda: [record.getMessage() for record in caplog.records]


def record(step: int, tokens: int = 1000) -> dict[str, Any]:
    losses = {"loss": 0.5, "kd": 0.25, "ce": 0.75}
    return {"step": step, **losses, "num_input_tokens": tokens, "tokens_per_second": 9e9}


def progress(wall_time: WallTime, divergence: str | None = "KL") -> ProgressLines:
    return ProgressLines(wall_time, total_steps=200, every_seconds=30.0, divergence=divergence)


def test_a_line_comes_for_the_first_step_the_last_and_every_few_seconds(clock, lines):
    log = progress(WallTime())
    for step in range(150, 201):
        clock[0] += 4.0
        log.add(record(step))
    found = [int(re.match(r"step (\d+)/200  ", line)[1]) for line in lines()]
    assert found == [150, 158, 166, 174, 182, 190, 198, 200]


def test_the_rate_is_that_of_all_steps_since_the_last_line_with_what_lay_between(clock, lines):
    wall_time = WallTime()
    log = progress(wall_time)
    for step, seconds in ((1, 2.0), (2, 5.0), (3, 5.0), (4, 25.0)):
        with wall_time.spent_on("validation" if step == 4 else "steps"):
            clock[0] += seconds
        log.add(record(step, tokens=700 * step))
    first, second = lines()
    assert first == "step   1/200  loss 0.5000  KL 0.2500  CE 0.7500  350 tokens/s  waiting 0%"
    rate = 700 * (2 + 3 + 4) / 35
    left = (200 - 4) * 35 / 3  # seconds
    assert f"  {rate:.0f} tokens/s  {duration(left)} left  waiting 71% (validation 71%)" in second


def test_waits_are_named_by_their_share_of_the_interval_alone(clock, lines):
    wall_time = WallTime()
    wall_time.add("checkpoints", 500.0)  # before the first line
    log = progress(wall_time)
    log.add(record(1))
    clock[0] += 40.0
    for what, seconds in {"cache": 10.0, "data": 2.0, "sampling": 0.1, "steps": 40.0}.items():
        wall_time.add(what, seconds)
    log.add(record(2))
    assert lines()[-1].endswith("waiting 30% (data 5%, cache 25%)")


def test_the_time_left_follows_the_recent_rate_and_not_the_first_steps(clock, lines):
    log = progress(WallTime())
    for step in range(1, 31):
        clock[0] += 600.0 if step < 10 else 60.0
        log.add(record(step))
    assert f"  {duration(170 * 60.0)} left" in lines()[-1]
    assert "2 h 50 min left" in lines()[-1]


def test_without_a_teacher_the_loss_is_all_there_is_and_a_validation_has_a_line(clock, lines):
    log = progress(WallTime(), divergence=None)
    log.add(record(7))
    log.add_validation({"step": 7, "val_loss": 1.5, "val_kd": 0.0, "val_ce": 1.5})
    assert "KL" not in lines()[0]
    assert lines()[1] == "step   7/200  validation  loss 1.5000"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (200, "3 min 20 s"),
        (599.6, "10 min"),
        (3569, "59 min"),
        (3580, "1 h 0 min"),
        (8040, "2 h 14 min"),
        (86_350, "23 h 59 min"),
        (86_390, "1 d 0 h"),
        (200_000, "2 d 8 h"),
    ],
)
def test_a_duration_has_the_two_largest_units(seconds, text):
    assert duration(seconds) == text


def test_shares_of_a_run_are_those_of_its_three_phases():
    wall_time = WallTime()
    for what, seconds in {"steps": 6.0, "data": 5.0, "validation": 3.0, "checkpoints": 1.0}.items():
        wall_time.add(what, seconds)
    shares = {"steps_share": 0.6, "validation_share": 0.3, "checkpoints_share": 0.1}
    assert wall_time.shares() == pytest.approx(shares)
    assert str(wall_time) == "60.0% steps, 30.0% validation, 10.0% checkpoints"
