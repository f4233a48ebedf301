"""Each message that docs/troubleshooting.md quotes is one that the code has."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from doc_pages import DOCS, first_cells
from tiny import ROOT

PAGE = DOCS / "troubleshooting.md"
PLACEHOLDER = "\0"


def quotes() -> list[str]:
    """Without the table of exit statuses, which is before the first heading."""
    return first_cells(PAGE.read_text(encoding="utf-8").partition("\n## ")[2])


def texts_of(path: Path) -> Iterator[str]:
    """The texts of a module but its docstrings, adjacent literals joined; a placeholder is \\0."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    for node in nodes:
        if id(node) in docstrings:
            continue
        if isinstance(node, ast.JoinedStr):
            parts = (p.value if isinstance(p, ast.Constant) else PLACEHOLDER for p in node.values)
            yield "".join(map(str, parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


@pytest.fixture(scope="module")
def messages() -> str:
    """All texts of kd/ and launch/, a line for each."""
    sources = [path for name in ("kd", "launch") for path in (ROOT / name).rglob("*.py")]
    found = {text.replace("\n", " ") for path in sources for text in texts_of(path)}
    scripts = "\n".join(path.read_text() for path in (ROOT / "launch").rglob("*.sh"))
    return "\n".join(found) + "\n" + scripts


def test_the_page_quotes_many_messages_each_once():
    assert len(quotes()) > 60
    assert len(set(quotes())) == len(quotes())


@pytest.mark.parametrize("quote", quotes())
def test_a_quoted_message_is_in_the_code(messages: str, quote: str):
    """`...` of a quote stands for any text of the same message."""
    parts = [re.escape(part.strip()) for part in quote.split("...")]
    assert re.search(".*".join(parts), messages), f"{PAGE.name} quotes {quote!r}"
