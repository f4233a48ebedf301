"""The numbers of a comparison, against values computed by hand."""

from pathlib import Path

import pytest
from run_folders import TEACHER, step_record, write_evaluation, write_run

from kd.report.compare import Family, compare
from kd.report.read_runs import read_runs

TASK = "problems/report.jsonl"


def family_of(folder: Path) -> Family:
    (family,) = compare(read_runs([folder])[0])
    return family


def write_curve(folder: Path, num_correct: dict[float, int], **changes: object) -> Family:
    for keep_fraction, number in num_correct.items():
        tokens = {"num_input_tokens": 100 * keep_fraction, "flops": 1e12 * keep_fraction}
        steps = [step_record(1, **tokens | changes)]
        write_run(
            folder / f"keep{keep_fraction}",
            keep_fraction=keep_fraction,
            num_correct=number,
            steps=steps,
        )
    return family_of(folder)


def test_seeds_are_pooled_with_wilsons_interval(tmp_path):
    write_run(tmp_path / "a", seed=0, num_correct=83, num_problems=100)
    write_run(tmp_path / "b", seed=1, num_correct=147, num_problems=200)
    (cell,) = family_of(tmp_path).cells
    score = cell.scores[TASK]
    assert (score.num_correct, score.num_responses, score.accuracy) == (230, 300, 230 / 300)
    # (p + z^2/2n -+ z sqrt(p (1-p)/n + z^2/4n^2)) / (1 + z^2/n) of p = 230/300, n = 300, z =
    # 1.959964
    assert score.ci95 == pytest.approx((0.715619, 0.810972), abs=1e-6)
    assert [evaluation.accuracy for evaluation in score.evaluations] == [0.83, 0.735]


def test_a_mean_over_responses_weighs_evaluations_by_their_number(tmp_path):
    run = write_run(tmp_path / "a", num_correct=1)
    write_run(tmp_path / "b", seed=1)
    write_evaluation(
        run / "evaluation" / "student-after.json", "a/export/best", num_correct=5, num_problems=100
    )
    changes = {"mean_response_tokens": 100.0, "unclosed_fraction": 0.4}
    path = tmp_path / "b" / "evaluation" / "after.json"
    write_evaluation(path, "b/export/best", num_correct=5, num_problems=300, **changes)
    (cell,) = family_of(tmp_path).cells
    assert cell.scores[TASK].mean_response_tokens == pytest.approx((100 * 70 + 300 * 100) / 400)
    assert cell.scores[TASK].unclosed_fraction == pytest.approx(0.3)


def test_samples_of_a_problem_count_as_many_as_their_interval_says(tmp_path):
    """20 problems of 4 samples with Wilson's interval of 16 of 32 responses: they are worth 32, and
    two seeds 64.
    """
    for seed in (0, 1):
        run = write_run(tmp_path / f"seed{seed}", seed=seed)
        changes = {"num_samples": 4, "ci95": [0.336309, 0.663691]}
        path = run / "evaluation" / "after.json"
        write_evaluation(
            path, f"seed{seed}/export/best", num_correct=40, num_problems=20, **changes
        )
    (cell,) = family_of(tmp_path).cells
    score = cell.scores[TASK]
    assert (score.accuracy, score.num_responses) == (0.5, 160)
    assert score.ci95 == pytest.approx((0.381021, 0.618979), abs=1e-5)  # Wilson's of 32 of 64


def test_ratios_are_to_whole_sequences_of_the_same_sections(tmp_path):
    half = step_record(
        1,
        step_ms=300.0,
        flops=1e12,
        peak_memory_gib=3.0,
        num_input_tokens=50,
        num_supervised_tokens=40,
    )
    whole = step_record(
        1,
        step_ms=400.0,
        flops=4e12,
        peak_memory_gib=4.0,
        num_input_tokens=100,
        num_supervised_tokens=90,
    )
    write_run(tmp_path / "half0", keep_fraction=0.5, seed=0, num_correct=60, steps=[half])
    write_run(
        tmp_path / "half1",
        keep_fraction=0.5,
        seed=1,
        num_correct=66,
        steps=[half | {"step_ms": 100.0}],
    )
    write_run(tmp_path / "whole", num_correct=90, steps=[whole])
    write_run(tmp_path / "cot", keep_fraction=0.5, num_correct=10, data__loss_sections=["cot"])
    family = family_of(tmp_path)
    half_cell, whole_cell, cot_cell = family.cells
    names = ("training_s", "flops", "peak_memory_gib", "num_input_tokens", "num_supervised_tokens")
    assert [family.relative_cost(half_cell, name) for name in names] == [
        0.5,
        0.25,
        0.75,
        0.5,
        pytest.approx(4 / 9),
    ]
    assert family.kept(half_cell, TASK) == pytest.approx(0.7)
    assert family.kept(whole_cell, TASK) == 1.0
    assert family.full_of(cot_cell) is None
    assert family.kept(cot_cell, TASK) is None
    assert family.relative_cost(cot_cell, "flops") is None


def test_every_window_is_compared_with_the_one_whole_sequence(tmp_path):
    write_run(tmp_path / "whole", num_correct=80)
    write_run(tmp_path / "tail", keep_fraction=0.5, num_correct=40, truncation__window="tail")
    limit = {"truncation__window": "tail", "truncation__max_tokens": 64}
    write_run(tmp_path / "limited", keep_fraction=0.5, num_correct=40, **limit)
    family = family_of(tmp_path)
    kept = {
        str(cell.variant): family.kept(cell, TASK)
        for cell in family.cells
        if cell.keep_fraction < 1
    }
    assert kept == {
        "prompt+cot+answer, tail": 0.5,
        "prompt+cot+answer, tail, at most 64 tokens": None,
    }


def test_the_knee_is_the_cheapest_length_whose_upper_bound_reaches_fulls_lower_bound(tmp_path):
    # Wilson of 100: 90 -> (0.8256, 0.9448), 82 -> (0.7333, 0.8830), 75 -> (0.6570, 0.8245), which
    # is below 0.8256
    family = write_curve(tmp_path, {0.25: 75, 0.5: 82, 0.75: 89, 1.0: 90})
    knee = family.knee(family.variants[0], TASK)
    assert knee is not None
    assert (knee.cell.keep_fraction, knee.cost) == (0.5, "flops")


def test_a_shorter_length_that_is_level_by_one_problem_more_is_the_knee(tmp_path):
    family = write_curve(tmp_path, {0.25: 76, 0.5: 82, 1.0: 90})  # 76 -> (0.6677, 0.8331)
    knee = family.knee(family.variants[0], TASK)
    assert knee is not None
    assert knee.cell.keep_fraction == 0.25


def test_the_knee_goes_by_tokens_where_flops_are_not_recorded_and_by_cost_not_by_length(tmp_path):
    for keep_fraction, tokens in ((0.5, 70), (0.75, 60), (1.0, 100)):
        steps = [
            step_record(1, num_input_tokens=tokens, flops=None if keep_fraction == 0.5 else 1e12)
        ]
        write_run(
            tmp_path / f"{keep_fraction}", keep_fraction=keep_fraction, num_correct=90, steps=steps
        )
    family = family_of(tmp_path)
    knee = family.knee(family.variants[0], TASK)
    assert knee is not None
    assert (knee.cell.keep_fraction, knee.cost) == (0.75, "num_input_tokens")


def test_without_a_scored_full_run_there_is_no_knee(tmp_path):
    write_run(tmp_path / "half", keep_fraction=0.5, num_correct=90)
    write_run(tmp_path / "whole")
    family = family_of(tmp_path)
    assert family.knee(family.variants[0], TASK) is None
    assert family.kept(family.cells[0], TASK) is None


def test_unfinished_runs_count_nowhere(tmp_path):
    write_run(tmp_path / "a", num_correct=10)
    write_run(tmp_path / "b", seed=1, num_correct=90, finished=False)
    (cell,) = family_of(tmp_path).cells
    assert [run.name for run in cell.runs] == ["a"]
    assert cell.scores[TASK].accuracy == 0.1


def test_other_models_or_data_are_another_comparison(tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", teacher__model="models/other")
    write_run(tmp_path / "c", data__path="other.jsonl")
    assert len(compare(read_runs([tmp_path])[0])) == 3


def test_a_reference_that_each_run_evaluated_is_counted_once(tmp_path):
    for name in ("a", "b"):
        run = write_run(tmp_path / name, num_correct=50)
        write_evaluation(run / "evaluation" / "big.json", TEACHER, num_correct=99)
    write_evaluation(tmp_path / "references" / "student-before.json", "anything", num_correct=7)
    references = family_of(tmp_path).references[TASK]
    assert [(role, score.num_correct, len(score.evaluations)) for role, score in references] == [
        ("teacher", 99, 2),
        ("student before training", 7, 1),
    ]


def test_what_differs_beside_the_axes_is_listed_and_the_axes_are_not(tmp_path):
    other = {
        "python": "3.11.7",
        "packages": {"torch": "2.13.0"},
        "commit": "def",
        "gpus": ["H100"],
        "num_cpus": 2,
    }
    write_run(tmp_path / "a", num_correct=50)
    write_run(
        tmp_path / "b",
        keep_fraction=0.5,
        seed=1,
        num_correct=50,
        environment=other,
        training__learning_rate=1.0,
    )
    path = tmp_path / "b" / "evaluation" / "student-after.json"
    write_evaluation(path, "b/export/best", num_correct=50, judge="math")
    found = {name: values for name, values in family_of(tmp_path).differences}
    assert found == {
        "environment.commit": {"abc": ["a"], "def": ["b"]},
        "environment.gpus": {"[]": ["a"], '["H100"]': ["b"]},
        "training.learning_rate": {"0.0001": ["a"], "1.0": ["b"]},
        f"evaluation of {TASK}: judge": {"exact": ["a"], "math": ["b"]},
    }


def test_a_fact_that_only_one_run_recorded_is_a_difference(tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", seed=1, training__new_field=3)
    assert family_of(tmp_path).differences == (
        ("training.new_field", {"3": ["b"], "not recorded": ["a"]}),
    )


def test_one_seed_in_two_folders_is_told(tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b")
    (difference,) = family_of(tmp_path).differences
    assert difference.name == "one seed is counted more than once"
    assert difference.values == {"prompt+cot+answer, head, keep_fraction 1, seed 0": ["a", "b"]}


def test_the_interval_of_what_is_kept_meets_its_definition(tmp_path):
    """MOVER: a bound r is where p - r * p_full is as far from 0 as the distances of both from their
    own bounds, added in quadrature.
    """
    family = write_curve(tmp_path, {0.5: 60, 1.0: 80})
    half, full = family.cells
    interval = family.kept_interval(half, TASK)
    assert interval is not None
    (p, (low, high)), (p_full, (low_full, high_full)) = (
        (cell.scores[TASK].accuracy, cell.scores[TASK].ci95) for cell in (half, full)
    )
    lower, upper = interval
    assert lower < 0.75 < upper
    for r, own, whole in (
        (lower, p - low, high_full - p_full),
        (upper, high - p, p_full - low_full),
    ):
        assert (p - r * p_full) ** 2 == pytest.approx(own**2 + (r * whole) ** 2)
    assert family.kept_interval(full, TASK) is None


@pytest.mark.parametrize(("half", "full"), [(0, 80), (100, 100), (3, 1), (80, 2)])
def test_the_interval_of_what_is_kept_at_the_ends(tmp_path, half, full):
    family = write_curve(tmp_path, {0.5: half, 1.0: full})
    interval = family.kept_interval(family.cells[0], TASK)
    assert interval is not None
    assert 0 <= interval[0] <= half / full <= interval[1]
    assert (interval[0] == 0) == (half == 0)


def test_differences_among_some_runs_are_those_that_they_have(tmp_path):
    write_run(tmp_path / "a", num_correct=50)
    write_run(tmp_path / "b", seed=1, num_correct=50)
    write_run(tmp_path / "c", seed=2, num_correct=50, training__learning_rate=1.0)
    write_run(tmp_path / "d", seed=2, num_correct=50, training__learning_rate=1.0)
    family = family_of(tmp_path)
    found = {
        names: [difference.name for difference in family.differences_among(set(names))]
        for names in ("ab", "abc", "cd")
    }
    twice = "one seed is counted more than once"
    assert found == {"ab": [], "abc": ["training.learning_rate"], "cd": [twice]}
