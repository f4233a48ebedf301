"""What an evaluation leaves: one JSON of results per model, every response beside it, and a table of all models."""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from kd.evaluate.generate import Sampling
from kd.evaluate.score import Summary

PACKAGES = ("torch", "transformers", "math-verify")
HEADER = ("model", "accuracy", "95 % interval", "problems", "tokens", "unclosed")


def results(
    label: str, model: str, recipe: str, problems: str, judge: str, sampling: Sampling, summary: Summary
) -> dict[str, Any]:
    """The content of results JSON: the summary's fields at top level, and all that is needed to repeat it."""
    return {
        "label": label,
        "model": model,
        "recipe": recipe,
        "problems": problems,
        "judge": judge,
        **asdict(summary),
        "sampling": asdict(sampling),
        "versions": {package: _version(package) for package in PACKAGES},
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    _write_aside(path, json.dumps(content, indent=2) + "\n")


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    _write_aside(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A plain table, one line per results JSON: shares as fractions, tokens as the mean of a response."""
    cells = [HEADER, *map(_cells, rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(HEADER))]
    lines = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in cells]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    low, high = row["ci95"]
    return (
        row["label"],
        f"{row['accuracy']:.3f}",
        f"{low:.3f}-{high:.3f}",
        str(row["num_problems"]),
        f"{row['mean_response_tokens']:.1f}",
        f"{row['unclosed_fraction']:.3f}",
    )


def _write_aside(path: Path, text: str) -> None:
    """Write, then rename: a file that exists is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
