"""What a page is made of, in every format: each number with the files that it came from."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

from matplotlib.figure import Figure

from kd.report.compare import SeedGroup
from kd.report.read_runs import Run


class Link(NamedTuple):
    """title: of the run; it is shown where the pointer rests on the link."""

    label: str
    title: str
    path: Path


@dataclass(frozen=True)
class Entry:
    """A text and the files it came from; over: those of the denominator, where it holds a ratio."""

    text: str
    sources: tuple[Link, ...] = ()
    over: tuple[Link, ...] = ()
    kind: ClassVar = "entry"


@dataclass(frozen=True)
class Table:
    header: list[str]
    rows: list[list[Entry]]
    kind: ClassVar = "table"


@dataclass(frozen=True)
class Plot:
    """name: of its file, without the suffix."""

    name: str
    caption: Entry
    figure: Figure
    kind: ClassVar = "plot"


Block = Entry | Table | Plot


@dataclass(frozen=True)
class PageSection:
    level: int
    title: str
    blocks: list[Block]


def metrics_of(cell: SeedGroup) -> tuple[Link, ...]:
    return tuple(_link(run, run.folder / "metrics.jsonl") for run in cell.runs)


def scores_of(cell: SeedGroup, task: str) -> tuple[Link, ...]:
    return tuple(_link(run, run.scores[task].path) for run in cell.runs if task in run.scores)


def by_name(runs: Iterable[Run], file: str = "recipe.json") -> tuple[Link, ...]:
    return tuple(Link(run.name, run.name, run.folder / file) for run in runs)


def _link(run: Run, path: Path) -> Link:
    return Link(f"s{run.seed}", run.name, path)
