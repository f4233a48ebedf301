"""docs/architectures.md names the architectures that are tried, and nothing else."""

import re

from architectures import ARCHITECTURES
from doc_pages import DOCS
from test_architectures import MIXES_PACKED

PAGE = (DOCS / "architectures.md").read_text(encoding="utf-8")
REFUSED = {"xlstm"}  # tried, and refused at load


def names_in(text: str) -> list[str]:
    return [re.sub(r" \(MoE\)|\*", "", name).strip() for name in text.split(",")]


def test_the_table_is_of_the_architectures_that_are_tried():
    rows = re.findall(r"^\| (?:nothing|bias|scale|softcap) \| (.*) \|$", PAGE, re.MULTILINE)
    listed = [name for row in rows for name in names_in(row)]
    assert len(rows) == 4
    assert sorted(listed) == sorted(ARCHITECTURES.keys() - REFUSED)


def test_those_that_cannot_be_packed_are_those_of_the_test():
    (block,) = re.findall(r"^```\n(.*?)```", PAGE, re.MULTILINE | re.DOTALL)
    assert set(names_in(block)) == MIXES_PACKED - REFUSED
