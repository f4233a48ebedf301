"""benchmarks/rollouts.py on one short arm: what it counts, and that it trains nothing twice."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import ROOT, write_scored_recipe

pytestmark = pytest.mark.benchmark


def test_an_arm_that_samples_is_trained_once_for_each_way_of_counting(tmp_path: Path) -> None:
    recipe = write_scored_recipe(tmp_path)
    work, arm = tmp_path / "work", "student's, 16 tokens"
    command = [sys.executable, str(ROOT / "benchmarks" / "rollouts.py"), "--recipe", str(recipe)]
    command += ["--arm", arm, "--seeds", "1", "--budget-steps", "8"]
    command += ["--work", str(work), "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "rollouts.json").read_text())
    alone, with_sampling = found["rows"]
    assert [row["counted"] for row in found["rows"]] == ["training", "training and sampling"]
    assert alone["num_steps"] > with_sampling["num_steps"] >= 1
    for row in found["rows"]:
        spent = row["training_flops"]
        if row is with_sampling:
            spent += row["sampling_flops"]
        # As many steps as the budget pays for, by the cost of a step in the pilot
        assert spent == pytest.approx(found["budget_flops"], rel=0.2)
        assert row["sampling_flops"] > 0
    runs = {path.parent for path in work.glob("*/SUCCESS")}
    assert len(runs) == 4, "two pilots, and a run for each way of counting"
    assert (tmp_path / "rollouts.md").read_text().count(f"| {arm} |") == 2
