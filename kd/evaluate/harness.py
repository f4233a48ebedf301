"""lm-evaluation-harness on one model, and its results in the form of our own.

It runs in a process of its own, with its own tasks, prompts and answer extraction, sampling as the
recipe's [evaluation] says. What it wrote stays in OUTPUT/lm-eval/raw/LABEL; results and responses
go to OUTPUT/lm-eval/TASK.
"""

import importlib.util
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kd.errors import UserError
from kd.evaluate.problems import Problem
from kd.evaluate.results import response_rows, results, write_evaluation
from kd.evaluate.score import Verdict, summarise
from kd.files import parse_json, read_json_lines, read_text
from kd.generation.backends import Subject
from kd.generation.generator import weights_sha256
from kd.generation.responses import fingerprint
from kd.generation.sampling import Response
from kd.hub import resolve
from kd.names import check_name
from kd.recipe import Recipe

HARNESS = "lm-eval"
# 0 or 1 of each response; the first that a task reports counts
METRICS = (
    "math_verify",
    "exact_match",
    "acc",
)
FILTER = "flexible-extract"  # of GSM8K; its strict one wants the phrase of few-shot examples


def evaluate_with_harness(
    recipe: Recipe, subject: Subject, tasks: str, extra: Sequence[str], output: Path
) -> list[dict[str, Any]]:
    """Run it; the results of each task. tasks: its own, comma-separated. extra: arguments.

    Raises UserError when it is not installed or fails, and for a task whose result cannot be read.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            f'--harness {HARNESS}: it is not installed: run pip install -e ".[harness]"'
        )
    raw = output / HARNESS / "raw" / subject.label
    command = [*harness_command(subject, tasks, recipe.evaluation.batch_size, raw), *extra]
    if subprocess.run(command, check=False).returncode:
        raise UserError(
            f"--harness {HARNESS}: it failed; see the reason above. The command was "
            f"{shlex.join(command)}"
        )
    contents = []
    for task, found, samples in read_harness(raw):
        content, rows = convert(recipe, subject, task, found, samples)
        write_evaluation(output / HARNESS / task, content, rows)
        contents.append(content)
    return contents


def harness_command(subject: Subject, tasks: str, batch_size: int, raw: Path) -> list[str]:
    """The model's own chat template is applied; few-shot examples are the task's own."""
    section, sampling = subject.section, subject.sampling
    model = {
        "pretrained": resolve("--model", section.model),
        "trust_remote_code": section.trust_remote_code,
    }
    if section.revision is not None:
        model["revision"] = section.revision
    generation: dict[str, Any] = {
        "max_gen_toks": sampling.max_new_tokens,
        "do_sample": sampling.temperature > 0,
    }
    if sampling.temperature:
        generation |= {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    on_vllm = subject.backend.name == "vllm"
    if subject.backend.tensor_parallel > 1:
        model["tensor_parallel_size"] = subject.backend.tensor_parallel
    return [
        *(sys.executable, "-m", "lm_eval", "run"),
        *("--model", "vllm" if on_vllm else "hf"),
        *("--model_args", json.dumps(model)),
        *("--tasks", tasks),
        *("--gen_kwargs", json.dumps(generation)),
        *("--batch_size", "auto" if on_vllm else str(batch_size)),
        *("--seed", str(sampling.seed)),
        "--apply_chat_template",
        "--log_samples",
        *("--output_path", str(raw)),
    ]


def read_harness(raw: Path) -> list[tuple[str, dict[str, Any], list[dict[str, Any]]]]:
    """(task, results JSON, samples) of each task of the newest run in a folder of --output_path,
    groups left out.
    """
    path = max(raw.rglob("results_*.json"), key=lambda path: path.name, default=None)
    if path is None:
        raise UserError(f"--harness {HARNESS}: it left no results in {raw}")
    date = path.stem.removeprefix("results_")
    found = parse_json(read_text(path), str(path))
    if not isinstance(found, dict) or not isinstance(found.get("results"), dict):
        raise UserError(f"{path}: results is missing or not an object: run the harness again")
    tasks = []
    for task in found["results"]:
        samples = path.with_name(f"samples_{check_name('the task', task)}_{date}.jsonl")
        if samples.exists():
            tasks.append((task, found, [row for _, row in read_json_lines(samples)]))
    return tasks


def convert(
    recipe: Recipe,
    subject: Subject,
    task: str,
    found: dict[str, Any],
    samples: Sequence[dict[str, Any]],
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Results and responses of one task in our own form; None is what the harness omits.

    The first response to each problem counts. Raises UserError for a task that does not generate
    text, or has none of METRICS.
    """
    metric, chosen = _metric_of(task, found["results"][task])
    samples = [sample for sample in samples if sample["filter"] == chosen]
    texts = [sample["resps"][0][0] for sample in samples]
    if not all(isinstance(text, str) for text in texts):
        raise UserError(
            f"--harness {HARNESS}: task {task!r} generates no text; name a task that does"
        )
    marker = recipe.data.think_close.strip()
    responses = [
        Response(text, len(ids), ended=True)
        for text, ids in zip(texts, _token_ids(subject, texts), strict=True)
    ]
    verdicts = [
        Verdict(
            str(sample["filtered_resps"][0]), correct=sample[metric] == 1, closed=marker in text
        )
        for sample, text in zip(samples, texts, strict=True)
    ]
    problems = [
        Problem(
            str(sample["doc_id"]),
            str(sample["arguments"]["gen_args_0"]["arg_0"]),
            str(sample["target"]),
        )
        for sample in samples
    ]
    config = found["configs"][task]
    content = results(
        recipe,
        subject,
        summarise(responses, verdicts, num_samples=1, num_judge_timeouts=0),
        task=task,
        problems=str(config["dataset_path"]),
        judge=f"{metric},{chosen}",
        backend=f"{HARNESS} {found['lm_eval_version']}, {subject.backend}",
        fingerprint=fingerprint(
            {
                "config": found["config"],
                "task": config,
                "weights": weights_sha256(subject.section.model),
            }
        ),
    )
    unknown = {"unended_fraction": None, "num_judge_timeouts": None}
    rows = [{**row, "ended": None} for row in response_rows(problems, responses, verdicts)]
    return {**content, **unknown, "metrics": found["results"][task]}, rows


def _metric_of(task: str, reported: dict[str, Any]) -> tuple[str, str]:
    """(metric, filter) of keys "metric,filter"."""
    pairs = [tuple(key.split(",", 1)) for key in reported if "," in key]
    for metric in METRICS:
        filters = [chosen for name, chosen in pairs if name == metric]
        if filters:
            return metric, FILTER if FILTER in filters else filters[0]
    raise UserError(
        f"--harness {HARNESS}: task {task!r} reports {', '.join(reported)}, but none of "
        f"{', '.join(METRICS)}"
    )


def _token_ids(subject: Subject, texts: Sequence[str]) -> list[list[int]]:
    return [subject.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
