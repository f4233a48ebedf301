"""The comparison of a whole step with its peers, as a user calls it, on tiny shapes: all take the
same step, and every ratio follows from what the file holds.
"""

import importlib.util
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from step_peers import NUM_ROUNDS, TOLERANCES, differences
from tiny import ROOT

pytestmark = pytest.mark.benchmark

HAS_TRL = importlib.util.find_spec("trl") is not None


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("step_peers")
    script = [sys.executable, str(ROOT / "benchmarks" / "train_step.py"), "--peers", "--small"]
    done = subprocess.run(
        [*script, "--output", str(folder)],
        env={**os.environ, "KD_COMMIT": "c0ffee", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture
def report(output: Path) -> dict[str, Any]:
    return json.loads((output / "step_peers.json").read_text())


def test_the_first_step_is_the_same_for_all(report: dict[str, Any]) -> None:
    assert report["sides"].keys() == {"ours", "plain"} | ({"trl"} if HAS_TRL else set())
    for side in report["sides"].values():
        assert side["first_loss"] > 0.05  # the pair differs by more than rounding
        for key, difference in side["difference_from_plain"].items():
            assert difference <= TOLERANCES[key]


@pytest.mark.skipif(not HAS_TRL, reason="needs TRL")
def test_trls_own_trainer_is_among_the_peers(report: dict[str, Any]) -> None:
    assert report["environment"]["packages"]["trl"]
    assert len(report["sides"]["trl"]["rounds_ms"]) == NUM_ROUNDS


def test_ratios_are_to_the_better_peer(report: dict[str, Any]) -> None:
    sides, ratios = dict(report["sides"]), report["ratios"]
    ours = sides.pop("ours")
    assert ratios["time"]["peer"] == min(sides, key=lambda name: sides[name]["step_ms"])
    assert ratios["time"]["ratio"] == statistics.median(ratios["time"]["of_rounds"])
    least = min(side["peak_above_loaded_gib"] for side in sides.values())
    assert ratios["peak_above_baseline"]["ratio"] == ours["peak_above_loaded_gib"] / least
    assert ours["peak_gib"] >= ours["loaded_gib"] > 0.1


def test_the_table_has_a_row_for_each_side_and_says_where(
    output: Path, report: dict[str, Any]
) -> None:
    table = (output / "step_peers.md").read_text()
    assert "commit c0ffee" in table
    assert f"torch {report['environment']['packages']['torch']}" in table
    assert all(f"\n| {name} | " in table for name in report["sides"])


def test_another_objective_is_an_error() -> None:
    plain = {"loss": 1.0, "grad_norm": 1.0, "gradient": torch.ones(4)}
    assert differences(plain, plain) == {"loss": 0.0, "grad_norm": 0.0, "gradient": 0.0}
    changes = {"loss": 1.01, "grad_norm": 1.01, "gradient": torch.tensor([1.0, 1.0, 1.0, 1.01])}
    for key, value in changes.items():
        with pytest.raises(RuntimeError, match=key):
            differences({**plain, key: value}, plain)
