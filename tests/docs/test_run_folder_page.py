"""docs/run_folder.md names what the committed runs hold, and nothing twice.

tests/training/test_end_to_end.py compares it with every key of a run that has them all.
"""

import json

import pytest
from doc_pages import DOCS, first_cells, paths_of, section
from tiny import ROOT

PAGE = DOCS / "run_folder.md"
STUDIES = ROOT / "benchmarks" / "results" / "study"


@pytest.mark.parametrize("heading", ["metrics.jsonl", "rollouts.jsonl", "plan.json"])
def test_no_key_is_explained_twice(heading):
    keys = first_cells(section(PAGE, heading))
    assert len(keys) > 6
    assert sorted(set(keys)) == sorted(keys)


def test_every_key_of_the_committed_metrics_is_explained():
    files = sorted(STUDIES.glob("*/*/metrics.jsonl"))
    assert len(files) > 10
    lines = [line for file in files for line in file.read_text().splitlines()]
    found = {path for line in lines for path in paths_of(json.loads(line))}
    assert "diagnostics.by_position" in found
    assert found <= set(first_cells(section(PAGE, "metrics.jsonl")))


def test_the_keys_of_the_committed_plans_are_those_of_the_page():
    explained = set(first_cells(section(PAGE, "plan.json")))
    files = sorted(STUDIES.glob("*/*/plan.json"))
    assert files
    for file in files:
        plan = json.loads(file.read_text())
        assert plan["planned"].keys() == plan["measured"].keys() == explained
