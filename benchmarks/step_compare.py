"""Two results of train_step.py side by side."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from kd.files import read_json

Row = dict[str, Any]
# heading -> the figure of a row
FIGURES: dict[str, Callable[[Row], float | None]] = {
    "step ms": lambda row: row["step_ms"]["median"],
    "tokens/s": lambda row: row["tokens_per_second"],
    "peak GiB": lambda row: row["memory_gib"]["peak"],
    "MFU, measured peak": lambda row: row["mfu_of_measured_peak"],
    "device busy": lambda row: row.get("profile", {}).get("device_busy_share"),
    "host waits": lambda row: row.get("profile", {}).get("num_host_waits"),
}


def compare(one: Path, two: Path) -> str:
    """Markdown: what differs in hardware, versions and settings, then a line for each row of both
    folders' train_step.json, and which rows one of them lacks.
    """
    reports = [read_json(folder / "train_step.json") for folder in (one, two)]
    lines = [f"1: {one}", f"2: {two}", ""]
    lines += [f"- {line}" for line in differences(*reports)] or [
        "Same hardware, versions and settings."
    ]
    lines += ["", f"| layout | tokens | {' | '.join(FIGURES)} |", "|---" * (len(FIGURES) + 2) + "|"]
    rows = [
        {(name, length): row for name, of in r["layouts"].items() for length, row in of.items()}
        for r in reports
    ]
    for key in dict.fromkeys([*rows[0], *rows[1]]):
        first, second = (of.get(key, {"error": "not measured"}) for of in rows)
        lines.append(f"| {key[0]} | {int(key[1]):,} | {' | '.join(_cells(first, second))} |")
    return "\n".join(lines) + "\n"


def differences(one: Row, two: Row) -> list[str]:
    """Of environments, settings and models, "settings.steps: 10, 5"."""
    first, second = (
        dict(_flat({key: r[key] for key in ("environment", "settings")})) for r in (one, two)
    )
    return [
        f"{key}: {first.get(key)}, {second.get(key)}"
        for key in dict.fromkeys([*first, *second])
        if first.get(key) != second.get(key)
    ]


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _cells(first: Row, second: Row) -> list[str]:
    """ "1 -> 2 (2 / 1)" of each figure; why, where one has none."""
    if "error" in first or "error" in second:
        both = (row.get("error", "measured") for row in (first, second))
        return [" -> ".join(both), *[""] * (len(FIGURES) - 1)]
    cells = []
    for figure in FIGURES.values():
        one, two = figure(first), figure(second)
        texts = ("none" if value is None else f"{value:,.4g}" for value in (one, two))
        ratio = f" ({two / one:.3f})" if one and two is not None else ""
        cells.append(" -> ".join(texts) + ratio)
    return cells
