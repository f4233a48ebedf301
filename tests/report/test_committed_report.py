"""The committed study renders to the committed report."""

import json
import math
import shutil
from pathlib import Path

import pytest
from tiny import ROOT

from kd.report.render import write_report

pytestmark = pytest.mark.slow

COMMITTED = ROOT / "benchmarks" / "results" / "study"


@pytest.fixture(scope="module")
def rendered(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("committed")
    roots = [folder / name for name in ("tiny", "windows", "lora")]
    for root in roots:
        shutil.copytree(COMMITTED / root.name, root)
    write_report(roots, folder / "report")
    return folder / "report"


@pytest.mark.parametrize("name", ["report.md", "index.html"])
def test_pages_are_those_that_are_committed(rendered, name):
    assert (rendered / name).read_text() == (COMMITTED / "report" / name).read_text()


def test_numbers_are_those_that_are_committed(rendered):
    actual, expected = (
        json.loads((folder / "report.json").read_text())
        for folder in (rendered, COMMITTED / "report")
    )
    assert len(expected["runs"]) > 10
    assert_close(actual, expected)


def test_plots_are_those_that_are_committed(rendered):
    names = {path.name for path in (COMMITTED / "report" / "plots").iterdir()}
    assert {path.name for path in (rendered / "plots").iterdir()} == names
    assert len(names) == 14


def assert_close(actual, expected):
    """Equal; numbers to 12 digits, as another numpy may add them up in another order."""
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        for key, value in expected.items():
            assert_close(actual[key], value)
    elif isinstance(expected, list):
        assert len(actual) == len(expected)
        for ours, theirs in zip(actual, expected, strict=True):
            assert_close(ours, theirs)
    elif isinstance(expected, float):
        assert math.isclose(actual, expected, rel_tol=1e-12)
    else:
        assert actual == expected
