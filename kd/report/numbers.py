"""All numbers of a report as plain values, for other programs: the content of report.json."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kd.report.compare import Family, Score, SeedGroup
from kd.report.headline import Headline, headlines
from kd.report.read_runs import Costs, Damaged, Run, RunsRead


def numbers(families: Sequence[Family], found: RunsRead, output: Path) -> dict[str, Any]:
    """Paths are relative to `output`; null is not recorded, or not comparable."""
    return {
        "comparisons": [_family(family, output) for family in families],
        "runs": [_run(run, output) for run in found.runs],
        "not_done": [
            {
                "study": _relative(cell.study, output),
                **{key: getattr(cell, key) for key in ("name", "axes")},
            }
            | {"status": cell.status, "text": cell.text}
            for cell in found.cells
        ],
        **_left_out(found.damaged, output),
    }


def _left_out(damaged: Sequence[Damaged], output: Path) -> dict[str, Any]:
    rows = [
        {"name": name, "file": _relative(path, output), "reason": reason}
        for name, path, reason in damaged
    ]
    return {"left_out": rows} if rows else {}


def _family(family: Family, output: Path) -> dict[str, Any]:
    knees = [
        (task, variant, family.knee(variant, task))
        for task in family.tasks
        for variant in family.variants
    ]
    return {
        **family.pair._asdict(),
        "answers": [_answer(family, answer) for answer in headlines(family)],
        "references": {
            task: [{"role": role, **_score(score, output)} for role, score in scores]
            for task, scores in family.references.items()
        },
        "cells": [_cell(family, cell, output) for cell in family.cells],
        "knees": [
            {
                "task": task,
                **variant._asdict(),
                "keep_fraction": knee.cell.keep_fraction,
                "cheapest_by": knee.cost,
            }
            for task, variant, knee in knees
            if knee
        ],
        "differences": [difference._asdict() for difference in family.differences],
    }


def _answer(family: Family, answer: Headline) -> dict[str, Any]:
    cell, knee, task = answer.cell, answer.knee, answer.task
    content = {
        "task": task,
        "text": answer.text,
        "notes": answer.notes,
        "runs": [run.name for run in answer.runs],
        "differences": [difference._asdict() for difference in answer.differences],
    }
    if cell is None or knee is None or task is None:
        return content
    return {
        **content,
        "keep_fraction": cell.keep_fraction,
        **cell.variant._asdict(),
        **_kept(family, cell, task),
        "costs_relative_to_full": _relative_costs(family, cell),
        "knee": {
            "keep_fraction": knee.cell.keep_fraction,
            **_kept(family, knee.cell, task),
            "costs_relative_to_full": _relative_costs(family, knee.cell),
            "cheapest_by": knee.cost,
        },
    }


def _kept(family: Family, cell: SeedGroup, task: str) -> dict[str, Any]:
    return {"kept": family.kept(cell, task), "kept_ci95": family.kept_interval(cell, task)}


def _relative_costs(family: Family, cell: SeedGroup) -> dict[str, float | None]:
    return {name: family.relative_cost(cell, name) for name in Costs._fields}


def _cell(family: Family, cell: SeedGroup, output: Path) -> dict[str, Any]:
    scores = {
        task: {**_score(score, output), **_kept(family, cell, task)}
        for task, score in cell.scores.items()
    }
    return {
        "keep_fraction": cell.keep_fraction,
        **cell.variant._asdict(),
        "runs": [run.name for run in cell.runs],
        "costs": cell.costs._asdict(),
        "costs_relative_to_full": _relative_costs(family, cell),
        "scores": scores,
    }


def _score(score: Score, output: Path) -> dict[str, Any]:
    files = [_relative(evaluation.path, output) for evaluation in score.evaluations]
    return {**score._asdict(), "evaluations": files}


def _run(run: Run, output: Path) -> dict[str, Any]:
    return {
        "name": run.name,
        "folder": _relative(run.folder, output),
        "state": run.state,
        "num_steps": run.num_steps,
        **run.pair._asdict(),
        "keep_fraction": run.keep_fraction,
        **run.variant._asdict(),
        "seed": run.seed,
        "costs": run.costs._asdict(),
        "accuracy": {task: e.accuracy for task, e in run.scores.items()},
        "loss_by_step": run.loss_curve,
        "val_loss_by_step": run.val_loss_curve,
        "forward_kl_by_position": run.kl_curve,
        "forward_kl_is_of_validation": run.kl_is_of_validation,
    }


def _relative(path: Path, output: Path) -> str:
    return os.path.relpath(path, output.resolve())
