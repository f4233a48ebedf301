"""Run folders are read as they are: what is not there is said, and what is damaged is named."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from run_folders import step_record, write_evaluation, write_run, write_study

from kd.errors import UserError
from kd.files import write_json
from kd.report.read_runs import Run, read_runs


def read_one(folder: Path) -> Run:
    found = read_runs([folder])
    assert found.damaged == []
    (run,) = found.runs
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
    assert run.costs == (1.25, 2.0, 7e12, 100, 80, None)
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
    (note,) = found.notes
    assert note.startswith("a: z.json")
    assert note.endswith("only student-after.json counts")


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
    runs, _, _ = read_runs([tmp_path, tmp_path / "one"])
    assert [run.name for run in runs] == ["one/a", "two/deep/a"]
    runs, _, _ = read_runs([tmp_path / "one" / "a"])
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
    _, cells, _ = read_runs([write_study(tmp_path / "tiny")])
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
    _, cells, _ = read_runs([tmp_path / "tiny"])
    assert [cell.name for cell in cells] == ["keep1"]


@pytest.mark.parametrize("root", ["", "missing"])
def test_a_folder_without_runs_is_named(tmp_path, root):
    with pytest.raises(
        UserError, match=f"RUNS = '{tmp_path / root}': no run is there.*name folders that hold"
    ):
        read_runs([tmp_path / root])


def change(run: Path, file: str, **changes: object) -> None:
    """In a JSON file, or in the first line of a JSONL file; section__key changes a nested one."""
    path = run / file
    first, newline, rest = path.read_text().partition("\n" if file.endswith("l") else "\0")
    content = json.loads(first)
    for name, value in changes.items():
        section, _, key = name.rpartition("__")
        (content[section] if section else content)[key] = value
    path.write_text(json.dumps(content) + newline + rest)


def damage_of(folder: Path) -> str:
    """The reason why a run is left out, next to a whole one that is read."""
    whole = write_run(folder.parent / "whole", num_correct=1)
    found = read_runs([folder, whole])
    assert [run.name for run in found.runs] == ["whole"]
    ((name, _, reason),) = found.damaged
    assert name == folder.name
    return reason


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("recipe.json", "{", r"recipe.json: not valid JSON: .*: restore it"),
        ("recipe.json", "[]", r"recipe.json: it holds \[\], not an object"),
        (
            "recipe.json",
            '{"run": {"name": "a", "seed": 0}, "student": {"model": "s"}}',
            "recipe.json: data is missing: restore it, or leave the run out",
        ),
        ("data.json", '{"fingerprint": 5, "report": ""}', "data.json: fingerprint = 5"),
        ("environment.json", '{"packages": 7}', "environment.json: packages = 7"),
        ("ds_config.json", "[1]", r"ds_config.json: it holds \[1\], not an object"),
        ("metrics.jsonl", "{\n", "metrics.jsonl: line 1: not valid JSON"),
        ("metrics.jsonl", "\0\0garbage\n{}\n", "metrics.jsonl: line 1: not valid JSON"),
        ("metrics.jsonl", "[3]\n", r"metrics.jsonl: line 1: it holds \[3\], not an object"),
        ("metrics.jsonl", '{"step": 1, "loss": 1}\n', "metrics.jsonl: line 1: step_ms is missing"),
        ("evaluation/a.json", '{"label": "a", "model": "b"}', "a.json: problems is missing"),
    ],
)
def test_a_run_with_a_damaged_file_is_named_and_left_out(tmp_path, file, text, message):
    run = write_run(tmp_path / "a", num_correct=1)
    (run / file).write_text(text)
    assert re.search(message, damage_of(run))


@pytest.mark.parametrize("value", [float("nan"), "1.0", True, [1.0], 1e300, 10**400])
@pytest.mark.parametrize("key", ["step", "loss", "step_ms", "flops", "peak_memory_gib", "val_loss"])
def test_a_number_of_a_step_that_is_none_is_named(tmp_path, key, value):
    run = write_run(tmp_path / "a", num_correct=1)
    change(run, "metrics.jsonl", **{key: value})
    expected = "NaN" if value != value else f"{key} = "
    assert f"metrics.jsonl: line 1: {expected}" in damage_of(run).replace("not valid JSON: ", "")


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("recipe.json", {"run__name": 5}),
        ("recipe.json", {"run__seed": "0"}),
        ("recipe.json", {"truncation__keep_fraction": "half"}),
        ("recipe.json", {"truncation__keep_fraction": True}),
        ("recipe.json", {"truncation__keep_fraction": 0.0}),
        ("recipe.json", {"data__loss_sections": "cot"}),
        ("recipe.json", {"student__model": None}),
        ("recipe.json", {"monitor": 5}),
        ("evaluation/student-after.json", {"ci95": [0.0]}),
        ("evaluation/student-after.json", {"ci95": "wide"}),
        ("evaluation/student-after.json", {"num_problems": "100"}),
        ("evaluation/student-after.json", {"num_problems": 0}),
        ("evaluation/student-after.json", {"num_correct": -1}),
        ("evaluation/student-after.json", {"model": ["m"]}),
        ("evaluation/student-after.json", {"label": {}}),
        ("evaluation/student-after.json", {"sampling": "greedy"}),
        ("evaluation/student-after.json", {"mean_response_tokens": None}),
    ],
)
def test_a_field_of_another_type_is_named(tmp_path, file, changes):
    run = write_run(tmp_path / "a", num_correct=1)
    change(run, file, **changes)
    (name,) = changes
    reason = damage_of(run)
    assert f"{run / file}: {name.replace('__', '.')}" in reason
    assert reason.endswith("restore it, or leave the run out")


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: os.symlink(path, path)])
def test_metrics_that_are_a_pipe_or_a_loop_of_links_are_named(tmp_path, make):
    run = write_run(tmp_path / "a", num_correct=1)
    (run / "metrics.jsonl").unlink()
    make(run / "metrics.jsonl")
    assert "metrics.jsonl: " in damage_of(run)


@pytest.mark.parametrize("text", ["[]", "{", '{"cells": 5}', '{"cells": [{"name": 3}]}'])
def test_a_damaged_study_is_named_and_its_runs_are_read(tmp_path, text):
    write_run(tmp_path / "tiny" / "keep1", num_correct=1)
    (tmp_path / "tiny" / "study.json").write_text(text)
    runs, cells, damaged = read_runs([tmp_path / "tiny"])
    assert (len(runs), cells) == (1, [])
    assert "study.json" in damaged[0].reason


def test_a_damaged_reference_is_named_and_the_runs_beside_it_are_read(tmp_path):
    run = write_run(tmp_path / "keep1", num_correct=1)
    (tmp_path / "references").mkdir()
    (tmp_path / "references" / "teacher.json").write_text('{"label": "teacher"}')
    found = read_runs([run])
    assert len(found.runs) == 1
    assert [damage.name for damage in found.damaged] == ["./references/teacher.json"]


@pytest.mark.parametrize(
    "changes",
    [
        {"num_correct": 11, "num_problems": 10},
        {"num_correct": 10, "num_problems": 100, "accuracy": 0.9},
        {"ci95": [0.9, 0.1]},
        {"num_samples": 4, "num_correct": 4, "ci95": [0.0, 1.0]},
    ],
)
def test_numbers_of_an_evaluation_that_cannot_be_together_are_named(tmp_path, changes):
    run = write_run(tmp_path / "a", num_correct=1)
    change(run, "evaluation/student-after.json", **changes)
    assert re.search(r"student-after.json: (num_correct|accuracy|ci95) = ", damage_of(run))


def test_a_run_is_found_through_a_link(tmp_path):
    write_run(tmp_path / "a")
    os.symlink(tmp_path / "a", tmp_path / "link")
    assert read_one(tmp_path / "link").name == "a"
