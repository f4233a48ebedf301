"""The answer that a report begins with: which length it is about, its numbers, and what it says
when something is missing.
"""

from pathlib import Path

import pytest
from run_folders import PROBLEMS, step_record, write_run

from kd.report.compare import compare
from kd.report.headline import CACHED, NO_FLOPS, ONE_SEED, Headline, headlines
from kd.report.read_runs import read_runs


def headline_of(folder: Path) -> Headline:
    (family,) = compare(read_runs([folder]).runs)
    (headline,) = headlines(family)
    return headline


def write_length(
    folder: Path, keep_fraction: float, num_correct: int | None, *, flops: bool = True, **changes
) -> None:
    steps = [
        step_record(
            1,
            num_input_tokens=100 * keep_fraction,
            flops=1e12 * keep_fraction**2 if flops else None,
            step_ms=200 + 200 * keep_fraction,
        )
    ]
    name = f"keep{keep_fraction}_{len(list(folder.iterdir()))}"
    write_run(
        folder / name, keep_fraction=keep_fraction, num_correct=num_correct, steps=steps, **changes
    )


@pytest.mark.parametrize(
    ("lengths", "told"),
    [
        ({0.25: 70, 0.5: 80, 0.75: 89, 1.0: 90}, 0.5),
        ({0.3: 80, 0.9: 80, 1.0: 90}, 0.3),
        ({0.75: 80, 1.0: 90}, 0.75),
    ],
)
def test_it_is_about_the_length_nearest_to_a_half_whatever_its_result(tmp_path, lengths, told):
    for keep_fraction, num_correct in lengths.items():
        write_length(tmp_path, keep_fraction, num_correct)
    headline = headline_of(tmp_path)
    assert headline.cell.keep_fraction == told
    assert f"keep_fraction {told:g}" in headline.text


def test_it_says_what_is_kept_at_which_cost_and_the_cheapest_level_length(tmp_path):
    for keep_fraction, num_correct in {0.25: 40, 0.5: 60, 0.75: 89, 1.0: 90}.items():
        write_length(tmp_path, keep_fraction, num_correct)
    headline = headline_of(tmp_path)
    assert headline.task == PROBLEMS
    assert headline.knee.cell.keep_fraction == 0.75
    # Kept: 60 / 90. FLOPs go with the square; time: 300 / 400. Intervals: test_report_compare
    for told in (
        "half of each",
        "66.7 %",
        "0.600 against 0.900",
        "0.25 of the FLOPs",
        "0.75 of the training time",
    ):
        assert told in headline.text
    assert "is 0.75 (98.9 %, 89.3-109.4 %, at 0.56 of the FLOPs)" in headline.text


def test_a_length_that_is_itself_the_cheapest_and_one_without_a_cheaper_level(tmp_path):
    for name, num_correct in (("level", 88), ("below", 20)):
        folder = tmp_path / name
        folder.mkdir()
        write_length(folder, 0.5, num_correct)
        write_length(folder, 1.0, 90)
    assert headline_of(tmp_path / "level").text.endswith(
        "; it is the cheapest length that is level with whole sequences."
    )
    assert headline_of(tmp_path / "below").text.endswith(
        "; no cheaper length is level with whole sequences."
    )


def test_without_flops_the_cost_is_tokens_read(tmp_path):
    write_length(tmp_path, 0.5, 80, flops=False)
    write_length(tmp_path, 1.0, 90)
    headline = headline_of(tmp_path)
    assert "0.50 of the tokens read" in headline.text
    assert NO_FLOPS in headline.notes


@pytest.mark.parametrize("num_seeds", [1, 2])
def test_one_seed_is_told(tmp_path, num_seeds):
    for seed in range(num_seeds):
        write_length(tmp_path, 0.5, 80, seed=seed)
        write_length(tmp_path, 1.0, 90, seed=seed)
    notes = headline_of(tmp_path).notes
    assert (ONE_SEED in notes) == (num_seeds == 1)
    assert f"100 problems of {PROBLEMS} with {num_seeds} seed" in notes[0]
    assert CACHED not in notes


def test_costs_of_runs_that_read_a_cache_are_told_to_be_without_it(tmp_path):
    write_length(tmp_path, 0.5, 80, teacher__cache="cache")
    write_length(tmp_path, 1.0, 90, teacher__cache="cache")
    assert CACHED in headline_of(tmp_path).notes


@pytest.mark.parametrize(
    ("lengths", "told"),
    [
        ({0.5: 80}, "no evaluated run has whole sequences (keep_fraction 1)"),
        ({0.5: 80, 1.0: None}, "no evaluated run has whole sequences (keep_fraction 1)"),
        ({1.0: 80}, "only whole sequences are evaluated (keep_fraction 1, accuracy 0.800)"),
        ({0.5: 80, 1.0: 0}, "accuracy 0.000"),
        ({0.5: None}, "no run is evaluated"),
        ({0.5: None, 1.0: None}, "takes 0.25 of the FLOPs and 0.75 of the training time"),
    ],
)
def test_what_is_missing_is_told(tmp_path, lengths, told):
    for keep_fraction, num_correct in lengths.items():
        write_length(tmp_path, keep_fraction, num_correct)
    headline = headline_of(tmp_path)
    assert headline.cell is None
    assert headline.drawn == ()
    assert told in headline.text


def test_only_differences_of_the_runs_that_are_drawn_qualify_it(tmp_path):
    write_length(tmp_path, 0.5, 80)
    write_length(tmp_path, 1.0, 90)
    lora = {"rank": 16, "alpha": 32.0, "dropout": 0.0, "target_modules": "all-linear"}
    write_length(tmp_path, 0.5, 70, student__lora=lora, training__learning_rate=0.5)
    assert headline_of(tmp_path).differences == ()
    write_length(tmp_path, 0.5, 70, truncation__window="tail", training__learning_rate=0.25)
    headline = headline_of(tmp_path)
    assert [set(values) for _, values in headline.differences] == [{"0.0001", "0.25"}]
    assert not headline.is_text_affected
    write_length(tmp_path, 0.25, 70, training__learning_rate=0.125)
    assert headline_of(tmp_path).is_text_affected
