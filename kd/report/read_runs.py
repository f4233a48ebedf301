"""Run folders as the report sees them: axes, costs, scores, curves, and the facts that a fair
comparison shares.

Files are read as plain JSON and not as recipes of today, so that runs of earlier versions can be
reported on.
"""

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from kd.errors import UserError
from kd.recipe import check_format_version, facts_of
from kd.report.evaluations import Evaluation, own_scores, read_evaluations, role_of
from kd.report.fields import field, flatten, read_json
from kd.runs.records import read_metrics

NOT_RECORDED = "not recorded"
SECTIONS = ("prompt", "cot", "answer")
MAX_BINS = 100


class ComparedPair(NamedTuple):
    """What runs must share to be compared at all: two models and a data set."""

    teacher: str
    student: str
    data: str


class Variant(NamedTuple):
    """Which tokens are supervised, apart from how many are kept."""

    sections: str
    window: str
    max_tokens: int | None

    def __str__(self) -> str:
        limit = f", at most {self.max_tokens} tokens" if self.max_tokens else ""
        return f"{self.sections}, {self.window}{limit}"


class Costs(NamedTuple):
    """Of one run, or means of several. Tokens and FLOPs are of all ranks, memory is of rank 0."""

    training_s: float
    peak_memory_gib: float
    flops: float | None
    num_input_tokens: float
    num_supervised_tokens: float


class CurvePoint(NamedTuple):
    x: float
    y: float


@dataclass(frozen=True)
class Run:
    """Curves hold points of (step, loss), and of (middle of an eighth of the whole trace, forward
    KL in nats).
    """

    name: str
    folder: Path
    state: str  # "finished", or why it is not
    num_steps: int
    pair: ComparedPair
    variant: Variant
    keep_fraction: float
    seed: int
    costs: Costs
    loss_curve: tuple[CurvePoint, ...]
    val_loss_curve: tuple[CurvePoint, ...]
    kl_curve: tuple[CurvePoint, ...]
    kl_is_of_validation: bool
    scores: dict[str, Evaluation]  # task -> the exported student's
    references: tuple[tuple[str, Evaluation], ...]  # role, and its evaluation
    facts: dict[str, str]
    notes: tuple[str, ...]

    @property
    def is_finished(self) -> bool:
        return self.state == "finished"


@dataclass(frozen=True)
class StudyCell:
    """A cell of a study that left no finished run."""

    study: Path
    name: str
    axes: dict[str, Any]
    status: str
    text: str


def read_runs(roots: Sequence[Path]) -> tuple[list[Run], list[StudyCell]]:
    """Every run at or below the roots, named by its path below the folder that holds them all, and
    cells not done.

    Raises UserError when a root holds no run, and for a file that cannot be read or lacks a field.
    """
    folders = sorted({folder for root in roots for folder in _find_runs(root)})
    base = Path(os.path.commonpath([folder.parent for folder in folders]))
    studies = sorted({folder.parent for folder in folders} | {root.resolve() for root in roots})
    runs = [_read_run(folder, str(folder.relative_to(base))) for folder in folders]
    finished = {run.folder for run in runs if run.is_finished}
    cells = [
        cell
        for study in studies
        if (study / "study.json").is_file()
        for cell in _cells_not_done(study)
    ]
    # A job of SLURM trains a cell, and tells its study nothing.
    return runs, [
        cell for cell in cells if cell.status != "pending" or cell.study / cell.name not in finished
    ]


def _find_runs(root: Path) -> list[Path]:
    """Folders with recipe.json and metrics.jsonl; nothing is looked for inside a run."""
    found = []
    for folder, subfolders, files in os.walk(root.resolve()):
        if {"recipe.json", "metrics.jsonl"} <= set(files):
            found.append(Path(folder))
            subfolders.clear()
    if not found:
        raise UserError(
            f"RUNS = {str(root)!r}: no run is there, or below it: name folders that hold a "
            "recipe.json and a metrics.jsonl, such as runs/NAME, or a folder of such folders"
        )
    return found


def _cells_not_done(study: Path) -> Iterator[StudyCell]:
    path = study / "study.json"
    for cell in field(path, read_json(path), "cells"):
        if field(path, cell, "status") != "done":
            yield StudyCell(
                study,
                field(path, cell, "name"),
                cell.get("axes", {}),
                cell["status"],
                cell.get("text", ""),
            )


def _read_run(folder: Path, name: str) -> Run:
    path = folder / "recipe.json"
    recipe = read_json(path)
    check_format_version(path, recipe)
    records = _read_records(folder / "metrics.jsonl")
    evaluations = read_evaluations(folder / "evaluation")
    shared = read_evaluations(folder.parent / "references")
    run_name = field(path, recipe, "run.name")
    scores, notes = own_scores(evaluations, folder, Path(run_name).name)
    kl_curve, is_of_validation = _kl_curve(records)
    return Run(
        name,
        folder,
        _state(folder, len(records)),
        len(records),
        _pair(path, recipe),
        _variant(path, recipe),
        field(path, recipe, "truncation.keep_fraction"),
        field(path, recipe, "run.seed"),
        _costs(records),
        _binned([CurvePoint(r["step"], r["loss"]) for r in records if r["loss"] is not None]),
        tuple(
            CurvePoint(r["step"], r["val_loss"]) for r in records if r.get("val_loss") is not None
        ),
        kl_curve,
        is_of_validation,
        scores,
        tuple((role, e) for e in [*evaluations, *shared] if (role := role_of(e, recipe))),
        _facts(folder, recipe),
        tuple(f"{name}: {note}" for note in notes),
    )


def _state(folder: Path, num_steps: int) -> str:
    if (folder / "SUCCESS").exists() and num_steps:
        return "finished"
    why = "interrupted" if (folder / "INTERRUPTED").exists() else "not finished (no SUCCESS)"
    return f"{why} after step {num_steps}"


def _pair(path: Path, recipe: dict[str, Any]) -> ComparedPair:
    teacher = field(path, recipe, "teacher.model") if recipe.get("teacher") else "no teacher"
    data = field(path, recipe, "data")
    return ComparedPair(
        teacher,
        field(path, recipe, "student.model"),
        data.get("path") or field(path, recipe, "data.source"),
    )


def _variant(path: Path, recipe: dict[str, Any]) -> Variant:
    """Windows that keep the same tokens are one: all of them at keep_fraction = 1, and "head" with
    any context.
    """
    truncation = field(path, recipe, "truncation")
    sections = field(path, recipe, "data.loss_sections")
    max_tokens = truncation.get("max_tokens")
    window = truncation.get("window", "head")
    if truncation.get("keep_fraction") == 1.0 and max_tokens is None:
        window = "head"
    if window != "head" and truncation.get("window_context") == "keep":
        window += " with context"
    return Variant("+".join(name for name in SECTIONS if name in sections), window, max_tokens)


def _costs(records: list[dict[str, Any]]) -> Costs:
    flops: list[Any] = [record.get("flops") for record in records]
    return Costs(
        training_s=sum(record["step_ms"] for record in records) / 1000,
        peak_memory_gib=max((record["peak_memory_gib"] for record in records), default=0.0),
        flops=None if None in flops else math.fsum(flops),
        num_input_tokens=sum(record["num_input_tokens"] for record in records),
        num_supervised_tokens=sum(record["num_supervised_tokens"] for record in records),
    )


def _binned(points: list[CurvePoint]) -> tuple[CurvePoint, ...]:
    """Means of consecutive points, so that at most MAX_BINS remain."""
    size = max(1, math.ceil(len(points) / MAX_BINS))
    bins = [points[start : start + size] for start in range(0, len(points), size)]
    return tuple(
        CurvePoint(sum(p.x for p in part) / len(part), sum(p.y for p in part) / len(part))
        for part in bins
    )


def _kl_curve(records: list[dict[str, Any]]) -> tuple[tuple[CurvePoint, ...], bool]:
    """By position in the whole trace, of the last validation, else of the last step; and whether of
    a validation.
    """
    for key in ("val_diagnostics", "diagnostics"):
        recorded = [record[key]["by_position"] for record in records if record.get(key)]
        if recorded:
            means = [part["forward_kl"] if part else None for part in recorded[-1]]
            points = [
                CurvePoint((i + 0.5) / len(means), mean)
                for i, mean in enumerate(means)
                if mean is not None
            ]
            return tuple(points), key == "val_diagnostics"
    return (), False


def _facts(folder: Path, recipe: dict[str, Any]) -> dict[str, str]:
    """All that may differ between runs and should not, by name."""
    sections = {name: values for name, values in recipe.items() if name != "format_version"}
    facts = {key: value for key, value in flatten("", sections) if _is_compared(key)}
    for name in ("environment", "ds_config"):
        path = folder / f"{name}.json"
        if path.exists():
            facts |= flatten(f"{name}.", read_json(path))
    if (folder / "data.json").exists():
        facts["data.fingerprint"] = field(
            folder / "data.json", read_json(folder / "data.json"), "fingerprint"
        )
    return facts


def _is_compared(key: str) -> bool:
    facts = facts_of(key)
    return facts.is_compared and not facts.is_axis


def _read_records(path: Path) -> list[dict[str, Any]]:
    records = read_metrics(path)
    for record in records:
        for key in (
            "step",
            "loss",
            "step_ms",
            "peak_memory_gib",
            "num_input_tokens",
            "num_supervised_tokens",
        ):
            field(path, record, key)
    return records
