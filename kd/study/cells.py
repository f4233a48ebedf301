"""The cells of a study: which part of the traces each trains on, and from which seed.

An axis is a field of the recipe. One is varied at a time around the recipe's own values, or all are
crossed.
"""

import argparse
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args

from kd.cli import CacheRequest
from kd.errors import UserError
from kd.files import write_json
from kd.recipe import Recipe, SectionName, TruncationSection, load_recipe
from kd.runs.records import FILLED, StudyRecord, read_record

AXES = ("keep_fraction", "sections", "window", "rollout_tokens")
MAX_SEEDS = 1000
REMEDY = "restore it or remove it; cells that are trained and scored are kept"
WINDOWS = get_args(TruncationSection.model_fields["window"].annotation)


@dataclass(frozen=True)
class Axes:
    """The values to vary; an empty axis stays as the recipe has it."""

    keep_fraction: tuple[float, ...] = ()
    sections: tuple[tuple[str, ...], ...] = ()
    window: tuple[str, ...] = ()
    rollout_tokens: tuple[int, ...] = ()
    num_seeds: int = 1  # the recipe's seed and those after it
    cross: bool = False


@dataclass(frozen=True)
class Point:
    """Where a cell lies on the axes. rollout_tokens: None for a recipe without [rollout]."""

    keep_fraction: float
    sections: tuple[str, ...]
    window: str
    seed: int
    rollout_tokens: int | None = None

    @property
    def name(self) -> str:
        parts = [f"keep{self.keep_fraction:g}", "+".join(self.sections), self.window]
        parts += [f"rollout{self.rollout_tokens}"] if self.rollout_tokens else []
        return "_".join([*parts, f"seed{self.seed}"])

    def as_json(self) -> dict[str, Any]:
        axes = vars(self) | {"sections": "+".join(self.sections)}
        return {axis: value for axis, value in axes.items() if value is not None}


@dataclass(frozen=True)
class Cell:
    point: Point
    recipe: Recipe


@dataclass(frozen=True)
class Study:
    """A folder of runs, one for each cell.

    cache_request: the teacher's cache that all cells read; None: each cell runs the teacher.
    """

    name: str
    folder: Path
    cells: tuple[Cell, ...]
    cache_request: CacheRequest | None = None

    @property
    def cache(self) -> Path:
        """Where it is, if there is one."""
        return self.folder / "cache"

    @property
    def awaits_cache(self) -> bool:
        """Whether it is still to be filled, before the cells."""
        return self.cache_request is not None and not (self.cache / FILLED).exists()


@dataclass(frozen=True)
class Outcome:
    """How far a cell is; text: its accuracy, or why there is none."""

    status: Literal["pending", "done", "no_supervised_token", "failed"] = "pending"
    text: str = ""


def parse_axes(
    keep: str | None,
    sections: str | None,
    windows: str | None,
    num_seeds: int,
    cross: bool,
    rollout_tokens: str | None = None,
) -> Axes:
    """Axes from text, as "0.5,1.0", "cot,prompt+cot", "head,tail", "16,32". Raises UserError."""
    if not 1 <= num_seeds <= MAX_SEEDS:
        raise UserError(f"--seeds {num_seeds}: write a number from 1 to {MAX_SEEDS}")
    return Axes(
        parse_fractions(keep),
        tuple(_names(text) for text in _split("--sections", sections)),
        tuple(_window(text) for text in _split("--windows", windows)),
        tuple(_num_tokens(text) for text in _split("--rollout-tokens", rollout_tokens)),
        num_seeds,
        cross,
    )


def axes_of(arguments: argparse.Namespace) -> Axes:
    """Of kd.cli.axis_arguments. Raises UserError."""
    return parse_axes(
        arguments.keep,
        arguments.sections,
        arguments.windows,
        arguments.seeds,
        arguments.cross,
        arguments.rollout_tokens,
    )


def parse_fractions(keep: str | None) -> tuple[float, ...]:
    """Of --keep 0.25,0.5,1.0. Raises UserError for one that is none."""
    return tuple(_fraction(text) for text in _split("--keep", keep))


def make_study(
    name: str,
    overrides: list[str],
    axes: Axes,
    folder: Path | None = None,
    cache_request: CacheRequest | None = None,
) -> Study:
    """The study of a recipe: by default in run.output_dir/studies/RECIPE.

    The cells of one seed come before those of the next, so that the first figures are there early.
    Raises UserError.
    """
    base = load_recipe(name, overrides)
    folder = folder or Path(base.run.output_dir) / "studies" / base.run.name
    # An axis at the recipe's own value is the same cell on every axis
    points = dict.fromkeys(_points(base, axes))
    if (
        axes.window
        and all(point.window == "head" for point in points)
        and set(axes.window) != {"head"}
    ):
        raise UserError(
            f"--windows {','.join(axes.window)}: at truncation.keep_fraction = "
            f"{base.truncation.keep_fraction:g} nothing is cut, so all windows are the same: use "
            "--set truncation.keep_fraction=0.5, or --cross with --keep"
        )
    _check_names(points)
    if cache_request is not None:
        if base.teacher is None:
            raise UserError(f"--cache: {base.run.name} has no [teacher]: leave out --cache")
        base = base.with_values({"teacher.cache": str(folder / "cache")})
    cells = tuple(Cell(point, _recipe_at(base, point, folder)) for point in points)
    return Study(base.run.name, folder, cells, cache_request)


def write_study(study: Study, outcomes: Mapping[Point, Outcome] = MappingProxyType({})) -> None:
    """study.json, and each cell's recipe; cells of an earlier start stay."""
    path = study.folder / "study.json"
    earlier = read_record(path, StudyRecord, REMEDY).cells if os.path.lexists(path) else []
    rows = {row.name: row.as_read() for row in earlier}
    for cell in study.cells:
        name, outcome = cell.point.name, outcomes.get(cell.point)
        if outcome or name not in rows:
            rows[name] = {"name": name, "axes": cell.point.as_json(), **vars(outcome or Outcome())}
        write_json(recipe_file(study, cell), cell.recipe.as_file())
    write_json(path, {"recipe": study.name, "cells": list(rows.values())})


def recipe_file(study: Study, cell: Cell) -> Path:
    return study.folder / "recipes" / f"{cell.point.name}.json"


def _points(base: Recipe, axes: Axes) -> Iterator[Point]:
    own = Point(
        base.truncation.keep_fraction,
        base.data.loss_sections,
        base.truncation.window,
        base.run.seed,
        base.rollout.max_new_tokens if base.rollout else None,
    )
    if axes.rollout_tokens and base.rollout is None:
        raise UserError(
            f"--rollout-tokens {','.join(map(str, axes.rollout_tokens))}: {base.run.name} has no "
            "[rollout]: add one, for example with --set rollout.fraction=1.0"
        )
    varied: dict[str, tuple[Any, ...]] = {
        name: getattr(axes, name) for name in AXES if getattr(axes, name)
    }
    if axes.cross:
        places = [
            dict(zip(varied, values, strict=True)) for values in itertools.product(*varied.values())
        ]
    else:
        places = [{name: value} for name, values in varied.items() for value in values] or [{}]
    for seed in range(own.seed, own.seed + axes.num_seeds):
        for place in places:
            point = replace(own, seed=seed, **place)
            is_cut = point.keep_fraction < 1 or base.truncation.max_tokens is not None
            # Of a whole trace all windows are one
            yield (point if is_cut else replace(point, window="head"))


def _recipe_at(base: Recipe, point: Point, folder: Path) -> Recipe:
    rollout = {"rollout.max_new_tokens": point.rollout_tokens} if point.rollout_tokens else {}
    return base.with_values(
        {
            **rollout,
            "truncation.keep_fraction": point.keep_fraction,
            "data.loss_sections": point.sections,
            "truncation.window": point.window,
            "run.seed": point.seed,
            "run.name": point.name,
            "run.output_dir": str(folder),
        }
    )


def _check_names(points: Iterable[Point]) -> None:
    """A cell is a folder: two that are named alike would be one."""
    named: dict[str, Point] = {}
    for point in points:
        other = named.setdefault(point.name, point)
        if other is not point:
            raise UserError(
                f"--keep {other.keep_fraction!r},{point.keep_fraction!r}: both are "
                f"{point.keep_fraction:g} in the name of a cell: choose values that differ within "
                "six digits"
            )


def _split(flag: str, text: str | None) -> list[str]:
    parts = [] if text is None else [part.strip() for part in text.split(",")]
    if not all(parts) or len(set(parts)) != len(parts):
        raise UserError(f"{flag} {text}: write distinct values separated by commas")
    return parts


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value <= 1.0:
        raise UserError(f"--keep {text}: write a fraction above 0 and at most 1, such as 0.5")
    return value


def _num_tokens(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise UserError(f"--rollout-tokens {text}: write whole numbers of tokens, such as 16,32,64")
    return int(text)


def _names(text: str) -> tuple[str, ...]:
    known = get_args(SectionName)
    names = tuple(text.split("+"))
    if not set(names) <= set(known) or len(set(names)) != len(names):
        raise UserError(
            f"--sections {text}: join any of {', '.join(known)} with +, such as prompt+cot"
        )
    return tuple(name for name in known if name in names)


def _window(text: str) -> str:
    if text not in WINDOWS:
        raise UserError(f"--windows {text}: choose from {', '.join(WINDOWS)}")
    return text
