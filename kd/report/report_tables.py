"""The report's tables: rows of cells, of pairs of models, of runs."""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from kd.report.blocks import Entry, Link, Table, by_name, metrics_of, scores_of
from kd.report.compare import Family, Score, SeedGroup
from kd.report.fields import REMEDY
from kd.report.read_runs import NOT_RECORDED, Costs, Damaged, Run, StudyCell, Variant
from kd.runs.records import FILLED, FilledRecord, read_record

ABSENT = Entry("-")
NO_WHOLE = "no whole sequences"
AXES = ["loss sections", "window", "keep_fraction"]
# field of Costs -> its column, and the format of its numbers
COSTS = {
    "training_s": ("training time, s", ",.1f"),
    "peak_memory_gib": ("peak memory, GiB", ".2f"),
    "flops": ("FLOPs", ".3g"),
    "num_input_tokens": ("tokens read", ",.0f"),
    "num_supervised_tokens": ("tokens supervised", ",.0f"),
    "flops_of_sampling": ("FLOPs of sampling", ".3g"),
}
ENVIRONMENT = ("commit", "gpus", "cpu", "num_cpus", "python", "cuda")
NONE = {"[]": "none", "null": "none"}
PACKAGES = "environment.packages."


def knees(family: Family) -> Table | None:
    """A row per curve of two lengths or more, whole sequences among them; None without one."""
    rows = []
    for task in family.tasks:
        for variant in family.variants:
            knee = family.knee(variant, task)
            if knee is None or len(family.curve(variant)) < 2:
                continue
            full = family.full_of(knee.cell)
            assert full is not None
            none_cheaper = "; no cheaper one is level" if knee.cell is full else ""
            rows.append(
                [
                    Entry(str(variant)),
                    Entry(task),
                    Entry(f"{knee.cell.keep_fraction:g}{none_cheaper}"),
                    _accuracy(knee.cell, task),
                    _accuracy(full, task),
                    _kept(family, knee.cell, task),
                    _relative_cost(family, knee.cell, knee.cost),
                    Entry(COSTS[knee.cost][0]),
                ]
            )
    header = [
        "curve",
        "problems",
        "knee: keep_fraction",
        "accuracy",
        "of whole sequences",
        "kept",
        "cost",
        "cost in",
    ]
    return Table(header, rows) if rows else None


def scores(family: Family, task: str) -> Table:
    """References first, then every cell."""
    header = [
        *AXES,
        "accuracy",
        "95 % interval",
        "each seed",
        "kept",
        "unclosed",
        "response tokens",
    ]
    rows = [_reference_row(role, score) for role, score in family.references.get(task, [])]
    return Table(header, rows + [_score_row(family, cell, task) for cell in family.cells])


def costs(family: Family) -> Table:
    names = told_costs([cell.costs for cell in family.cells])
    rows = [[*_axes(cell), *[_cost(family, cell, name) for name in names]] for cell in family.cells]
    return Table([*AXES, *[COSTS[name][0] for name in names]], rows)


def told_costs(costs: Iterable[Costs]) -> list[str]:
    """The fields that are shown: sampling only where something was sampled."""
    has_sampled = any(cost.flops_of_sampling is not None for cost in costs)
    return [name for name in COSTS if has_sampled or name != "flops_of_sampling"]


def caches(family: Family) -> Table | None:
    """A row for each teacher's cache that was filled and read: what its runs cost, and what they
    would have cost with a teacher in each. None without a cache.
    """
    groups = defaultdict(list)
    for run in family.runs:
        if run.cache is not None:
            groups[run.cache].append(run)
    rows = [
        _cache_row(read_record(folder / FILLED, FilledRecord, REMEDY), folder, runs)
        for folder, runs in sorted(groups.items())
        if (folder / FILLED).exists()
    ]
    header = [
        "cache",
        "tokens",
        "GiB",
        "rank minutes to fill",
        "FLOPs to fill",
        "runs that read it",
        "FLOPs of all",
        "with a teacher in each",
        "ratio",
        "pays from",
    ]
    return Table(header, rows) if rows else None


def _cache_row(filled: FilledRecord, folder: Path, runs: Sequence[Run]) -> list[Entry]:
    links = tuple(
        link._replace(label=str(index))
        for index, link in enumerate(by_name(runs, "metrics.jsonl"), start=1)
    )
    own = [run.costs.flops for run in runs if run.costs.flops is not None]
    spared = [run.flops_spared for run in runs if run.flops_spared is not None]
    figures = [Entry(NOT_RECORDED)] * 4
    if filled.flops is not None and len(own) == len(spared) == len(runs):
        taken, without = filled.flops + sum(own), sum(own) + sum(spared)
        pays_from = math.ceil(filled.flops * len(runs) / sum(spared))
        figures = [
            Entry(f"{taken:.3g}", links),
            Entry(f"{without:.3g}", links),
            Entry(f"{taken / without:.3f}", links),
            Entry(f"{pays_from} runs" if pays_from > 1 else "the first run"),
        ]
    file = Link(f"{folder.parent.name}/{folder.name}", str(folder.name), folder / FILLED)
    return [
        Entry("", (file,)),
        Entry(f"{filled.num_tokens:,}"),
        Entry(f"{filled.bytes / 2**30:.2f}"),
        Entry(f"{filled.rank_seconds / 60:.1f}"),
        Entry(NOT_RECORDED if filled.flops is None else f"{filled.flops:.3g}"),
        Entry(str(len(runs))),
        *figures,
    ]


def by_sections(family: Family, task: str) -> list[tuple[str, Table]]:
    """For each window that was trained with several choices of loss sections: its name, and a table
    of these choices.
    """
    groups = defaultdict(list)
    for variant in family.variants:
        groups[window_name(variant)].append((variant.sections, variant))
    return _side_by_side(family, task, AXES[0], groups)


def by_window(family: Family, task: str) -> list[tuple[str, Table]]:
    """For each choice of loss sections that was trained with several windows: its name, and a table
    of these windows.
    """
    groups = defaultdict(list)
    for variant in family.variants:
        groups[variant.sections].append((window_name(variant), variant))
    return _side_by_side(family, task, AXES[1], groups)


def differences(family: Family) -> Table:
    paths = {run.name: run.folder / "recipe.json" for run in family.runs}
    evaluations = [
        e for scores in family.references.values() for _, score in scores for e in score.evaluations
    ]
    paths |= {e.label: e.path for e in evaluations}
    rows = []
    for name, values in family.differences:
        for value, members in values.items():
            rows.append(
                [Entry(name), Entry(value), Entry("", tuple(Link(m, m, paths[m]) for m in members))]
            )
    return Table(["what", "value", "in"], rows)


def not_compared(runs: Sequence[Run], cells: Sequence[StudyCell]) -> Table | None:
    rows = [
        [Entry("", by_name([run])), Entry(_axes_text(run)), Entry(run.state)]
        for run in runs
        if not run.is_finished
    ]
    for cell in cells:
        link = Link(cell.name, cell.study.name, cell.study / "study.json")
        axes = ", ".join(f"{axis} {value}" for axis, value in cell.axes.items())
        rows.append(
            [
                Entry("", (link,)),
                Entry(axes),
                Entry(": ".join(filter(None, [cell.status, cell.text]))),
            ]
        )
    return Table(["run", "axes", "why"], rows) if rows else None


def left_out(damaged: Sequence[Damaged]) -> Table:
    rows = [[Entry("", (Link(name, name, path),)), Entry(reason)] for name, path, reason in damaged]
    return Table(["what", "why"], rows)


def environments(runs: Sequence[Run]) -> Table:
    """A row for each set of hardware, versions and commit."""
    groups: dict[tuple[str, ...], list[Run]] = defaultdict(list)
    for run in runs:
        values = [run.facts.get(f"environment.{name}", NOT_RECORDED) for name in ENVIRONMENT]
        packages = [
            f"{key.removeprefix(PACKAGES)} {run.facts[key]}"
            for key in run.facts
            if key.startswith(PACKAGES)
        ]
        groups[
            *[NONE.get(value, value) for value in values], ", ".join(packages) or NOT_RECORDED
        ].append(run)
    rows = [
        [*map(Entry, facts), Entry("", by_name(members, "environment.json"))]
        for facts, members in groups.items()
    ]
    return Table([*ENVIRONMENT, "packages", "runs"], rows)


def window_name(variant: Variant) -> str:
    return str(variant).removeprefix(f"{variant.sections}, ")


def _side_by_side(
    family: Family, task: str, column: str, groups: dict[str, list[tuple[str, Variant]]]
) -> list[tuple[str, Table]]:
    found = []
    for group, members in groups.items():
        curves = {
            name: {cell.keep_fraction: cell for cell in family.curve(v)} for name, v in members
        }
        fractions = sorted({fraction for curve in curves.values() for fraction in curve})
        header = [column, *[f"keep_fraction {fraction:g}" for fraction in fractions]]
        rows = [
            [Entry(name), *[_accuracy(curve[f], task) if f in curve else ABSENT for f in fractions]]
            for name, curve in curves.items()
        ]
        if len(rows) > 1:
            found.append((group, Table(header, rows)))
    return found


def _reference_row(role: str, score: Score) -> list[Entry]:
    links = tuple(
        Link(str(index), f"{e.label} of {e.path.parent.parent.name}", e.path)
        for index, e in enumerate(score.evaluations, start=1)
    )
    return [Entry(role), ABSENT, ABSENT, *_score_entries(score, links, ABSENT, ABSENT)]


def _score_row(family: Family, cell: SeedGroup, task: str) -> list[Entry]:
    if task not in cell.scores:
        return [*_axes(cell), Entry("not evaluated"), *[ABSENT] * 5]
    links = scores_of(cell, task)
    seeds = " ".join(f"{e.accuracy:.3f}" for e in cell.scores[task].evaluations)
    return [
        *_axes(cell),
        *_score_entries(cell.scores[task], links, Entry(seeds, links), _kept(family, cell, task)),
    ]


def _score_entries(score: Score, links: tuple[Link, ...], seeds: Entry, kept: Entry) -> list[Entry]:
    low, high = score.ci95
    return [
        Entry(f"{score.accuracy:.3f}", links),
        Entry(f"{low:.3f}-{high:.3f}", links),
        seeds,
        kept,
        Entry(f"{score.unclosed_fraction:.3f}", links),
        Entry(f"{score.mean_response_tokens:,.1f}", links),
    ]


def _accuracy(cell: SeedGroup, task: str) -> Entry:
    if task not in cell.scores:
        return Entry("not evaluated")
    score = cell.scores[task]
    low, high = score.ci95
    return Entry(f"{score.accuracy:.3f} ({low:.3f}-{high:.3f})", scores_of(cell, task))


def _kept(family: Family, cell: SeedGroup, task: str) -> Entry:
    full, kept = family.full_of(cell), family.kept(cell, task)
    if full is None:
        return Entry(NO_WHOLE)
    if kept is None:
        return ABSENT
    interval = family.kept_interval(cell, task)
    within = f" ({interval[0]:.3f}-{interval[1]:.3f})" if interval else ""
    return Entry(f"{kept:.3f}{within}", scores_of(cell, task), scores_of(full, task))


def _cost(family: Family, cell: SeedGroup, name: str) -> Entry:
    value = getattr(cell.costs, name)
    if value is None:
        return Entry(NOT_RECORDED)
    full, relative = family.full_of(cell), family.relative_cost(cell, name)
    text = f"{value:{COSTS[name][1]}}"
    if full is None or relative is None:
        return Entry(text, metrics_of(cell))
    return Entry(f"{text} ({relative:.3f})", metrics_of(cell), metrics_of(full))


def _relative_cost(family: Family, cell: SeedGroup, name: str) -> Entry:
    full, relative = family.full_of(cell), family.relative_cost(cell, name)
    if full is None:
        return Entry(NO_WHOLE)
    text = NOT_RECORDED if relative is None else f"{relative:.3f}"
    return Entry(text, metrics_of(cell), metrics_of(full))


def _axes(cell: SeedGroup) -> list[Entry]:
    return [
        Entry(cell.variant.sections),
        Entry(window_name(cell.variant)),
        Entry(f"{cell.keep_fraction:g}"),
    ]


def _axes_text(run: Run) -> str:
    return f"{run.variant}, keep_fraction {run.keep_fraction:g}, seed {run.seed}"
