"""launch/generate.py and launch/evaluate.py, as a user runs them."""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kd.recipe import ROOT, Recipe

Script = Callable[..., subprocess.CompletedProcess[str]]
# So hot that even random weights close some thoughts.
SAMPLED = ("--temperature", 3.0, "--batch-size", 8, "--max-new-tokens", 20, "--keep", "closed")


def generate_until_killed(arguments: list[str], journal: Path, cwd: Path) -> None:
    """Start launch/generate.py and kill it when some batches, but not all, are in the journal."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(ROOT / "launch" / "generate.py"), *arguments]
    with subprocess.Popen(command, cwd=cwd, env=environment, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None and (not journal.exists() or journal.read_bytes().count(b"\n") < 3):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)


def test_killed_generation_goes_on_and_gives_the_file_of_an_uninterrupted_one(
    script: Script, recipe_path: Path, problems_path: Path, tmp_path: Path
) -> None:
    common = ("--recipe", recipe_path, "--set", "data.think_open=''", "--problems", problems_path, *SAMPLED)
    whole, resumed = tmp_path / "whole.jsonl", tmp_path / "resumed.jsonl"
    first = script("generate.py", *common, "--output", whole)
    assert first.returncode == 0, first.stderr

    generate_until_killed([*map(str, common), "--output", str(resumed)], Path(f"{resumed}.progress"), tmp_path)
    assert not resumed.exists()
    assert 3 <= len(Path(f"{resumed}.progress").read_text().splitlines()) < 13
    with Path(f"{resumed}.partial").open("a") as file:
        file.write('{"id": "torn')
    second = script("generate.py", *common, "--output", resumed)
    assert second.returncode == 0, second.stderr
    assert resumed.read_bytes() == whole.read_bytes()
    assert Path(f"{resumed}.progress").read_bytes() == Path(f"{whole}.progress").read_bytes()

    rows = [json.loads(line) for line in whole.read_text().splitlines()]
    assert 0 < len(rows) < 96
    assert set(rows[0]) == {"id", "prompt", "reasoning", "answer"}
    assert f"{len(rows)} kept" in first.stdout
    assert "unclosed" in first.stdout


@pytest.mark.parametrize(("flags", "temperature"), [((), 0.7), (("--temperature", 0.0), 0.0)])
def test_generation_samples_as_the_recipe_says_unless_a_flag_says_otherwise(
    script: Script, recipe_path: Path, problems_path: Path, tmp_path: Path, flags: tuple, temperature: float
) -> None:
    overrides = ("--set", "evaluation.temperature=0.7", "--set", "evaluation.top_p=0.9")
    done = script(
        "generate.py", "--recipe", recipe_path, *overrides, *flags,
        "--problems", problems_path, "--output", "traces.jsonl", "--limit", 4,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    settings = json.loads((tmp_path / "traces.jsonl.progress").read_text().splitlines()[0])
    assert (settings["temperature"], settings["top_p"]) == (temperature, 0.9 if temperature else 1.0)
    assert done.stderr == ""


def test_evaluation_leaves_results_and_responses_of_each_model(
    script: Script, recipe_path: Path, model_dir: Path, tmp_path: Path
) -> None:
    models = ("--model", model_dir, "--model", model_dir, "--label", "one", "--label", "two")
    done = script("evaluate.py", "--recipe", recipe_path, *models, "--limit", 10, "--output", "out")
    assert done.returncode == 0, done.stderr
    results = [json.loads((tmp_path / "out" / f"{label}.json").read_text()) for label in ("one", "two")]
    assert results[0] == {**results[1], "label": "one"}
    assert results[0]["num_problems"] == 10
    assert results[0]["recipe"] == "trial"
    responses = [json.loads(line) for line in (tmp_path / "out" / "one.responses.jsonl").read_text().splitlines()]
    assert len(responses) == 10
    assert results[0]["num_correct"] == sum(row["correct"] for row in responses)
    assert [line.split()[0] for line in done.stdout.splitlines() if line.strip()][-3:-1] == ["one", "two"]


@pytest.mark.parametrize("trusted", [True, False])
def test_code_of_a_model_is_trusted_only_where_the_recipe_names_the_model_or_made_it(trusted: bool) -> None:
    section_of = runpy.run_path(str(ROOT / "launch" / "evaluate.py"))["section_of"]
    recipe = Recipe.model_validate(
        {
            "run": {"name": "trial"},
            "teacher": {"model": "owner/teacher", "revision": "v1"},
            "student": {"model": "owner/student", "revision": "v2", "trust_remote_code": trusted},
            "data": {"path": "rows.jsonl"},
        }
    )
    loaded = {
        name: (section.model, section.revision, section.trust_remote_code)
        for name in (
            "owner/student",
            "owner/teacher",
            "owner/other",
            "runs/trial/export/best",
            "runs/other/export/best",
        )
        for section in [section_of(recipe, name)]
    }
    assert loaded == {
        "owner/student": ("owner/student", "v2", trusted),
        "owner/teacher": ("owner/teacher", "v1", False),
        "owner/other": ("owner/other", None, False),
        "runs/trial/export/best": ("runs/trial/export/best", None, trusted),
        "runs/other/export/best": ("runs/other/export/best", None, False),
    }


def test_a_missing_model_is_one_line_on_stderr(script: Script, recipe_path: Path) -> None:
    done = script("evaluate.py", "--recipe", recipe_path, "--model", "./nowhere/student")
    assert done.returncode == 2
    assert "--model = './nowhere/student': no such file or folder" in done.stderr
    assert "Traceback" not in done.stderr
