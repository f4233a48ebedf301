"""launch/generate.py's rows: several samples of a problem, the judge, and several ranks."""

import json
import runpy
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kd.errors import UserError
from kd.evaluate.problems import Problem
from kd.generation.sampling import Response
from kd.recipe import ROOT, Recipe, load_recipe

SCRIPT = ROOT / "launch" / "generate.py"
SAMPLED = ("--temperature", "3.0", "--max-new-tokens", "20", "--keep", "closed")


@pytest.fixture
def recipe(recipe_path: Path) -> Recipe:
    return load_recipe(str(recipe_path))


@pytest.mark.parametrize(
    ("keep", "kept", "dropped"),
    [
        ("correct", ["a/0"], {"wrong": 1, "unended": 1, "unclosed": 1}),
        ("ended", ["a/0", "a/1"], {"unended": 1, "unclosed": 1}),
        ("closed", ["a/0", "a/1", "b/0"], {"unclosed": 1}),
    ],
)
def test_the_judge_drops_wrong_answers_where_it_is_asked(
    recipe: Recipe, keep: str, kept: list[str], dropped: dict[str, int]
) -> None:
    to_rows = runpy.run_path(str(SCRIPT))["to_rows"]
    problems = [Problem("a", "1+1", "2")] * 2 + [Problem("b", "2+2", "4")] * 2
    responses = [
        Response("<think>1+1=2</think>2", 9, ended=True),
        Response("<think>1+1=3</think>3", 9, ended=True),
        Response("<think>2+2=4</think>4", 9, ended=False),
        Response("<think>2+2=4", 5, ended=False),
    ]
    rows, counts = to_rows(problems, ["a/0", "a/1", "b/0", "b/1"], responses, recipe, keep)
    assert [row["id"] for row in rows] == kept
    assert rows[0] == {"id": "a/0", "prompt": "1+1", "reasoning": "1+1=2", "answer": "2"}
    assert counts == Counter({"kept": len(kept), **dropped})


def run_generate(monkeypatch: pytest.MonkeyPatch, *arguments: object, **ranks: str) -> None:
    """launch/generate.py in this process, as one of the ranks."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", **ranks}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, arguments)])
    runpy.run_path(str(SCRIPT))["main"]()


def test_ranks_that_never_meet_write_the_file_of_one(
    recipe_path: Path, problems_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common: list[Any] = ["--recipe", recipe_path, "--problems", problems_path, *SAMPLED]
    common += ["--set", "data.think_open=''", "--num-samples", 2, "--limit", 20]
    common += ["--batch-size", 8]
    run_generate(monkeypatch, *common, "--output", tmp_path / "one.jsonl")
    for rank in ("0", "1"):
        said = {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": rank}
        run_generate(monkeypatch, *common, "--output", tmp_path / "two.jsonl", **said)
    one, two = (tmp_path / f"{name}.jsonl" for name in ("one", "two"))
    assert two.read_bytes() == one.read_bytes()
    journals = [path.with_name(f"{path.name}.progress").read_bytes() for path in (one, two)]
    assert journals[0] == journals[1]
    assert len(journals[0].splitlines()) == 1 + 5
    rows = [json.loads(line) for line in one.read_text().splitlines()]
    problems = {json.loads(line)["id"] for line in problems_path.read_text().splitlines()[:20]}
    assert len({row["id"] for row in rows}) == len(rows) > 0
    assert {row["id"].rpartition("/")[2] for row in rows} <= {"0", "1"}
    assert {row["id"].rpartition("/")[0] for row in rows} <= problems


@pytest.mark.parametrize(
    ("arguments", "world_size", "message"),
    [
        (("--num-samples", "0"), "1", "--num-samples = 0: write at least 1"),
        (("--num-samples", "2"), "1", "--num-samples = 2 with evaluation.temperature = 0"),
        (("--tensor-parallel", "2"), "1", "--tensor-parallel 2: only vLLM divides a model"),
        (("--limit", "8"), "2", "WORLD_SIZE = 2, but there are only 1 batches of 8 responses"),
        (("--server", "http://127.0.0.1:1"), "1", "--server http://127.0.0.1:1: no answer"),
    ],
)
def test_arguments_that_make_no_sense_are_the_users_error(
    recipe_path: Path,
    problems_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    world_size: str,
    message: str,
) -> None:
    common = ["--recipe", recipe_path, "--problems", problems_path, "--output", tmp_path / "o"]
    said = {"RANK": "0", "WORLD_SIZE": world_size, "LOCAL_RANK": "0"}
    with pytest.raises(UserError) as caught:
        run_generate(monkeypatch, *common, *arguments, **said)
    assert message in str(caught.value)
    assert not list(tmp_path.glob("o*"))


def test_the_judge_needs_answers(
    script: Callable[..., subprocess.CompletedProcess[str]], recipe_path: Path, tmp_path: Path
) -> None:
    problems = tmp_path / "unanswered.jsonl"
    problems.write_text('{"prompt": "1+1"}\n')
    common = ("--recipe", recipe_path, "--problems", problems, "--output", tmp_path / "o")
    done = script("generate.py", *common, "--keep", "correct")
    assert done.returncode == 2
    assert "row 1 has no 'answer'" in done.stderr
