"""benchmarks/structure.py on a small tree whose figures can be counted by hand."""

import json
import sys
from pathlib import Path

import pytest
import structure

pytestmark = pytest.mark.benchmark

FILES = {
    "__init__.py": "",
    "errors.py": "class UserError(Exception):\n    pass\n",
    "data/__init__.py": "from kd.data.rows import read\n",
    "data/rows.py": """\
from typing import Any
from kd.data.batch import Batch

def read(row: Any) -> Batch:
    # Only the text.
    return Batch(tidy(row)) if row else helper_of_nobody_else(row)

def helper_of_nobody_else(row: Any) -> Batch:
    return Batch([x for x in row])

def never_called() -> None:
    read(1)
""",
    "data/batch.py": """\
class Batch:
    def __init__(self, ids):
        self.ids = self.checked(ids)

    def checked(self, ids):
        return ids

    def to(self, device):
        return self

    def unused(self):
        return self
""",
    "training/step.py": """\
import kd.data
from kd.data import read
from kd.data.batch import Batch

def train_step(rows, device, batch: Batch):
    batches = [read(row) for row in rows]
    return batch.to(device)
""",
}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / "kd" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "kd" / name).write_text(text)
    return tmp_path


def test_the_way_goes_through_imports_reexports_constructors_and_methods(tree):
    figures = structure.measure(tree, ["kd/training/step.py:train_step"])
    assert figures["files_passed"] == [
        "kd/data/batch.py",
        "kd/data/rows.py",
        "kd/training/step.py",
    ]
    # train_step, read, helper_of_nobody_else, Batch.__init__, Batch.checked, Batch.to
    assert figures["num_functions_passed"] == 6
    assert figures["num_lines_passed"] == 3 + 3 + 2 + 2 + 2 + 2


def test_density_is_counted(tree):
    figures = structure.measure(tree, ["kd/training/step.py:train_step"])
    assert figures["num_any"] == 2
    assert figures["num_modules_at_root"] == 1
    assert figures["num_functions_over_40_lines"] == 0
    lines = [line for text in FILES.values() for line in text.splitlines() if line.strip()]
    assert figures["comment_lines_percent"] == round(100 / len(lines), 2)
    # one conditional and two comprehensions
    num_statements = 2 + 1 + 8 + 9 + 6  # of each file, in the order above
    expected = round(100 * 3 / num_statements, 2)
    assert figures["nested_expressions_per_100_statements"] == expected


def test_the_default_entries_are_there_and_reach_the_kernel(monkeypatch, tmp_path, capsys):
    output = tmp_path / "structure.json"
    monkeypatch.setattr(sys, "argv", ["structure.py", "--json", str(output)])
    structure.main()
    figures = json.loads(output.read_text())
    assert "kd/losses/triton_kernel.py" in figures["files_passed"]
    assert not {"kd/cli.py", "kd/study/runner.py"} & set(figures["files_passed"])
    assert "nested expressions per 100 statements" in capsys.readouterr().out


def test_an_entry_that_is_not_there_is_named(tree):
    with pytest.raises(SystemExit, match=r"kd/train\.py:gone"):
        structure.measure(tree, ["kd/train.py:gone"])
