"""launch/generate.py and launch/evaluate.py, as a user runs them."""

import fcntl
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from forked import Forked
from transformers import AutoTokenizer

from kd.errors import UserError
from kd.evaluate.evaluation import evaluate, local_problems, result_files
from kd.generation.backends import choose_backend, make_subject
from kd.generation.sampling import sampling_of
from kd.recipe import ROOT, ModelSection, Recipe, load_recipe

Script = Callable[..., subprocess.CompletedProcess[str]]
# So hot that even random weights close some thoughts.
SAMPLED = ("--temperature", 3.0, "--batch-size", 8, "--max-new-tokens", 20, "--keep", "closed")


def run_until_killed(
    name: str, arguments: list[str], find_journal: Callable[[], Path | None], cwd: Path
) -> None:
    """Start a script of launch/ and kill it when some batches, but not all, are in its journal."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    process = Forked([ROOT / "launch" / name, *arguments], cwd=cwd, env=environment)
    while process.poll() is None and not (
        (path := find_journal()) and path.read_bytes().count(b"\n") >= 3
    ):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait(10)


def test_killed_generation_goes_on_and_gives_the_file_of_an_uninterrupted_one(
    script: Script, recipe_path: Path, problems_path: Path, tmp_path: Path
) -> None:
    common = (
        "--recipe",
        recipe_path,
        "--set",
        "data.think_open=''",
        "--problems",
        problems_path,
        *SAMPLED,
    )
    whole, resumed = tmp_path / "whole.jsonl", tmp_path / "resumed.jsonl"
    first = script("generate.py", *common, "--output", whole)
    assert first.returncode == 0, first.stderr

    journal = Path(f"{resumed}.progress")
    arguments = [*map(str, common), "--output", str(resumed)]
    run_until_killed(
        "generate.py", arguments, lambda: journal if journal.exists() else None, tmp_path
    )
    assert not resumed.exists()
    assert 3 <= len(journal.read_text().splitlines()) < 13
    with Path(f"{resumed}.partial").open("a") as file:
        file.write('{"id": "torn')
    second = script("generate.py", *common, "--output", resumed)
    assert second.returncode == 0, second.stderr
    assert resumed.read_bytes() == whole.read_bytes()
    assert journal.read_bytes() == Path(f"{whole}.progress").read_bytes()

    rows = [json.loads(line) for line in whole.read_text().splitlines()]
    assert 0 < len(rows) < 96
    assert set(rows[0]) == {"id", "prompt", "reasoning", "answer"}
    assert f"{len(rows)} kept" in first.stdout
    assert "unclosed" in first.stdout


@pytest.mark.parametrize(("flags", "temperature"), [((), 0.7), (("--temperature", 0.0), 0.0)])
def test_generation_samples_as_the_recipe_says_unless_a_flag_says_otherwise(
    script: Script,
    recipe_path: Path,
    problems_path: Path,
    tmp_path: Path,
    flags: tuple,
    temperature: float,
) -> None:
    overrides = ("--set", "evaluation.temperature=0.7", "--set", "evaluation.top_p=0.9")
    done = script(
        "generate.py",
        "--recipe",
        recipe_path,
        *overrides,
        *flags,
        "--problems",
        problems_path,
        "--output",
        "traces.jsonl",
        "--limit",
        4,
    )
    assert done.returncode == 0, done.stderr
    settings = json.loads((tmp_path / "traces.jsonl.progress").read_text().splitlines()[0])
    assert (settings["temperature"], settings["top_p"]) == (
        temperature,
        0.9 if temperature else 1.0,
    )
    assert done.stderr == ""


def test_evaluation_leaves_results_and_responses_of_each_model(
    script: Script, recipe_path: Path, model_dir: Path, tmp_path: Path
) -> None:
    models = ("--model", model_dir, "--model", model_dir, "--label", "one", "--label", "two")
    done = script("evaluate.py", "--recipe", recipe_path, *models, "--limit", 10, "--output", "out")
    assert done.returncode == 0, done.stderr
    results = [
        json.loads((tmp_path / "out" / f"{label}.json").read_text()) for label in ("one", "two")
    ]
    assert results[0] == {**results[1], "label": "one"}
    assert results[0]["num_problems"] == 10
    assert results[0]["recipe"] == "trial"
    responses = [
        json.loads(line)
        for line in (tmp_path / "out" / "one.responses.jsonl").read_text().splitlines()
    ]
    assert len(responses) == 10
    assert results[0]["num_correct"] == sum(row["correct"] for row in responses)
    assert [line.split()[0] for line in done.stdout.splitlines() if line.strip()][-3:-1] == [
        "one",
        "two",
    ]


@pytest.mark.process
def test_tasks_are_sampled_and_judged_in_a_folder_each(
    stand_in: Callable[..., None],
    recipe_path: Path,
    text_model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stand_in("gsm8k")
    stand_in("aime24")
    arguments = (
        "--tasks",
        "gsm8k,aime24",
        "--num-samples",
        "3",
        "--set",
        "evaluation.temperature=0.7",
    )
    run_evaluate(
        monkeypatch, recipe_path, text_model_dir, tmp_path, *arguments, "--backend", "transformers"
    )
    out = tmp_path / "out"
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*.json*")) == [
        "aime24/m.json",
        "aime24/m.responses.jsonl",
        "gsm8k/m.json",
        "gsm8k/m.responses.jsonl",
    ]
    results = json.loads((tmp_path / "out" / "aime24" / "m.json").read_text())
    assert (results["task"], results["num_problems"], results["num_samples"]) == ("aime24", 2, 3)
    assert results["problems"] == str(tmp_path / "hub" / "aime24")
    assert list(results["pass_at_k"]) == ["1", "2", "3"]
    rows = [
        json.loads(line)
        for line in (tmp_path / "out" / "aime24" / "m.responses.jsonl").read_text().splitlines()
    ]
    assert [(row["id"], row["sample"], row["expected"]) for row in rows] == [
        (problem, sample, answer)
        for problem, answer in (("1", "204"), ("2", "033"))
        for sample in range(3)
    ]
    assert len({row["response"] for row in rows}) > 3


@pytest.mark.process
def test_the_tasks_of_a_recipe_are_evaluated_beside_its_problems(
    stand_in: Callable[..., None],
    recipe_path: Path,
    text_model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stand_in("gsm8k")
    tasks = 'evaluation.tasks=["gsm8k"]'
    run_evaluate(monkeypatch, recipe_path, text_model_dir, tmp_path, "--set", tasks)
    expected = result_files(load_recipe(str(recipe_path), [tasks]), tmp_path / "out", "m")
    assert expected == [tmp_path / "out" / "m.json", tmp_path / "out" / "gsm8k" / "m.json"]
    assert [json.loads(path.read_text())["task"] for path in expected] == [None, "gsm8k"]


@pytest.mark.process
@pytest.mark.parametrize(("temperature", "num_samples"), [("0.6", 64), ("0.0", 1)])
def test_a_task_has_its_usual_number_of_samples_and_one_where_all_is_greedy(
    temperature: str,
    num_samples: int,
    stand_in: Callable[..., None],
    recipe_path: Path,
    text_model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stand_in("aime25")
    arguments = ("--tasks", "aime25", "--set", f"evaluation.temperature={temperature}")
    run_evaluate(monkeypatch, recipe_path, text_model_dir, tmp_path, *arguments)
    assert (
        json.loads((tmp_path / "out" / "aime25" / "m.json").read_text())["num_samples"]
        == num_samples
    )


def run_evaluate(
    monkeypatch: pytest.MonkeyPatch,
    recipe_path: Path,
    text_model_dir: Path,
    tmp_path: Path,
    *arguments: str,
) -> None:
    """launch/evaluate.py in this process, where tasks are stand-ins."""
    common = (
        "--recipe",
        recipe_path,
        "--model",
        text_model_dir,
        "--label",
        "m",
        "--output",
        tmp_path / "out",
    )
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, common), *arguments])
    runpy.run_path(str(ROOT / "launch" / "evaluate.py"))["main"]()


def test_a_killed_evaluation_goes_on_and_gives_the_files_of_an_uninterrupted_one(
    script: Script, recipe_path: Path, model_dir: Path, tmp_path: Path
) -> None:
    common = ["--recipe", recipe_path, "--model", model_dir, "--label", "m", "--num-samples", 2]
    common += ["--set", "evaluation.temperature=3.0"]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    first = script("evaluate.py", *common, "--output", whole)
    assert first.returncode == 0, first.stderr

    arguments = [*map(str, common), "--output", str(resumed)]
    run_until_killed(
        "evaluate.py", arguments, lambda: next(resumed.glob("m.*.progress"), None), tmp_path
    )
    assert not (resumed / "m.json").exists()
    second = script("evaluate.py", *common, "--output", resumed)
    assert second.returncode == 0, second.stderr
    assert "of 24 batches are done already" in second.stdout
    assert (resumed / "m.responses.jsonl").read_bytes() == (
        whole / "m.responses.jsonl"
    ).read_bytes()
    results = [json.loads((folder / "m.json").read_text()) for folder in (whole, resumed)]
    assert results[1] == {**results[0], "command": results[1]["command"]}
    assert sorted(path.name for path in resumed.iterdir()) == [
        ".m.lock",
        "m.json",
        "m.responses.jsonl",
    ]
    assert (
        len({row["response"] for row in map(json.loads, (whole / "m.responses.jsonl").open())}) > 96
    )


@pytest.mark.process
def test_ranks_that_never_meet_leave_the_results_of_one(
    recipe_path: Path, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two models; the second rank starts after the first has ended."""
    models = ["--label", "a", "--model", str(model_dir), "--label", "b"]
    sampled = ["--set", "evaluation.temperature=3.0", "--num-samples", "2", "--limit", "20"]

    def run_rank(folder: str, rank: int, num_ranks: int) -> None:
        for name, value in {"RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_RANK": rank}.items():
            monkeypatch.setenv(name, str(value))
        script = runpy.run_path(str(ROOT / "launch" / "evaluate.py"))
        arguments = ["--recipe", recipe_path, "--model", model_dir, *models, *sampled]
        arguments += ["--output", tmp_path / folder]
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
        script["main"]()

    run_rank("one", 0, 1)
    run_rank("two", 1, 2)
    assert not list((tmp_path / "two").glob("*.json*"))
    begun = json.loads(next((tmp_path / "two").glob("a.*.1-of-2.progress")).open().readline())
    with pytest.raises(UserError, match="was begun with 2 ranks, but there are 1 now"):
        run_rank("two", 0, 1)
    run_rank("two", 0, 2)
    for label in ("a", "b"):
        one, two = (tmp_path / folder / f"{label}.responses.jsonl" for folder in ("one", "two"))
        assert two.read_bytes() == one.read_bytes() != b""
        results = [json.loads(path.with_name(f"{label}.json").read_text()) for path in (one, two)]
        assert results[1] == {**results[0], "command": results[1]["command"]}
    assert begun["num_requests"] == 40
    assert {path.name for path in (tmp_path / "two").iterdir() if path.name[0] != "."} == {
        f"{label}{end}" for label in ("a", "b") for end in (".json", ".responses.jsonl")
    }
    # The rank that ended first asks again: nothing is generated or judged anew, and what a rank
    # left that was killed when it had written goes
    before = (tmp_path / "two" / "a.json").stat().st_mtime_ns
    left = tmp_path / "two" / f"a.{results[0]['fingerprint']}"
    left.touch()
    run_rank("two", 1, 2)
    assert (tmp_path / "two" / "a.json").stat().st_mtime_ns == before
    assert not left.exists()
    # Another answer key is judged anew, by several ranks too
    problems = recipe_path.parent / "problems.jsonl"
    responses = [json.loads(line) for line in one.read_text().splitlines()]
    given = {row["id"]: {"answer": row["answer"]} for row in responses if row["answer"]}
    rows = [json.loads(line) for line in problems.read_text().splitlines()]
    rows = [row | given.get(row["id"], {}) for row in rows]
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for rank in range(2):
        run_rank("two", rank, 2)
    changed = json.loads((tmp_path / "two" / "b.json").read_text())
    assert changed["fingerprint"] == results[0]["fingerprint"]
    assert changed["num_correct"] > results[0]["num_correct"]


@pytest.mark.process
def test_a_rank_waits_to_open_its_share_while_another_one_joins(
    recipe_path: Path, model_dir: Path, tmp_path: Path
) -> None:
    recipe = load_recipe(str(recipe_path))
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    sampling = sampling_of(recipe.evaluation, seed=0)
    section = ModelSection(model=str(model_dir))
    subject = make_subject("m", section, tokenizer, sampling, choose_backend("transformers"))
    problems = local_problems(recipe.evaluation, num_samples=None, limit=20)
    assert evaluate(recipe, subject, problems, tmp_path, 0, 2) is None
    with ThreadPoolExecutor(1) as other, (tmp_path / ".m.lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        second = other.submit(evaluate, recipe, subject, problems, tmp_path, 1, 2)
        time.sleep(1.0)
        assert not list(tmp_path.glob("m.*.1-of-2*"))
        fcntl.flock(file, fcntl.LOCK_UN)
        content = second.result(60)
    assert content is not None
    assert content["num_problems"] == 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--num-samples", "0"), "--num-samples = 0: write at least 1"),
        (
            ("--num-samples", "4"),
            "--num-samples = 4 with evaluation.temperature = 0: greedy responses are all the same",
        ),
        (("--tasks", "gsm8"), "'gsm8' is not a task. Did you mean gsm8k?"),
        (("--harness", "lm-eval"), "--harness lm-eval needs --tasks"),
        (
            ("--harness", "lm-eval", "--tasks", "x", "--num-samples", "1"),
            "--num-samples = 1: tasks of a harness",
        ),
        (("--", "--limit", "5"), "unknown arguments --limit 5"),
    ],
)
def test_arguments_that_make_no_sense_are_the_users_error(
    recipe_path: Path,
    model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    with pytest.raises(UserError) as caught:
        run_evaluate(monkeypatch, recipe_path, model_dir, tmp_path, *arguments)
    assert message in str(caught.value)


@pytest.mark.parametrize("trusted", [True, False])
def test_code_of_a_model_is_trusted_only_where_the_recipe_names_the_model_or_made_it(
    trusted: bool,
) -> None:
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
