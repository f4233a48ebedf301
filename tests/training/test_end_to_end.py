"""From traces to a page: train, evaluate and report, each by its own command, on one run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from doc_pages import DOCS, first_cells, paths_of, section
from tiny import ROOT, write_tiny_recipe

from kd.demo.arithmetic import ArithmeticSet, draw_rows
from kd.runs.records import read_metrics

pytestmark = pytest.mark.dist


def call(script: str, *arguments: str) -> str:
    command = [sys.executable, str(ROOT / "launch" / script), *arguments]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def write_problems(path: Path, num_problems: int) -> Path:
    rows = draw_rows(ArithmeticSet("report", num_problems), seed="test")
    problems = [{"prompt": row["prompt"], "answer": row["answer"]} for row in rows]
    path.write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    return path


def test_a_run_of_two_steps_is_trained_evaluated_and_reported(launch, tmp_path):
    recipe = write_tiny_recipe(tmp_path)
    problems = write_problems(tmp_path / "problems.jsonl", num_problems=6)
    selection = write_problems(tmp_path / "selection.jsonl", num_problems=2)
    settings = ["--recipe", str(recipe)]
    for value in (
        "training.max_steps=2",
        "training.checkpoint_every=2",
        "training.evaluate_every=2",
        f"training.selection_path={selection}",
        "rollout.fraction=0.5",
        "rollout.max_new_tokens=4",
        f"evaluation.path={problems}",
        "evaluation.temperature=0",
        "evaluation.max_new_tokens=8",
        "evaluation.judge=exact",
    ):
        settings += ["--set", value]
    done = launch("launch/train.py", *settings, num_ranks=2)
    assert done.returncode == 0, done.stderr[-4000:]
    run = tmp_path / "runs" / "tiny_test"
    records = read_metrics(run / "metrics.jsonl")
    losses = [record["loss"] for record in records]
    assert len(losses) == 2
    assert min(losses) > 0.1
    page = DOCS / "run_folder.md"
    found = {path for record in records for path in paths_of(record)}
    assert found == set(first_cells(section(page, "metrics.jsonl")))
    sample = json.loads((run / "rollouts.jsonl").read_text().splitlines()[0])
    assert set(sample) == set(first_cells(section(page, "rollouts.jsonl")))

    table = call("evaluate.py", *settings, "--model", str(run / "export" / "best"))
    (scores_file,) = (run / "evaluation").glob("export-best*.json")
    scores = json.loads(scores_file.read_text())
    assert scores["num_problems"] == 6
    assert f"{scores['accuracy']:.3f}" in table

    output = tmp_path / "report"
    call("report.py", str(run), "--output", str(output))
    (reported,) = json.loads((output / "report.json").read_text())["runs"]
    assert reported["state"] == "finished"
    assert [loss for _, loss in reported["loss_by_step"]] == losses
    assert list(reported["accuracy"].values()) == [scores["accuracy"]]
    assert reported["keep_fraction"] == 0.5
    assert "| prompt+cot+answer | head" in (output / "report.md").read_text()
    assert "tiny_test" in (output / "index.html").read_text()
