"""The benchmark of a training step, as a user calls it, on tiny shapes: every figure is there and
they agree.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import ROOT
from train_step import is_same, main

from kd.errors import UserError

pytestmark = pytest.mark.benchmark

SCRIPT = ROOT / "benchmarks" / "train_step.py"


def run(output: Path, *arguments: str, commit: str = "c0ffee") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            sys.executable,
            str(SCRIPT),
            "--output",
            str(output),
            "--small",
            "--steps",
            "2",
            *arguments,
        ],
        cwd=ROOT,
        env={**os.environ, "KD_COMMIT": commit, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("train_step")
    process = run(folder, "--device", "cpu", "--keep", "96,48")
    assert process.returncode == 0, process.stderr[-3000:]
    return folder


@pytest.fixture
def report(output: Path) -> dict:
    return json.loads((output / "train_step.json").read_text())


def test_the_phases_are_nearly_the_whole_step(report) -> None:
    for row in report["lengths"].values():
        medians = [phase["median"] for phase in row["phases_ms"].values()]
        assert len(medians) == 5
        assert min(medians) > 0
        assert 0.8 < row["sum_over_step"] <= 1.0
        assert row["step_ms"]["p20"] <= row["step_ms"]["median"] <= row["step_ms"]["p80"]


def test_every_row_has_its_tokens_memory_rates_and_loss(report) -> None:
    for length, row in report["lengths"].items():
        num_tokens = 4 * int(length)
        assert row["num_input_tokens"] == num_tokens
        assert row["num_supervised_tokens"] == num_tokens - 4
        assert row["tokens_per_second"] == pytest.approx(
            num_tokens / row["step_ms"]["median"] * 1000
        )
        assert row["memory_gib"]["peak"] > sum(
            row["memory_gib"][part] for part in ("teacher_weights", "optimizer")
        )
        assert row["mfu_of_measured_peak"] == pytest.approx(
            row["model_tflops"] / row["matmul_tflops"]
        )
        assert 0.1 < row["last_loss"] < 10


def test_flops_count_recomputation_apart(report) -> None:
    for row in report["lengths"].values():
        flops = row["flops"]
        parts = ("teacher_forward", "student_forward", "loss", "backward")
        assert flops["model"] == pytest.approx(sum(flops[part] for part in parts))
        assert flops["backward"] == pytest.approx(2 * flops["student_forward"])
        assert flops["with_recomputation"] - flops["model"] == pytest.approx(
            flops["student_forward"]
        )
        # 1187 shared rows; hidden sizes 32 and 64
        assert flops["loss"] == 2 * row["num_supervised_tokens"] * 1187 * (3 * 32 + 64)


def test_the_short_length_is_compared_with_the_long_one(report) -> None:
    (ratio,) = report["ratios"].values()
    assert list(report["ratios"]) == ["48/96"]
    assert ratio["tokens"] == 0.5
    assert 0.4 < ratio["model_flops"] < 0.5  # attention takes less than half
    assert all(math.isfinite(ratio[key]) and ratio[key] > 0 for key in ("step_ms", "peak_memory"))


def test_the_table_says_where_and_of_what(output, report) -> None:
    table = (output / "train_step.md").read_text()
    assert "commit c0ffee" in table
    assert f"torch {report['environment']['packages']['torch']}" in table
    assert "torch.optim.adamw.AdamW" in table
    assert [line.split(" | ")[0] for line in table.splitlines() if line.startswith("|")][2:] == [
        "| 96",
        "| 48",
    ]


def test_a_second_call_measures_only_what_is_missing(output, report) -> None:
    process = run(output, "--device", "cpu", "--keep", "96,24")
    assert process.returncode == 0, process.stderr[-3000:]
    lengths = json.loads((output / "train_step.json").read_text())["lengths"]
    assert list(lengths) == ["96", "48", "24"]
    assert lengths["96"] == report["lengths"]["96"]


def test_a_device_that_is_not_there_is_an_error(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(
        sys, "argv", ["train_step.py", "--output", str(tmp_path), "--device", "cuda", "--small"]
    )
    with pytest.raises(UserError, match="DS_ACCELERATOR=cpu"):
        main()
    assert list(tmp_path.iterdir()) == []


def test_another_commit_and_uncommitted_changes_are_measured_anew() -> None:
    here = {"environment": {"commit": "c0ffee"}, "settings": {"steps": 3}}
    assert is_same(here, here)
    assert not is_same(here, {**here, "environment": {"commit": "decade"}})
    assert not is_same(here, {**here, "settings": {"steps": 4}})
    for unnamed in ("c0ffee+", None):
        changed = {**here, "environment": {"commit": unnamed}}
        assert not is_same(changed, changed)
