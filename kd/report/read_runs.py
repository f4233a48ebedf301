"""Run folders as the report sees them: axes, costs, scores, curves, and the facts that a fair
comparison shares.

Files are read as records of any version and not as recipes of today, so that runs of earlier
versions can be reported on.
"""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from kd.errors import UserError
from kd.recipe import LoraSection, RolloutSection, facts_of
from kd.report.evaluations import (
    Evaluation,
    evaluation_files,
    own_scores,
    read_evaluations,
    role_of,
)
from kd.report.fields import REMEDY, flatten
from kd.runs.records import (
    DataRecord,
    EnvironmentRecord,
    Record,
    RecordedEngines,
    RecordedRecipe,
    StepRecord,
    StudyRecord,
    read_record,
    read_steps,
)

NOT_RECORDED = "not recorded"
SECTIONS = ("prompt", "cot", "answer")
MAX_BINS = 100
OF_VARIANT = ("rollout", "student.lora")


class ComparedPair(NamedTuple):
    """What runs must share to be compared at all: two models and a data set."""

    teacher: str
    student: str
    data: str


class Variant(NamedTuple):
    """Which tokens are supervised, not counting how many are kept, and what is trained on them.

    lora: "LoRA of rank 16, alpha 32"; None: the student itself. rollouts: "0.5 sampled by student,
    16 tokens"; None: responses are the data's own.
    """

    sections: str
    window: str
    max_tokens: int | None
    lora: str | None = None
    rollouts: str | None = None

    def __str__(self) -> str:
        limit = f"at most {self.max_tokens} tokens" if self.max_tokens else None
        return ", ".join(filter(None, [self.sections, self.window, limit, *self[3:]]))


class Costs(NamedTuple):
    """Of one run, or means of several. Tokens and FLOPs are of all ranks, memory is of rank 0."""

    training_s: float
    peak_memory_gib: float
    flops: float | None
    num_input_tokens: float
    num_supervised_tokens: float
    flops_of_sampling: float | None  # that wrote responses; no part of flops


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
    cache: Path | None  # of the teacher
    flops_spared: float | None  # by it

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


class Damaged(NamedTuple):
    """A run that is left out, or another file of a study, and why: the reason names file, field
    and value.
    """

    name: str
    path: Path
    reason: str


class RunsRead(NamedTuple):
    """Below the roots of a report: runs, cells that left none, and what cannot be read."""

    runs: list[Run]
    cells: list[StudyCell]
    damaged: list[Damaged]


def read_runs(roots: Sequence[Path]) -> RunsRead:
    """Every run at or below the roots, named by its path below the folder that holds them all, and
    cells not done.

    Raises UserError when a root holds no run. One with a damaged file is left out and named.
    """
    folders = sorted({folder for root in roots for folder in _find_runs(root)})
    base = Path(os.path.commonpath([folder.parent for folder in folders]))
    studies = sorted({folder.parent for folder in folders} | {root.resolve() for root in roots})
    runs: list[Run] = []
    cells: list[StudyCell] = []
    damaged: list[Damaged] = []
    shared = {}
    for study in studies:
        folder, name = study / "references", os.path.relpath(study, base)
        shared[study], unread = _read_references(folder, name)
        damaged += unread
        path = study / "study.json"
        if os.path.lexists(path):
            try:
                cells += _cells_not_done(study)
            except UserError as error:
                damaged.append(Damaged(f"{name}/study.json", path, str(error)))
    for folder in folders:
        name = str(folder.relative_to(base))
        try:
            runs.append(_read_run(folder, name, shared[folder.parent]))
        except UserError as error:
            damaged.append(Damaged(name, folder / "recipe.json", str(error)))
    finished = {run.folder for run in runs if run.is_finished}
    # A job of SLURM that trains a cell may leave it pending in study.json.
    left = [c for c in cells if c.status != "pending" or c.study / c.name not in finished]
    return RunsRead(runs, left, damaged)


def _read_references(folder: Path, name: str) -> tuple[list[Evaluation], list[Damaged]]:
    found, damaged = [], []
    for path in evaluation_files(folder):
        try:
            found += read_evaluations([path])
        except UserError as error:
            damaged.append(Damaged(f"{name}/references/{path.name}", path, str(error)))
    return found, damaged


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
    for cell in read_record(study / "study.json", StudyRecord, REMEDY).cells:
        if cell.status != "done":
            yield StudyCell(study, cell.name, cell.axes, cell.status, cell.text)


def _read_run(folder: Path, name: str, shared: Sequence[Evaluation]) -> Run:
    recipe = read_record(folder / "recipe.json", RecordedRecipe, REMEDY)
    records = read_steps(folder / "metrics.jsonl")
    evaluations = read_evaluations(evaluation_files(folder / "evaluation"))
    scores, notes = own_scores(evaluations, folder, Path(recipe.run.name).name)
    kl_curve, is_of_validation = _kl_curve(records)
    return Run(
        name,
        folder,
        _state(folder, len(records)),
        len(records),
        _pair(recipe),
        _variant(recipe),
        recipe.truncation.keep_fraction,
        recipe.run.seed,
        _costs(records),
        _binned([CurvePoint(r.step, r.loss) for r in records if r.loss is not None]),
        tuple(CurvePoint(r.step, r.val_loss) for r in records if r.val_loss is not None),
        kl_curve,
        is_of_validation,
        scores,
        tuple((role, e) for e in [*evaluations, *shared] if (role := role_of(e, recipe))),
        _facts(folder, recipe),
        tuple(f"{name}: {note}" for note in notes),
        _cache(folder, recipe),
        _sum([record.flops_spared for record in records]),
    )


def _cache(folder: Path, recipe: RecordedRecipe) -> Path | None:
    """Of a study that was moved, the one in its folder."""
    if recipe.teacher is None or recipe.teacher.cache is None:
        return None
    named = Path(recipe.teacher.cache)
    beside = folder.parent / named.name
    return beside if beside.is_dir() else named.absolute()


def _state(folder: Path, num_steps: int) -> str:
    if (folder / "SUCCESS").exists() and num_steps:
        return "finished"
    why = "interrupted" if (folder / "INTERRUPTED").exists() else "not finished (no SUCCESS)"
    return f"{why} after step {num_steps}"


def _pair(recipe: RecordedRecipe) -> ComparedPair:
    teacher = recipe.teacher.model if recipe.teacher else "no teacher"
    data = " + ".join(table.path or table.source for table in recipe.data.sources)
    return ComparedPair(
        teacher, recipe.student.model, data or recipe.data.path or recipe.data.source
    )


def _variant(recipe: RecordedRecipe) -> Variant:
    """Windows that keep the same tokens are one: all of them at keep_fraction = 1, and "head" with
    any context.
    """
    truncation, sections = recipe.truncation, recipe.data.loss_sections
    window = truncation.window
    if truncation.keep_fraction == 1.0 and truncation.max_tokens is None:
        window = "head"
    if window != "head" and truncation.window_context == "keep":
        window += " with context"
    joined = "+".join(name for name in SECTIONS if name in sections)
    told = _lora(recipe), _rollouts(recipe)
    return Variant(joined, window, truncation.max_tokens, *told)


def _lora(recipe: RecordedRecipe) -> str | None:
    """All of [student.lora]."""
    lora = recipe.student.lora
    if lora is None:
        return None
    usual = LoraSection().model_dump(mode="json") | {"rank": lora.rank, "alpha": lora.alpha}
    return ", ".join([f"LoRA of rank {lora.rank}, alpha {lora.alpha:g}", *_unusual(lora, usual)])


def _rollouts(recipe: RecordedRecipe) -> str | None:
    """All of [rollout] that says what is learned."""
    rollout = recipe.rollout
    if rollout is None:
        return None
    words = f"{rollout.fraction:g} sampled by {rollout.source}, {rollout.max_new_tokens} tokens"
    told = ("fraction", "source", "max_new_tokens", "gather")
    usual = RolloutSection().model_dump(mode="json")
    usual |= {key: value for key, value in rollout.as_read().items() if key in told}
    return ", ".join([words, *_unusual(rollout, usual)])


def _unusual(table: Record, usual: Mapping[str, Any]) -> list[str]:
    return [f"{key} {value}" for key, value in table.as_read().items() if value != usual.get(key)]


def _costs(records: list[StepRecord]) -> Costs:
    return Costs(
        training_s=sum(record.step_ms for record in records) / 1000,
        peak_memory_gib=max((record.peak_memory_gib for record in records), default=0.0),
        flops=_sum([record.flops for record in records]),
        num_input_tokens=sum(record.num_input_tokens for record in records),
        num_supervised_tokens=sum(record.num_supervised_tokens for record in records),
        flops_of_sampling=_sum([record.flops_of_sampling for record in records]),
    )


def _sum(values: Sequence[float | None]) -> float | None:
    """None where one is not known."""
    known = [value for value in values if value is not None]
    return math.fsum(known) if len(known) == len(values) else None


def _binned(points: list[CurvePoint]) -> tuple[CurvePoint, ...]:
    """Means of consecutive points, so that at most MAX_BINS remain."""
    size = max(1, math.ceil(len(points) / MAX_BINS))
    bins = [points[start : start + size] for start in range(0, len(points), size)]
    return tuple(
        CurvePoint(sum(p.x for p in part) / len(part), sum(p.y for p in part) / len(part))
        for part in bins
    )


def _kl_curve(records: list[StepRecord]) -> tuple[tuple[CurvePoint, ...], bool]:
    """By position in the whole trace, of the last validation, else of the last step; and whether of
    a validation.
    """
    validated = [record.val_diagnostics for record in records if record.val_diagnostics]
    recorded = validated or [record.diagnostics for record in records if record.diagnostics]
    if not recorded:
        return (), False
    parts = recorded[-1].by_position
    points = [
        CurvePoint((i + 0.5) / len(parts), part.forward_kl)
        for i, part in enumerate(parts)
        if part is not None and part.forward_kl is not None
    ]
    return tuple(points), bool(validated)


def _facts(folder: Path, recipe: RecordedRecipe) -> dict[str, str]:
    """All that may differ between runs and should not, by name."""
    content = recipe.as_read()
    sections = {name: values for name, values in content.items() if name != "format_version"}
    facts = {key: value for key, value in flatten("", sections) if _is_compared(key)}
    for name, kind in (("environment", EnvironmentRecord), ("ds_config", RecordedEngines)):
        path = folder / f"{name}.json"
        if os.path.lexists(path):
            facts |= flatten(f"{name}.", read_record(path, kind, REMEDY).as_read())
    path = folder / "data.json"
    if os.path.lexists(path):
        facts["data.fingerprint"] = read_record(path, DataRecord, REMEDY).fingerprint
    return facts


def _is_compared(key: str) -> bool:
    facts = facts_of(key)
    of_variant = key.startswith(OF_VARIANT)
    return facts.is_compared and not facts.is_axis and not of_variant
