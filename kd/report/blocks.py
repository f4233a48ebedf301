"""What a page is made of, in every format: each number with the files that it came from."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

from matplotlib.figure import Figure

from kd.report.compare import SeedGroup
from kd.report.read_runs import Run


class Link(NamedTuple):
    """title: the run's name, which is shown where the pointer rests on the link."""

    label: str
    title: str
    path: Path


class Sources(NamedTuple):
    """Files that numbers came from. what: these numbers; "" where it is all of them. over: those of
    the denominator, where they are ratios.
    """

    what: str
    files: tuple[Link, ...]
    over: tuple[Link, ...]


@dataclass(frozen=True)
class Entry:
    """A text and the files it came from, which are named one by one in details where they are of
    several kinds; over: those of the denominator, where it holds a ratio.
    """

    text: str
    sources: tuple[Link, ...] = ()
    over: tuple[Link, ...] = ()
    details: tuple[Sources, ...] = ()
    look: Literal["text", "answer", "note", "warning"] = "text"
    kind: ClassVar = "entry"


@dataclass(frozen=True)
class Table:
    """An entry without a text shows its links; those of all other entries are the row's files."""

    header: list[str]
    rows: list[list[Entry]]
    kind: ClassVar = "table"

    @property
    def has_files(self) -> bool:
        return any(self.files(row) for row in self.rows)

    def files(self, row: list[Entry]) -> list[Sources]:
        """Each set of files once, for the last column of the table."""
        found: dict[tuple[Link, ...], Sources] = {}
        for column, entry in zip(self.header, row, strict=True):
            if entry.text and entry.sources:
                over = entry.over if entry.over != entry.sources else ()
                first = found.setdefault(entry.sources, Sources(column, entry.sources, over))
                found[entry.sources] = first._replace(over=first.over or over)
        # Those of whole sequences need no line of their own where a ratio names them.
        denominators = {sources.over for sources in found.values()}
        groups = [sources for files, sources in found.items() if files not in denominators]
        return groups if len(groups) > 1 else [sources._replace(what="") for sources in groups]


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
