"""launch/study.py by the real path: interrupted twice, it ends with the figures of one that was
left alone.
"""

import json
import signal
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import IO

import forked
import psutil
import pytest
from forked import Forked, with_launcher
from tiny import ROOT, wait_until, write_tiny_recipe

from kd.constants import EXIT_INTERRUPTED
from kd.runs.records import read_metrics

pytestmark = pytest.mark.dist
COMPARED = ("step", "loss", "kd", "ce", "lr", "grad_norm", "num_supervised_tokens", "val_loss")
DONE = ["keep0.5_prompt+cot+answer_head_seed0", "keep1_prompt+cot+answer_head_seed0"]
NOTHING = "keep0.5_answer_head_seed0"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("a study")
    problems = [
        {"prompt": f"{a}+{b}", "answer": str((a + b) % 10)} for a in range(3) for b in range(2)
    ]
    (folder / "problems.jsonl").write_text(
        "".join(json.dumps(problem) + "\n" for problem in problems)
    )
    recipe = write_tiny_recipe(folder)
    evaluation = [
        "path = " + json.dumps(f"{folder}/problems.jsonl"),
        'judge = "exact"',
        "max_new_tokens = 4",
    ]
    recipe.write_text(
        recipe.read_text() + "\n".join(["\n[evaluation]", *evaluation, "temperature = 0.0", ""])
    )
    return recipe


def command(recipe: Path, folder: Path) -> list[str]:
    axes = ["--keep", "0.5,1.0", "--sections", "answer"]
    return [
        str(ROOT / "launch/study.py"),
        "--recipe",
        str(recipe),
        *axes,
        "--output",
        str(folder),
    ]


def start(
    recipe: Path, folder: Path, stdout: IO[str] | None = None, *, has_real_launcher: bool = False
) -> Forked:
    """Its evaluations are forked as well, and so is its training, but for a launcher that is to
    be interrupted.
    """
    arguments = command(recipe, folder)
    return Forked(
        arguments if has_real_launcher else with_launcher(*arguments),
        cwd=recipe.parent,
        stdout=stdout,
        stderr=subprocess.STDOUT,
        nested=True,
    )


def num_steps(run: Path) -> int:
    return len(read_metrics(run / "metrics.jsonl")) if (run / "metrics.jsonl").exists() else 0


def losses(run: Path) -> list[list[float]]:
    return [
        [record.get(name) for name in COMPARED] for record in read_metrics(run / "metrics.jsonl")
    ]


def cells(study: Path) -> dict[str, tuple[str, str]]:
    return {
        cell["name"]: (cell["status"], cell["text"])
        for cell in json.loads((study / "study.json").read_text())["cells"]
    }


@pytest.fixture(scope="module")
def whole(recipe) -> Path:
    folder = recipe.parent / "whole"
    process = start(recipe, folder)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output
    return folder


@pytest.fixture(scope="module")
def interrupted(recipe) -> tuple[Path, int, str]:
    """Told to stop in the first cell, killed in the second, started once more: folder, first
    status, last output.
    """
    folder = recipe.parent / "interrupted"
    process = start(recipe, folder, has_real_launcher=True)
    wait_until(
        lambda: num_steps(folder / DONE[0]) >= 3 or process.poll() is not None, "step 3", 200
    )
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=100)
    status = process.returncode
    assert (folder / DONE[0] / "INTERRUPTED").exists(), output

    process = start(recipe, folder, has_real_launcher=True)
    wait_until(
        lambda: num_steps(folder / DONE[1]) >= 3 or process.poll() is not None,
        "step 3 of the second",
        200,
    )
    ranks = []
    for other in psutil.process_iter():
        with suppress(psutil.Error):  # it ended just now
            command = other.cmdline()
            if f"{DONE[1]}.json" in " ".join(command) and "-u" in command:
                ranks.append(other)
    for rank in ranks:
        rank.suspend()  # so that training is not over before the next start
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=10)

    log = recipe.parent / "last start.log"
    with log.open("w") as file:
        process = start(recipe, folder, file)
        wait_until(
            lambda: "waiting for the ranks" in log.read_text() or process.poll() is not None,
            "the wait",
            100,
        )
        for rank in ranks:
            rank.resume()
        assert process.wait(400) == 0, log.read_text()
    return folder, status, log.read_text()


@pytest.mark.fault
def test_an_interrupted_study_says_so_and_leaves_no_cell_half_trained(interrupted):
    assert interrupted[1] == EXIT_INTERRUPTED


@pytest.mark.fault
def test_an_interrupted_study_ends_with_the_cells_losses_and_accuracies_of_a_whole_one(
    interrupted, whole
):
    folder = interrupted[0]
    assert cells(folder) == cells(whole)
    for name in DONE:
        assert losses(folder / name) == losses(whole / name)
        there, here = (
            (study / name / "evaluation" / "export-best.responses.jsonl").read_text()
            for study in (whole, folder)
        )
        assert there == here


@pytest.mark.fault
def test_training_that_outlived_its_study_is_waited_for(interrupted):
    folder, _, output = interrupted
    assert f"waiting for the ranks in {folder / DONE[1]}" in output


def test_a_cell_that_leaves_no_supervised_token_is_reported_as_such(whole):
    status, text = cells(whole)[NOTHING]
    assert status == "no_supervised_token"
    assert (
        "no training example has a token in data.loss_sections = ['answer'] after truncation"
        in text
    )
    assert not (whole / NOTHING / "metrics.jsonl").exists()


@pytest.mark.fault
def test_scores_of_other_settings_are_made_anew(recipe, whole, interrupted):
    """interrupted: its study is over, and may be scored in another way."""
    folder = interrupted[0]
    done = forked.run(
        [*command(recipe, folder), "--set", "evaluation.max_new_tokens=3"],
        cwd=recipe.parent,
        timeout=200,
        nested=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for file in (
        folder / DONE[0] / "evaluation" / "export-best.json",
        folder / "references" / "teacher.json",
    ):
        assert json.loads(file.read_text())["sampling"]["max_new_tokens"] == 3


def test_teacher_and_student_before_training_are_scored_beside_the_cells(whole):
    for label in ("teacher", "student-before"):
        assert json.loads((whole / "references" / f"{label}.json").read_text())["num_problems"] == 6


def test_a_finished_study_is_not_run_again_and_another_recipe_is_refused(recipe, whole):
    before = {
        path: path.stat().st_mtime_ns
        for path in whole.rglob("*")
        if path.is_file() and "keep" in str(path)
    }
    process = start(recipe, whole)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 0, output
    runs = {
        path: time
        for path, time in before.items()
        if path.parts[len(whole.parts)].startswith("keep")
    }
    assert {path: path.stat().st_mtime_ns for path in runs} == runs
    done = forked.run(
        [*command(recipe, whole), "--set", "training.max_steps=8"],
        cwd=recipe.parent,
        timeout=100,
        nested=True,
    )
    assert done.returncode == 2
    assert "training.max_steps: 40 there, 8 here" in done.stderr


def test_a_cell_that_fails_leaves_the_others_and_is_tried_again(recipe, whole, tmp_path):
    problems = recipe.parent / "problems.jsonl"
    text = problems.read_text()
    (whole / DONE[0] / "evaluation" / "export-best.json").rename(tmp_path / "scores.json")
    problems.write_text("no JSON\n")
    try:
        process = start(recipe, whole)
        output, _ = process.communicate(timeout=100)
    finally:
        problems.write_text(text)
    assert process.returncode == 1, output
    assert "1 of 3 cells failed; run the same command" in output
    assert cells(whole)[DONE[0]][0] == "failed"
    assert "problems.jsonl" in cells(whole)[DONE[0]][1]
    assert cells(whole)[DONE[1]][0] == "done"
    process = start(recipe, whole)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 0, output
    assert cells(whole)[DONE[0]][0] == "done"


def test_a_study_from_a_cache_runs_the_teacher_once_and_has_the_same_figures(recipe, whole):
    folder = recipe.parent / "cached"
    arguments = [*command(recipe, folder), "--cache", "--cache-dtype", "fp32"]
    process = Forked(
        with_launcher(*arguments), cwd=recipe.parent, stderr=subprocess.STDOUT, nested=True
    )
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output
    filled = json.loads((folder / "cache" / "filled.json").read_text())
    assert filled["num_rows"] > 0
    assert cells(folder) == cells(whole)
    for name in DONE:
        resolved = json.loads((folder / name / "recipe.json").read_text())
        assert resolved["teacher"]["cache"] == str(folder / "cache")
        for cached, live in zip(losses(folder / name), losses(whole / name), strict=True):
            assert [value is None for value in cached] == [value is None for value in live]
            numbers = [value for value in live if value is not None]
            assert [v for v in cached if v is not None] == pytest.approx(numbers, rel=1e-5)
        there, here = (
            (study / name / "evaluation" / "export-best.responses.jsonl").read_text()
            for study in (whole, folder)
        )
        assert there == here, "to the last response"
    before = (folder / "cache" / "filled.json").stat().st_mtime_ns
    shards = {p: p.stat().st_mtime_ns for p in (folder / "cache" / "shards").iterdir()}
    again = Forked(
        with_launcher(*arguments), cwd=recipe.parent, stderr=subprocess.STDOUT, nested=True
    )
    output, _ = again.communicate(timeout=200)
    assert again.returncode == 0, output
    assert (folder / "cache" / "filled.json").stat().st_mtime_ns >= before
    assert {p: p.stat().st_mtime_ns for p in shards} == shards, "nothing is filled twice"
