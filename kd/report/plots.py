"""The report's figures: one line per variant against keep_fraction, or one panel per variant with a
line per length.

They differ in print too: lines of variants by marker and dashes, lengths by lightness and dashes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import EngFormatter, MaxNLocator, MultipleLocator

from kd.report.compare import Family, SeedGroup
from kd.report.read_runs import CurvePoint, Run, Variant

# Okabe and Ito's colours for the colour-blind, without their yellow, which is too light for lines.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = ("o", "s", "^", "D", "v", "P")
DASHES: tuple[Any, ...] = (
    "-",
    (0, (5, 2)),
    (0, (1, 1.2)),
    (0, (6, 2, 1, 2)),
    (0, (3, 1, 1, 1, 1, 1)),
    (0, (9, 3)),
)
MAX_LINES = len(COLORS)
SHIFT = 0.022  # of keep_fraction, between lines that would hide each other
REFERENCE_LINES = {
    "teacher": ("black", (0, (8, 3))),
    "student before training": ("0.45", (0, (1, 2))),
}
COST_NAMES = {
    "num_input_tokens": "tokens read",
    "flops": "FLOPs",
    "training_s": "training time",
    "peak_memory_gib": "peak memory",
}
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "0.9",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.handlelength": 3.5,
    "svg.hashsalt": "report",  # the same file for the same numbers
}


@dataclass(frozen=True)
class Look:
    color: Any
    marker: str
    dashes: Any
    shift: float  # of lines that would hide each other's intervals


def accuracy(family: Family, variants: Sequence[Variant], task: str) -> Figure:
    """Accuracy with its interval and each seed, absolute and relative, by keep_fraction."""
    figure, (left, right) = _panels(2)
    for variant, look in _looks(variants):
        cells = [cell for cell in family.curve(variant) if task in cell.scores]
        x = [cell.keep_fraction + look.shift for cell in cells]
        _line(
            left,
            x,
            [cell.scores[task].accuracy for cell in cells],
            look,
            str(variant),
            _intervals(cells, task),
        )
        for cell in cells:
            shares = [e.accuracy for e in cell.scores[task].evaluations]
            dots = [cell.keep_fraction + look.shift + SHIFT / 2] * len(shares)
            left.plot(
                dots, shares, ".", color=look.color, markersize=4, markeredgewidth=0, alpha=0.8
            )
        kept = [(at, family.kept(cell, task)) for at, cell in zip(x, cells, strict=True)]
        _line(right, *_drawable(kept), look)
    _draw_references(left, family, task)
    right.axhline(1.0, color="0.45", linewidth=0.8)
    _label(left, "keep_fraction", "accuracy (95 % interval)")
    _label(right, "keep_fraction", "accuracy relative to whole sequences")
    return _with_legend(figure)


def kept(family: Family, variants: Sequence[Variant], task: str) -> Figure:
    """Accuracy against cost, both relative to whole sequences: the report's answer, readable on a
    phone. Rings mark the knees.
    """
    margin = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)  # inches, for pages darker than it
    figure = Figure(figsize=(4.8, 3.6), layout=margin)
    axes = figure.add_subplot()
    cost = family.measured_cost(
        cell for variant in variants for cell in family.curve(variant) if task in cell.scores
    )
    axes.axhline(1.0, color="0.45", linewidth=0.8)
    for variant, look in _looks(variants):
        points = _kept_points(family, variant, cost, task)
        x, y = [at for _, at, _ in points], [share for _, _, share in points]
        # Whole sequences are 1 by definition
        intervals = [
            family.kept_interval(cell, task) or (share, share) for cell, _, share in points
        ]
        _line(axes, x, y, look, str(variant), intervals)
        knee = family.knee(variant, task)
        for cell, at, share in points:
            if cell.keep_fraction < 1:
                _name_length(axes, cell, at, share)
                if knee and knee.cell is cell:
                    _ring(axes, at, share, look)
    axes.set_xlim(0, max(1.08, axes.get_xlim()[1]))
    axes.set_ylim(bottom=max(0.0, axes.get_ylim()[0]))
    axes.set_xlabel(f"{COST_NAMES[cost]}, relative to whole sequences")
    axes.set_ylabel("accuracy kept (95 % interval)")
    return _with_legend(figure)


def tradeoff(family: Family, variants: Sequence[Variant], task: str) -> Figure:
    """Accuracy against what training cost: FLOPs, or tokens read where FLOPs are not recorded.
    Rings mark the knees.
    """
    figure, (axes,) = _panels(1)
    curves = [
        [cell for cell in family.curve(variant) if task in cell.scores] for variant in variants
    ]
    cost = family.measured_cost(cell for cells in curves for cell in cells)
    has_flops = cost == "flops"
    for (variant, look), cells in zip(_looks(variants), curves, strict=True):
        x, y = (
            [getattr(cell.costs, cost) for cell in cells],
            [cell.scores[task].accuracy for cell in cells],
        )
        _line(axes, x, y, look, str(variant), _intervals(cells, task))
        for cell, at, height in zip(cells, x, y, strict=True):
            _name_length(axes, cell, at, height)
        knee = family.knee(variant, task)
        if knee:
            point = getattr(knee.cell.costs, cost), knee.cell.scores[task].accuracy
            _ring(axes, *point, look)
    _draw_references(axes, family, task)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(EngFormatter("FLOP" if has_flops else ""))
    name = (
        "training of a run, all ranks"
        if has_flops
        else "tokens read by a run (FLOPs are not recorded)"
    )
    axes.set_xlabel(name)
    axes.set_ylabel("accuracy (95 % interval)")
    return _with_legend(figure)


def responses(family: Family, variants: Sequence[Variant], task: str) -> Figure:
    """Responses that never close their thought, and their length, against keep_fraction."""
    figure, (left, right) = _panels(2)
    for variant, look in _looks(variants):
        cells = [cell for cell in family.curve(variant) if task in cell.scores]
        x = [cell.keep_fraction + look.shift for cell in cells]
        _line(left, x, [cell.scores[task].unclosed_fraction for cell in cells], look, str(variant))
        _line(right, x, [cell.scores[task].mean_response_tokens for cell in cells], look)
    left.set_ylim(-0.03, 1.03)
    _label(left, "keep_fraction", "responses without </think> (fraction)")
    _label(right, "keep_fraction", "mean response length (tokens)")
    right.set_ylim(0, right.get_ylim()[1] * 1.05)
    return _with_legend(figure)


def costs(family: Family, variants: Sequence[Variant]) -> Figure:
    """What each length costs relative to whole sequences; a panel per variant."""

    def draw(axes: Axes, variant: Variant) -> None:
        axes.plot([0, 1], [0, 1], color="0.7", linewidth=0.8)
        for (name, text), (_, look) in zip(
            COST_NAMES.items(), _looks(list(COST_NAMES)), strict=True
        ):
            values = [
                (cell.keep_fraction, family.relative_cost(cell, name))
                for cell in family.curve(variant)
            ]
            _line(axes, *_drawable(values), look, text)
        _label(axes, "keep_fraction", "cost relative to whole sequences")
        axes.set_ylim(0, max(1.08, axes.get_ylim()[1]))

    return _by_variant(variants, draw)


def losses(family: Family, variants: Sequence[Variant]) -> Figure:
    """Training loss of every run, and validation loss as dots; a panel per variant."""

    def draw(axes: Axes, run: Run, look: Look, label: str) -> None:
        axes.plot(
            *_columns(run.loss_curve),
            color=look.color,
            linestyle=look.dashes,
            linewidth=1,
            label=label,
        )
        axes.plot(*_columns(run.val_loss_curve), look.marker, color=look.color, markersize=4)

    return _by_length(
        family, variants, draw, ("optimizer step", "loss per supervised token (nats)")
    )


def kl_by_position(family: Family, variants: Sequence[Variant]) -> Figure:
    """Forward KL of every run at the end, by position in the whole trace; a panel per variant."""

    def draw(axes: Axes, run: Run, look: Look, label: str) -> None:
        x, y = _columns(run.kl_curve)
        axes.plot(
            x,
            y,
            marker=look.marker,
            markersize=4,
            color=look.color,
            linestyle=look.dashes,
            label=label,
        )
        axes.set_yscale("log")  # prompts are hard to foresee, and hide the rest on a linear scale
        axes.set_xlim(0, 1)
        axes.xaxis.set_major_locator(MultipleLocator(0.25))

    return _by_length(
        family, variants, draw, ("position in the whole trace", "forward KL (nats per token)")
    )


def _looks(names: Sequence[Any]) -> list[tuple[Any, Look]]:
    looks = zip(COLORS, MARKERS, DASHES, strict=True)
    # The first line is where it belongs
    shifts = [SHIFT * step for step in (0, 1, -1, 2, -2, 3)]
    return [
        (name, Look(*look, shift)) for name, look, shift in zip(names, looks, shifts, strict=False)
    ]


def _length_looks(family: Family) -> dict[float, Look]:
    """Short lengths are light, long ones dark, and the longest is a solid line."""
    fractions = sorted({cell.keep_fraction for cell in family.cells})
    scale = matplotlib.colormaps["viridis_r"]
    last = len(fractions) - 1
    looks = {}
    for i, fraction in enumerate(fractions):
        color = scale(0.15 + 0.85 * i / max(last, 1))
        looks[fraction] = Look(color, MARKERS[i % MAX_LINES], DASHES[(last - i) % MAX_LINES], 0.0)
    return looks


def _by_variant(variants: Sequence[Variant], draw: Callable[[Axes, Variant], None]) -> Figure:
    figure, panels = _panels(len(variants))
    for axes, variant in zip(panels, variants, strict=True):
        draw(axes, variant)
        axes.set_title(str(variant), fontsize=9)
    return _with_legend(figure)


def _by_length(
    family: Family,
    variants: Sequence[Variant],
    draw: Callable[[Axes, Run, Look, str], None],
    labels: tuple[str, str],
) -> Figure:
    looks = _length_looks(family)

    def draw_variant(axes: Axes, variant: Variant) -> None:
        for cell in family.curve(variant):
            for run in cell.runs:
                draw(axes, run, looks[cell.keep_fraction], f"keep_fraction {cell.keep_fraction:g}")
        axes.set_xlabel(labels[0])
        axes.set_ylabel(labels[1])

    return _by_variant(variants, draw_variant)


def _panels(number: int) -> tuple[Figure, list[Axes]]:
    """At most three in a row; a single one is wider."""
    columns = min(number, 3)
    rows = -(-number // columns)
    figure = Figure(
        figsize=(7.4 if number == 1 else 3.7 * columns, 3.2 * rows + 0.6), layout="constrained"
    )
    return figure, [figure.add_subplot(rows, columns, i + 1) for i in range(number)]


def _line(
    axes: Axes,
    x: Sequence[float],
    y: Sequence[float],
    look: Look,
    label: str | None = None,
    intervals: Sequence[tuple[float, float]] | None = None,
) -> None:
    errors = None
    if intervals:
        lows, highs = zip(*intervals, strict=True)
        errors = [
            [m - low for m, low in zip(y, lows, strict=True)],
            [h - m for m, h in zip(y, highs, strict=True)],
        ]
    axes.errorbar(
        x,
        y,
        yerr=errors,
        marker=look.marker,
        markersize=5,
        color=look.color,
        linestyle=look.dashes,
        linewidth=1.3,
        elinewidth=1,
        capsize=2.5,
        label=label,
    )


def _name_length(axes: Axes, cell: SeedGroup, x: float, y: float) -> None:
    text = f"{cell.keep_fraction:g}"
    axes.annotate(text, (x, y), (5, -11), textcoords="offset points", fontsize=8)


def _ring(axes: Axes, x: float, y: float, look: Look) -> None:
    axes.plot(x, y, "o", markersize=13, markerfacecolor="none", markeredgecolor=look.color)


def _draw_references(axes: Axes, family: Family, task: str) -> None:
    for role, score in family.references.get(task, []):
        color, dashes = REFERENCE_LINES[role]
        axes.axhline(score.accuracy, color=color, linestyle=dashes, linewidth=1, label=role)


def _label(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_xlim(0, 1.1)
    axes.xaxis.set_major_locator(MultipleLocator(0.25))


def _with_legend(figure: Figure) -> Figure:
    """One legend below all panels, each label once."""
    handles: dict[str, Artist] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    # Some inches a label: 8 points are 0.07 for a letter, and the line before it.
    columns = max(1, int(figure.get_figwidth() / (0.07 * max(map(len, handles), default=0) + 0.9)))
    figure.legend(
        list(handles.values()), list(handles), loc="outside lower center", ncols=columns, fontsize=8
    )
    return figure


def _intervals(cells: Sequence[SeedGroup], task: str) -> list[tuple[float, float]]:
    return [cell.scores[task].ci95 for cell in cells]


def _kept_points(
    family: Family, variant: Variant, cost: str, task: str
) -> list[tuple[SeedGroup, float, float]]:
    """The cells of a curve of which both are known: relative cost, and accuracy kept."""
    found = []
    for cell in family.curve(variant):
        x, y = family.relative_cost(cell, cost), family.kept(cell, task)
        if x is not None and y is not None:
            found.append((cell, x, y))
    return found


def _drawable(points: Sequence[tuple[float, float | None]]) -> tuple[list[float], list[float]]:
    known = [(x, y) for x, y in points if y is not None]
    return [x for x, _ in known], [y for _, y in known]


def _columns(points: Sequence[CurvePoint]) -> tuple[list[float], list[float]]:
    return [point.x for point in points], [point.y for point in points]
