"""The pages of docs/ and README.md, read by tests."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tiny import ROOT

DOCS = ROOT / "docs"
PAGES = (ROOT / "README.md", *sorted(DOCS.glob("*.md")))


def section(page: Path, heading: str) -> str:
    """The text below a heading of the second level, up to the next."""
    _, found, rest = page.read_text(encoding="utf-8").partition(f"\n## {heading}\n")
    assert found, f"{page.name} has no heading {heading!r}"
    return rest.partition("\n## ")[0]


def first_cells(text: str) -> list[str]:
    """What stands in backticks in the first cell of each line of a table."""
    return re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)


def paths_of(record: dict[str, Any]) -> Iterator[str]:
    """Keys of a line of metrics.jsonl as docs/run_folder.md names them: "rollouts.mean_tokens"."""
    for key, value in record.items():
        yield key
        if isinstance(value, dict) and key != "val_diagnostics":
            yield from (f"{key}.{name}" for name in value)
