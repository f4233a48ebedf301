"""Run folders are read as they are: what is not there is said, and what is damaged is named."""

import json
import os
import shutil
from pathlib import Path

import pytest
from run_folders import step_record, write_evaluation, write_run, write_study

from kd.errors import UserError
from kd.files import write_json
from kd.report.read_runs import Run, read_runs


def read_one(folder: Path) -> Run:
    (run,), _ = read_runs([folder])
    return run


def test_costs_are_sums_over_steps_and_the_largest_memory(tmp_path):
    steps = [
        step_record(
            1,
            step_ms=250.0,
            peak_memory_gib=2.0,
            flops=3e12,
            num_input_tokens=40,
            num_supervised_tokens=30,
        ),
        step_record(
            2,
            step_ms=1000.0,
            peak_memory_gib=1.5,
            flops=4e12,
            num_input_tokens=60,
            num_supervised_tokens=50,
        ),
    ]
    run = read_one(write_run(tmp_path / "a", steps=steps))
    assert run.costs == (1.25, 2.0, 7e12, 100, 80)
    assert run.loss_curve == ((1, 1.0), (2, 0.5))


def test_flops_that_one_step_lacks_are_not_recorded(tmp_path):
    steps = [
        step_record(1),
        {key: value for key, value in step_record(2).items() if key != "flops"},
    ]
    assert read_one(write_run(tmp_path / "a", steps=steps)).costs.flops is None


def test_a_long_loss_curve_is_drawn_by_means_of_its_parts(tmp_path):
    steps = [step_record(step, loss=float(step) if step % 2 else None) for step in range(1, 501)]
    curve = read_one(write_run(tmp_path / "a", steps=steps)).loss_curve
    assert len(curve) == 84  # 250 losses that are numbers, by threes
    assert curve[0] == (3.0, 3.0)  # of steps 1, 3 and 5


def test_divergence_by_position_is_of_the_last_validation(tmp_path):
    def record(forward_kl: float) -> dict[str, object]:
        return {
            "by_position": [
                {"forward_kl": forward_kl, "num_supervised_tokens": 3},
                {"forward_kl": None},
                None,
                None,
            ]
        }

    steps = [
        step_record(1, val_diagnostics=record(0.5)),
        step_record(2, val_diagnostics=record(0.25)),
    ]
    steps.append(step_record(3, diagnostics=record(0.75)))
    run = read_one(write_run(tmp_path / "validated", steps=steps))
    assert (run.kl_curve, run.kl_is_of_validation) == (((0.125, 0.25),), True)
    run = read_one(write_run(tmp_path / "not_validated", steps=steps[2:]))
    assert (run.kl_curve, run.kl_is_of_validation) == (((0.125, 0.75),), False)


def test_the_students_own_score_is_of_its_best_export_wherever_the_run_stood(tmp_path):
    run = write_run(tmp_path / "a")
    for label, model, num_correct in (
        ("another", "runs/b/export/best", 1),
        ("last", "old/place/a/export/last", 2),
        ("zbest", "old/place/a/export/best", 3),
    ):
        write_evaluation(run / "evaluation" / f"{label}.json", model, num_correct=num_correct)
    (score,) = read_one(run).scores.values()
    assert score.num_correct == 3
    moved = tmp_path / "renamed"
    shutil.move(run, moved)
    assert [score.num_correct for score in read_one(moved).scores.values()] == [3]


def test_a_second_evaluation_of_the_same_export_is_told_and_not_counted(tmp_path):
    run = write_run(tmp_path / "a", num_correct=50)
    write_evaluation(run / "evaluation" / "z.json", "a/export/best", num_correct=60)
    found = read_one(run)
    assert [score.num_correct for score in found.scores.values()] == [50]
    assert found.notes == (
        "a: z.json evaluates what student-after.json does, which is what counts",
    )


def test_tasks_are_told_apart_in_either_layout_and_what_was_replaced_is_left_out(tmp_path):
    run = write_run(tmp_path / "a", num_correct=50)
    write_evaluation(
        run / "evaluation" / "after.math.json", "a/export/best", num_correct=1, task="math"
    )
    write_evaluation(
        run / "evaluation" / "aime" / "after.json", "a/export/best", num_correct=2, task="aime"
    )
    write_evaluation(
        run / "evaluation" / "replaced" / "0" / "after.json",
        "a/export/best",
        num_correct=3,
        task="old",
    )
    (run / "evaluation" / "notes.json").write_text("{}")
    scores = read_one(run).scores
    assert {task: score.num_correct for task, score in scores.items()} == {
        "problems/report.jsonl": 50,
        "math": 1,
        "aime": 2,
    }


def test_windows_that_keep_the_same_tokens_are_one(tmp_path):
    whole = write_run(
        tmp_path / "whole", truncation__window="tail", truncation__window_context="keep"
    )
    head = write_run(tmp_path / "head", keep_fraction=0.5, truncation__window_context="keep")
    tail = write_run(
        tmp_path / "tail",
        keep_fraction=0.5,
        truncation__window="tail",
        truncation__window_context="keep",
    )
    limited = write_run(tmp_path / "limited", truncation__window="tail", truncation__max_tokens=64)
    runs = [read_one(folder).variant for folder in (whole, head, tail, limited)]
    assert [variant.window for variant in runs] == ["head", "head", "tail with context", "tail"]
    assert str(runs[3]) == "prompt+cot+answer, tail, at most 64 tokens"


def test_runs_are_found_at_any_depth_once_and_named_below_the_folder_that_holds_them(tmp_path):
    write_run(tmp_path / "one" / "a")
    write_run(tmp_path / "two" / "deep" / "a")
    write_run(tmp_path / "one" / "a" / "slurm" / "0")
    runs, _ = read_runs([tmp_path, tmp_path / "one"])
    assert [run.name for run in runs] == ["one/a", "two/deep/a"]
    runs, _ = read_runs([tmp_path / "one" / "a"])
    assert [run.name for run in runs] == ["a"]


@pytest.mark.parametrize("marker", ["INTERRUPTED", None])
def test_a_run_without_success_says_how_far_it_came(tmp_path, marker):
    run = write_run(tmp_path / "a", finished=False)
    if marker:
        (run / marker).touch()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')  # a crash tore it
    found = read_one(run)
    assert not found.is_finished
    assert (
        found.state == ("interrupted" if marker else "not finished (no SUCCESS)") + " after step 2"
    )


def test_a_study_names_its_cells_that_are_not_done(tmp_path):
    _, cells = read_runs([write_study(tmp_path / "tiny")])
    assert [(cell.name, cell.status) for cell in cells] == [
        ("keep0.25_answer", "no_supervised_token"),
        ("keep0.5", "pending"),
    ]


def test_a_cell_that_a_job_trained_and_told_no_study_of_is_no_longer_pending(tmp_path):
    run = write_run(tmp_path / "tiny" / "keep0.5")
    cells = [
        {"name": name, "axes": {}, "status": "pending", "text": ""} for name in (run.name, "keep1")
    ]
    write_json(tmp_path / "tiny" / "study.json", {"recipe": "tiny", "cells": cells})
    _, cells = read_runs([tmp_path / "tiny"])
    assert [cell.name for cell in cells] == ["keep1"]


@pytest.mark.parametrize("root", ["", "missing"])
def test_a_folder_without_runs_is_named(tmp_path, root):
    with pytest.raises(
        UserError, match=f"RUNS = '{tmp_path / root}': no run is there.*name folders that hold"
    ):
        read_runs([tmp_path / root])


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("recipe.json", "{", r"recipe.json: not valid JSON .*restore it"),
        ("recipe.json", "[]", r"recipe.json: holds '\[\]', not an object"),
        (
            "recipe.json",
            '{"run": {"name": "a"}}',
            "recipe.json: data is missing: restore it, or leave the run out",
        ),
        ("metrics.jsonl", "{\n", "metrics.jsonl: a line is not valid JSON"),
        ("metrics.jsonl", '{"step": 1, "loss": 1}\n', "metrics.jsonl: step_ms is missing"),
        ("evaluation/a.json", '{"label": "a", "model": "b"}', "a.json: num_problems is missing"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, file, text, message):
    run = write_run(tmp_path / "a", num_correct=1)
    (run / file).write_text(text)
    with pytest.raises(UserError, match=message):
        read_one(run)


@pytest.mark.parametrize(("num_correct", "num_problems"), [(11, 10), (-1, 10), (0, 0)])
def test_an_impossible_count_is_named(tmp_path, num_correct, num_problems):
    run = write_run(tmp_path / "a", num_correct=1)
    path = run / "evaluation" / "student-after.json"
    content = json.loads(path.read_text()) | {
        "num_correct": num_correct,
        "num_problems": num_problems,
    }
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"num_correct = {num_correct} of {num_problems} responses"):
        read_one(run)


def test_a_run_is_found_through_a_link(tmp_path):
    write_run(tmp_path / "a")
    os.symlink(tmp_path / "a", tmp_path / "link")
    assert read_one(tmp_path / "link").name == "a"
