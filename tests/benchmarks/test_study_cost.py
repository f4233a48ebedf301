"""benchmarks/study_cost.py on one short cell: both studies say the same, and the sums are right."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import ROOT, write_scored_recipe

pytestmark = pytest.mark.benchmark


def test_a_cell_from_a_cache_says_what_a_cell_with_a_teacher_says(tmp_path: Path) -> None:
    recipe = write_scored_recipe(tmp_path)
    script = [sys.executable, str(ROOT / "benchmarks" / "study_cost.py"), "--recipe", str(recipe)]
    command = [*script, "--keep", "0.5", "--seeds", "1", "--set", "training.max_steps=2"]
    command += ["--work", str(tmp_path / "work"), "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "study_cost.json").read_text())
    (cell,) = found["cells"]
    assert cell["same_responses"]
    assert cell["largest_relative_difference_of_a_loss"] < 1e-5
    live, cached = cell["teacher"]["flops"], cell["cache"]["flops"]
    assert live == pytest.approx(cached + cell["cache"]["flops_spared"])
    assert found["flops"]["cache"] == cached + found["filled"]["flops"]
    assert (tmp_path / "study_cost.md").read_text().startswith("| study |")
