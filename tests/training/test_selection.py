"""Accuracy while training, by the launcher: what launch/evaluate.py says of the same weights."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import ROOT, write_tiny_recipe

from kd.runs.records import read_metrics

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its problems are so easy that a random model gets some right: any digit is an answer."""
    folder = tmp_path_factory.mktemp("selection")
    recipe = write_tiny_recipe(folder)
    for name, digits in (("selection", range(10)), ("report", (3,))):
        rows = [{"prompt": f"{i}+{i % 3}", "answer": str(i)} for i in digits]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluation = [
        "[evaluation]",
        f'path = "{folder}/report.jsonl"',
        'judge = "exact"',
        "max_new_tokens = 24",
        "temperature = 0.0",
        "batch_size = 3",
    ]
    text = recipe.read_text().replace(
        "[training]", f'[training]\nselection_path = "{folder}/selection.jsonl"'
    )
    recipe.write_text(text + "\n".join(["", *evaluation, ""]))
    return recipe


# Under ZeRO-3 gathered layer by layer is the rollouts' way; a plan takes whole weights here
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_it_is_that_of_the_exported_student(launch: Any, recipe: Path, num_ranks: int) -> None:
    name = f"ranks{num_ranks}"
    settings = [
        f"run.name={name}",
        "training.max_steps=6",
        "training.checkpoint_every=3",
        "training.evaluate_every=2",
        "training.select_best=accuracy",
    ]
    words = [word for setting in settings for word in ("--set", setting)]
    done = launch("launch/train.py", "--recipe", str(recipe), *words, num_ranks=num_ranks)
    assert done.returncode == 0, done.stderr[-3000:]
    run = recipe.parent / "runs" / name
    measured = {r["step"]: r.get("accuracy") for r in read_metrics(run / "metrics.jsonl")}
    assert [step for step, found in measured.items() if found] == [2, 3, 4, 6]
    success = json.loads((run / "SUCCESS").read_text())
    of_saved = {step: measured[step]["accuracy"] for step in (3, 6)}
    assert success["best_accuracy"] == max(of_saved.values())
    assert of_saved[success["best_step"]] == success["best_accuracy"]
    settings = ["--set", f"evaluation.path={recipe.parent}/selection.jsonl"]
    settings += ["--set", f"training.selection_path={recipe.parent}/report.jsonl"]
    script = [sys.executable, str(ROOT / "launch" / "evaluate.py"), "--recipe", str(recipe)]
    model = ["--model", str(run / "export" / "last"), "--label", "last"]
    command = [*script, *model, "--output", str(run / "evaluation"), *settings]
    subprocess.run(command, check=True, capture_output=True, timeout=200)
    expected = json.loads((run / "evaluation" / "last.json").read_text())
    for key in ("accuracy", "ci95", "num_problems", "unclosed_fraction", "mean_response_tokens"):
        assert measured[6][key] == pytest.approx(expected[key]), key


def test_a_recipe_that_would_choose_by_its_reports_problems_is_refused(recipe: Path) -> None:
    script = [sys.executable, str(ROOT / "launch" / "train.py"), "--recipe", str(recipe), "--check"]
    for settings, words in {
        f"evaluation.path={recipe.parent}/selection.jsonl": "is evaluation.path too",
        "training.select_best=accuracy": "set training.evaluate_every",
        "training.evaluate_every=5": None,
    }.items():
        command = [*script, "--set", settings]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
        assert (words is None) == (done.returncode == 0), done.stderr
        assert words is None or words in done.stderr
