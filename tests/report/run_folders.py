"""Run folders as training and evaluation leave them, written in an instant: their numbers are made
up.
"""

import json
import math
from pathlib import Path
from typing import Any

from kd.files import write_json, write_jsonl

TEACHER, STUDENT = "models/teacher", "models/student"
PROBLEMS = "problems/report.jsonl"
NUM_POSITIONS = 8
RECIPE: dict[str, Any] = {
    "teacher": {"model": TEACHER},
    "student": {"model": STUDENT},
    "data": {
        "source": "local",
        "path": "traces.jsonl",
        "loss_sections": ["prompt", "cot", "answer"],
    },
    "truncation": {
        "keep_fraction": 1.0,
        "max_tokens": None,
        "window": "head",
        "window_context": "drop",
    },
    "training": {"learning_rate": 1e-4},
    "evaluation": {"path": PROBLEMS},
}
ENVIRONMENT = {
    "python": "3.11.7",
    "packages": {"torch": "2.13.0"},
    "commit": "abc",
    "gpus": [],
    "num_cpus": 2,
}


def write_run(
    folder: Path,
    *,
    keep_fraction: float = 1.0,
    seed: int = 0,
    num_correct: int | None = None,
    num_problems: int = 100,
    steps: list[dict[str, Any]] | None = None,
    finished: bool = True,
    environment: dict[str, Any] = ENVIRONMENT,
    **changes: Any,
) -> Path:
    """A run of two steps, or of `steps`; evaluated when num_correct is given. changes:
    truncation__window="tail", or a whole section, rollout={...}.
    """
    recipe = json.loads(json.dumps(RECIPE)) | {
        "run": {"name": folder.name, "output_dir": "runs", "seed": seed}
    }
    recipe["truncation"]["keep_fraction"] = keep_fraction
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            recipe[section][name] = value
        else:
            recipe[section] = value
    write_json(folder / "recipe.json", recipe)
    write_json(folder / "environment.json", environment)
    write_jsonl(
        folder / "metrics.jsonl", [step_record(1), step_record(2)] if steps is None else steps
    )
    if finished:
        write_json(folder / "SUCCESS", {})
    if num_correct is not None:
        write_evaluation(
            folder / "evaluation" / "student-after.json",
            f"elsewhere/{folder.name}/export/best",
            num_correct=num_correct,
            num_problems=num_problems,
        )
    return folder


def step_record(step: int, **changes: Any) -> dict[str, Any]:
    record = {
        "step": step,
        "loss": 1.0 / step,
        "step_ms": 500.0,
        "peak_memory_gib": 1.0,
        "flops": 1e12,
    }
    return (
        record
        | {"num_input_tokens": 100, "num_supervised_tokens": 90, "diagnostics": None}
        | changes
    )


def write_evaluation(
    path: Path,
    model: str,
    *,
    num_correct: int,
    num_problems: int = 100,
    label: str | None = None,
    **changes: Any,
) -> Path:
    content = {
        "label": label or path.name.partition(".")[0],
        "model": model,
        "problems": PROBLEMS,
        "judge": "exact",
    }
    numbers = {
        "accuracy": num_correct / num_problems / changes.get("num_samples", 1),
        "num_correct": num_correct,
        "num_problems": num_problems,
    }
    responses: dict[str, Any] = {
        "mean_response_tokens": 70.0,
        "unclosed_fraction": 0.0,
        "ci95": [0.0, 1.0],
        "sampling": {"temperature": 0.0, "seed": 0},
    }
    write_json(path, content | numbers | responses | changes)
    return path


def write_study(folder: Path) -> Path:
    """Four lengths of three seeds, loss sections and windows at half the length, and cells that
    came to nothing.
    """
    for keep_fraction in (0.25, 0.5, 0.75, 1.0):
        for seed in range(3):
            _study_run(folder, keep_fraction, seed)
    for sections in (["prompt", "cot"], ["cot"], ["prompt"]):
        _study_run(folder, 0.5, 0, sections=sections)
    for window, context in (("middle", "drop"), ("tail", "drop"), ("tail", "keep")):
        _study_run(folder, 0.5, 0, window=window, context=context)
    for label, model, num_correct in (("teacher", TEACHER, 290), ("student-before", STUDENT, 60)):
        write_evaluation(
            folder / "references" / f"{label}.json",
            model,
            num_correct=num_correct,
            num_problems=300,
        )
    _study_run(folder, 0.75, 3, finished=False)
    axes = {"keep_fraction": 0.25, "sections": "answer", "window": "head", "seed": 0}
    text = "data.loss_sections: no token of an answer is kept"
    cells = [
        {"name": "keep0.25_answer", "axes": axes, "status": "no_supervised_token", "text": text},
        {"name": "keep0.5", "axes": axes | {"keep_fraction": 0.5}, "status": "pending", "text": ""},
        {
            "name": "keep1_seed0",
            "axes": axes | {"keep_fraction": 1.0},
            "status": "done",
            "text": "",
        },
    ]
    write_json(folder / "study.json", {"recipe": "tiny", "cells": cells})
    return folder


def _study_run(
    folder: Path,
    keep_fraction: float,
    seed: int,
    sections: list[str] | None = None,
    window: str = "head",
    context: str = "drop",
    finished: bool = True,
) -> None:
    sections = sections or ["prompt", "cot", "answer"]
    name = f"keep{keep_fraction:g}_{'+'.join(sections)}_{window}_{context}_seed{seed}"
    skill = (
        (1 - math.exp(-5 * keep_fraction))
        * (1.0 if window == "head" else 0.7)
        * (0.4 + 0.2 * len(sections))
    )
    num_tokens = round(2500 * keep_fraction)
    steps = []
    for step in range(1, 201):
        loss = (
            0.25
            + 2 * (1.2 - keep_fraction) * math.exp(-step / 40)
            + 0.03 * math.sin(step * (seed + 1))
        )
        record = {
            "loss": loss,
            "num_input_tokens": num_tokens,
            "num_supervised_tokens": num_tokens - 32,
            "flops": 2.4e9 * num_tokens,
        }
        record |= {
            "step_ms": 110 + 170 * keep_fraction + 4 * seed,
            "peak_memory_gib": 0.54 + 0.13 * keep_fraction,
        }
        if step % 100 == 0:
            record |= {
                "val_loss": loss + 0.02,
                "val_diagnostics": _diagnostics(keep_fraction, seed),
            }
        steps.append(step_record(step, **record))
    run = write_run(
        folder / name,
        keep_fraction=keep_fraction,
        seed=seed,
        num_correct=round(300 * skill) - 6 * seed if finished else None,
        num_problems=300,
        steps=steps,
        finished=finished,
        data__loss_sections=sections,
        truncation__window=window,
        truncation__window_context=context,
    )
    path = run / "evaluation" / "student-after.json"
    if finished:
        evaluation = json.loads(path.read_text())
        evaluation |= {
            "unclosed_fraction": 0.3 * (1 - keep_fraction),
            "mean_response_tokens": 60 + 10 * keep_fraction,
        }
        write_json(path, evaluation)


def _diagnostics(keep_fraction: float, seed: int) -> dict[str, Any]:
    num_kept = round(NUM_POSITIONS * keep_fraction)
    kept = [
        {
            "forward_kl": 0.1 / (i + 1) + 0.05 * keep_fraction + 0.003 * seed,
            "num_supervised_tokens": 100,
        }
        for i in range(num_kept)
    ]
    return {"by_position": [*kept, *[None] * (NUM_POSITIONS - num_kept)]}
