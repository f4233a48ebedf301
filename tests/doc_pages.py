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


def fenced(page: Path, language: str) -> list[str]:
    """The code blocks of a language."""
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def in_backticks(page: Path) -> list[str]:
    """What stands between single backticks, outside of code blocks."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    return re.findall(r"`([^`\n]+)`", text)


def expanded(path: str) -> list[str]:
    """As a shell expands braces: a_{1,2} is a_1 and a_2."""
    found = re.fullmatch(r"(.*?)\{([^}]*)\}(.*)", path)
    if not found:
        return [path]
    before, inside, after = found.groups()
    return [f"{before}{part}{rest}" for part in inside.split(",") for rest in expanded(after)]
