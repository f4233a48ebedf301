"""What an evaluation leaves: one JSON of results per model, every response beside it, and a table of all models."""

import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from kd.evaluate.generate import Sampling
from kd.evaluate.score import Summary
from kd.metrics import environment

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
        "command": " ".join(sys.argv),
        "environment": environment(),
    }


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
