"""lm-evaluation-harness: its command, what it leaves, and, where it is installed, a run on a tiny
model.
"""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from kd.errors import UserError
from kd.evaluate import harness
from kd.evaluate.harness import evaluate_with_harness, harness_command
from kd.generation.backends import Backend, Subject, choose_backend, make_subject
from kd.generation.sampling import Sampling
from kd.recipe import ModelSection, Recipe, load_recipe

TRANSFORMERS = choose_backend("transformers")
SAMPLING = Sampling(max_new_tokens=40, temperature=0.6, top_p=0.95, seed=7)
GREEDY = Sampling(max_new_tokens=40)

TASK_YAML = """\
task: tiny_arithmetic
dataset_path: json
dataset_kwargs: {{data_files: {{test: {problems}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["<eos>"]}}
filter_list:
  - name: after-thought
    filter: [{{function: regex, regex_pattern: "</think>(.*)"}}, {{function: take_first}}]
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture
def recipe(recipe_path: Path) -> Recipe:
    return load_recipe(str(recipe_path))


def subject(
    model_dir: Path, sampling: Sampling = SAMPLING, backend: Backend = TRANSFORMERS
) -> Subject:
    section = ModelSection(model=str(model_dir))
    return make_subject("m", section, AutoTokenizer.from_pretrained(model_dir), sampling, backend)


def write_run(raw: Path, date: str, num_right: int, **reported: Any) -> None:
    """What lm-eval 0.4.13 leaves in --output_path of two problems, each judged by two filters."""
    scores = {
        "exact_match,strict-match": 0.0,
        "exact_match,flexible-extract": num_right / 2,
        **reported,
    }
    found = {
        "results": {
            "group": {"alias": "group"},
            "gsm": {"alias": "gsm", "sample_len": 2, **scores},
        },
        "configs": {"gsm": {"task": "gsm", "dataset_path": "openai/gsm8k"}},
        "config": {"model": "hf", "limit": None},
        "lm_eval_version": "0.4.13",
    }
    folder = raw / "__models__m"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"results_{date}.json").write_text(json.dumps(found))
    samples = [
        {
            "doc_id": index,
            "target": "3",
            "arguments": {"gen_args_0": {"arg_0": "1+2", "arg_1": {}}},
            "resps": [["<think>1+2=3</think>3" if index else "=3;3"]],
            "filtered_resps": ["3"],
            "filter": chosen,
            "exact_match": float(chosen == "flexible-extract" and index < num_right),
        }
        for index in range(2)
        for chosen in ("strict-match", "flexible-extract")
    ]
    (folder / f"samples_gsm_{date}.jsonl").write_text(
        "".join(json.dumps(sample) + "\n" for sample in samples)
    )


@pytest.fixture
def lm_eval_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness is there, and a run of it succeeds without doing anything."""
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(
        harness, "harness_command", lambda *arguments: [sys.executable, "-c", "pass"]
    )


def test_the_command_names_model_tasks_and_the_sampling_of_the_recipe(model_dir: Path) -> None:
    command = harness_command(subject(model_dir), "gsm8k,aime24", 8, Path("raw"))
    assert command[:4] == [sys.executable, "-m", "lm_eval", "run"]
    given = {
        flag: command[command.index(flag) + 1]
        for flag in ("--model", "--tasks", "--batch_size", "--seed")
    }
    assert given == {"--model": "hf", "--tasks": "gsm8k,aime24", "--batch_size": "8", "--seed": "7"}
    generation = {
        "max_gen_toks": 40,
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.95,
        "top_k": 0,
    }
    assert json.loads(command[command.index("--gen_kwargs") + 1]) == generation
    assert json.loads(command[command.index("--model_args") + 1])["pretrained"] == str(model_dir)
    greedy = harness_command(
        subject(model_dir, GREEDY, Backend("vllm", "1", tensor_parallel=2)), "gsm8k", 8, Path("raw")
    )
    assert json.loads(greedy[greedy.index("--gen_kwargs") + 1]) == {
        "max_gen_toks": 40,
        "do_sample": False,
    }
    assert greedy[greedy.index("--model") + 1] == "vllm"
    assert json.loads(greedy[greedy.index("--model_args") + 1])["tensor_parallel_size"] == 2


@pytest.mark.process
def test_results_of_the_newest_run_are_read_into_our_form(
    recipe: Recipe, model_dir: Path, tmp_path: Path, lm_eval_done: None
) -> None:
    write_run(tmp_path / "lm-eval" / "raw" / "m", "2026-01-02T00-00-00.1", num_right=1)
    write_run(tmp_path / "lm-eval" / "raw" / "m", "2026-01-01T00-00-00.1", num_right=2)
    (content,) = evaluate_with_harness(recipe, subject(model_dir), "gsm", [], tmp_path)
    folder = tmp_path / "lm-eval" / "gsm"
    assert json.loads((folder / "m.json").read_text()) == {**content, "ci95": list(content["ci95"])}
    expected = {
        "label": "m",
        "task": "gsm",
        "problems": "openai/gsm8k",
        "judge": "exact_match,flexible-extract",
        "accuracy": 0.5,
        "num_problems": 2,
        "num_samples": 1,
        "num_correct": 1,
        "pass_at_k": {"1": 0.5},
        "unclosed_fraction": 0.5,
        "unended_fraction": None,
    }
    assert {key: content[key] for key in expected} == expected
    assert content["metrics"]["exact_match,strict-match"] == 0.0
    assert content["backend"].startswith("lm-eval 0.4.13, transformers ")
    rows = [json.loads(line) for line in (folder / "m.responses.jsonl").read_text().splitlines()]
    assert [(row["id"], row["correct"], row["closed"], row["answer"]) for row in rows] == [
        ("0", True, False, "3"),
        ("1", False, True, "3"),
    ]
    assert rows[1]["response"] == "<think>1+2=3</think>3"


@pytest.mark.process
def test_a_task_without_a_metric_of_right_and_wrong_is_an_error(
    recipe: Recipe,
    model_dir: Path,
    tmp_path: Path,
    lm_eval_done: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_run(tmp_path / "lm-eval" / "raw" / "m", "2026-01-01T00-00-00.1", num_right=1)
    monkeypatch.setattr(harness, "METRICS", ("acc",))
    with pytest.raises(
        UserError, match="task 'gsm' reports alias, sample_len, exact_match.* but none of acc"
    ):
        evaluate_with_harness(recipe, subject(model_dir), "gsm", [], tmp_path)


@pytest.mark.process
def test_a_harness_that_leaves_nothing_is_an_error(
    recipe: Recipe, model_dir: Path, tmp_path: Path, lm_eval_done: None
) -> None:
    with pytest.raises(UserError, match="--harness lm-eval: it left no results in"):
        evaluate_with_harness(recipe, subject(model_dir), "gsm", [], tmp_path)


def test_a_harness_that_is_not_installed_is_an_error_that_names_the_extra(
    recipe: Recipe, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'pip install -e ".\[harness\]"'):
        evaluate_with_harness(recipe, subject(model_dir), "gsm", [], tmp_path)


needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed"
)


@needs_lm_eval
def test_the_real_harness_runs_a_task_of_ours_on_a_tiny_model(
    recipe: Recipe,
    model_dir: Path,
    problems_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "tiny.yaml").write_text(TASK_YAML.format(problems=problems_path))
    extra = ["--include_path", str(tmp_path), "--limit", "8"]
    contents = evaluate_with_harness(
        recipe, subject(model_dir, GREEDY), "tiny_arithmetic", extra, tmp_path / "out"
    )
    (content,) = contents
    assert (content["num_problems"], content["judge"]) == (8, "exact_match,after-thought")
    assert content["accuracy"] == content["metrics"]["exact_match,after-thought"]
    folder = tmp_path / "out" / "lm-eval" / "tiny_arithmetic"
    rows = [json.loads(line) for line in (folder / "m.responses.jsonl").read_text().splitlines()]
    assert len({row["response"] for row in rows}) > 3
    assert (
        content["unclosed_fraction"] == sum("</think>" not in row["response"] for row in rows) / 8
    )


@needs_lm_eval
def test_the_real_harness_fails_on_an_unknown_task(
    recipe: Recipe, model_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        UserError, match="--harness lm-eval: it failed; see the reason above: .* -m lm_eval run"
    ):
        evaluate_with_harness(recipe, subject(model_dir), "no_such_task", [], tmp_path)
