"""A run's folder: which run it holds, whether that may be continued, and where files go.

recipe.json        the resolved recipe
ds_config.json     the JSON of both engines
environment.json   versions, commit, hardware
data.json          what the data filters did
plan.json          planned cost, and measured
metrics.jsonl      one line per optimizer step
checkpoints/       step_N, whole or absent
export/last, best  the student, as from_pretrained loads it
SUCCESS            written last
INTERRUPTED        in its place when a signal stopped the run
NOTHING_TO_LEARN   in its place, with the reason, when no token would have been supervised
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kd.engine.checkpoint import remove_partial, step_folders
from kd.engine.ds_config import read_ds_config
from kd.errors import UserError
from kd.files import write_json
from kd.recipe import Recipe, default_of, facts_of
from kd.runs.environment import environment
from kd.runs.lock import hold
from kd.runs.records import (
    DataRecord,
    RecordedEngines,
    RecordedRecipe,
    read_metrics,
    read_record,
)

SUCCESS, INTERRUPTED, METRICS = "SUCCESS", "INTERRUPTED", "metrics.jsonl"
NOTHING_TO_LEARN = "NOTHING_TO_LEARN"
REMEDY = "restore it, or start another run with --set run.name=NAME"


def open_run(recipe: Recipe, resume: str | None) -> None:
    """Make the run's folder, or check that it may be continued. Rank 0 calls it, before anything is
    allocated.

    Holds the folder for the life of this process. Raises UserError when another process does, when
    the folder holds a run and --resume is absent, or another recipe's run. A folder whose run never
    took a step, for an error in the recipe say, is taken over.
    """
    folder = recipe.run_dir
    _check_may_begin(recipe, resume)
    try:
        hold(folder)
    except OSError as error:
        raise _cannot_write(recipe, error) from error
    _check_may_begin(recipe, resume)  # another process may have begun it in the meantime
    try:
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        remove_partial(folder / "checkpoints")
        for marker in (SUCCESS, INTERRUPTED, NOTHING_TO_LEARN):
            (folder / marker).unlink(missing_ok=True)
        for name, content in _facts(recipe).items():
            write_json(folder / name, content)
        write_json(folder / "environment.json", environment())
    except OSError as error:
        raise _cannot_write(recipe, error) from error


def _check_may_begin(recipe: Recipe, resume: str | None) -> None:
    if resume is None and _has_begun(recipe.run_dir):
        raise UserError(
            f"{recipe.run_dir} already holds a run: continue it with --resume auto, or choose "
            "another folder with --set run.name=NAME"
        )
    check_same_run(recipe)


def _cannot_write(recipe: Recipe, error: OSError) -> UserError:
    return UserError(
        f"run.output_dir = {recipe.run.output_dir!r}: cannot write to {recipe.run_dir}: {error}"
    )


def check_same_run(recipe: Recipe) -> None:
    """Raise UserError when the recipe's folder holds a run that was begun with another recipe."""
    folder = recipe.run_dir
    if not _has_begun(folder):
        return
    read_metrics(folder / METRICS)
    there = {
        "recipe.json": read_record(folder / "recipe.json", RecordedRecipe, REMEDY),
        "ds_config.json": read_record(folder / "ds_config.json", RecordedEngines, REMEDY),
    }
    changed = [
        difference
        for name, new in _facts(recipe).items()
        for difference in _differences(there[name].as_read(), new)
    ]
    if changed:
        listing = "\n".join(f"  {key}: {old!r} there, {new!r} here" for key, old, new in changed)
        raise UserError(
            f"{folder} holds the run of another recipe:\n"
            f"{listing}\n"
            "Use the same recipe, or another folder with --set run.name=NAME. To train a finished "
            "student further, start a new run with its export as student.model"
        )


def record_data(folder: Path, report: str, fingerprints: Mapping[int, str]) -> None:
    """Write data.json, or check that a run that is continued has the data that it began with. Rank
    0 calls it.

    fingerprints: by format_version of data.json, the oldest of which states none.
    """
    path = folder / "data.json"
    if _has_begun(folder):
        there = read_record(path, DataRecord, REMEDY)
        if there.fingerprint != fingerprints[there.format_version]:
            raise UserError(
                f"{folder} was started with other data: rows or their tokens have changed since. "
                "Restore them, or use --set run.name=NAME\n"
                "there:\n"
                f"{there.report}\n"
                "here:\n"
                f"{report}"
            )
    version = max(fingerprints)
    write_json(
        path, {"format_version": version, "fingerprint": fingerprints[version], "report": report}
    )


def as_begun(recipe: Recipe) -> Recipe:
    """The recipe with the value that its run began with instead of each "auto"; unchanged if no run
    has begun.
    """
    if not recipe.autos or not _has_begun(recipe.run_dir):
        return recipe
    there = read_record(recipe.run_dir / "recipe.json", RecordedRecipe, REMEDY).as_read()
    names = (name.partition(".") for name in recipe.autos)
    recorded = {f"{section}.{key}": (there[section] or {}).get(key) for section, _, key in names}
    # A recipe.json from before there was that key has what was then the only way
    values = {name: default_of(name) if v is None else v for name, v in recorded.items()}
    return recipe.with_values(values)


def _has_begun(folder: Path) -> bool:
    metrics = folder / METRICS
    return bool(step_folders(folder / "checkpoints")) or (
        metrics.exists() and metrics.stat().st_size > 0
    )


def _facts(recipe: Recipe) -> dict[str, Any]:
    return {"recipe.json": recipe.as_file(), "ds_config.json": _ds_configs(recipe)}


def _ds_configs(recipe: Recipe) -> dict[str, Any]:
    teacher = {"teacher": read_ds_config(recipe, "teacher")} if recipe.teacher else {}
    return {"student": read_ds_config(recipe, "student"), **teacher}


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(section.key, old, new) of what differs and matters."""
    found = []
    for section in new.keys() - {"format_version"}:
        before, after = old.get(section) or {}, new[section] or {}
        for key in sorted(before.keys() | after.keys()):
            name = f"{section}.{key}"
            was = before.get(key, default_of(name))  # a file from before there was that key
            if was != after.get(key) and not facts_of(name).may_change:
                found.append((name, was, after.get(key)))
    return sorted(found, key=lambda difference: difference[0])
