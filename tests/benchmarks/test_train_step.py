"""The benchmark of a training step, as a user calls it, on tiny shapes: every figure is there and
they agree.
"""

import json
import math
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
import train_step
from step_compare import compare
from step_profile import END, STEP, host_functions, profile_line, step_facts
from tiny import ROOT, layout_of
from torch import nn
from train_step import LAYOUTS, is_same, main, model_configs, random_batches, recipe_of, rows_of

from kd.errors import UserError

pytestmark = pytest.mark.benchmark

SCRIPT = ROOT / "benchmarks" / "train_step.py"
# The second after the first, whose ZeRO-3 it must not be measured under
MEASURED = ("zero3_zero3", "gpu_zero2_8k_packed")


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
            "--layouts",
            ",".join(MEASURED),
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


@pytest.fixture
def rows(report: dict) -> list[dict]:
    return [row for of in report["layouts"].values() for row in of.values()]


def test_the_phases_are_nearly_the_whole_step(rows) -> None:
    assert len(rows) == 4
    for row in rows:
        medians = [phase["median"] for phase in row["phases_ms"].values()]
        assert len(medians) == 5
        assert min(medians) > 0
        assert 0.8 < row["sum_over_step"] <= 1.0
        assert row["step_ms"]["p20"] <= row["step_ms"]["median"] <= row["step_ms"]["p80"]


def test_every_row_has_its_tokens_memory_rates_and_loss(rows) -> None:
    for row, length in zip(rows, (96, 48, 96, 48), strict=True):
        num_tokens = 4 * length
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


def test_every_layout_takes_the_same_steps(report, rows) -> None:
    assert [row["num_micro_batches"] for row in rows] == [4, 4, 1, 1]
    assert [row["micro_batch_shape"] for row in rows[1:3]] == [[1, 48], [1, 4 * 96]]
    one, other = ([row["last_loss"] for row in of.values()] for of in report["layouts"].values())
    assert one == pytest.approx(other, rel=0.01)  # bf16


def test_the_shortest_length_of_a_layout_is_profiled(rows) -> None:
    assert [("profile" in row) for row in rows] == [False, True, False, True]
    for row in rows[1::2]:
        profile = row["profile"]
        assert profile["device_busy_share"] is None
        assert profile["num_host_waits"] == profile["num_scalar_reads"] > 0
        functions = profile["host_functions"]
        assert len(functions) == 10
        assert functions[0]["self_ms"] >= functions[-1]["self_ms"] > 0


def test_flops_count_recomputation_apart(rows) -> None:
    for row in rows:
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
    assert tuple(report["ratios"]) == MEASURED
    (ratio,) = report["ratios"]["zero3_zero3"].values()
    assert list(report["ratios"]["zero3_zero3"]) == ["48/96"]
    assert ratio["tokens"] == 0.5
    assert 0.4 < ratio["model_flops"] < 0.5  # attention takes less than half
    assert all(math.isfinite(ratio[key]) and ratio[key] > 0 for key in ("step_ms", "peak_memory"))


def test_the_table_says_where_and_of_what(output, report) -> None:
    table = (output / "train_step.md").read_text()
    assert "commit c0ffee" in table
    assert f"torch {report['environment']['packages']['torch']}" in table
    assert "torch.optim.adamw.AdamW" in table
    lines = table.splitlines()
    assert [line.split(" | ")[:2] for line in lines if line.startswith("|")][2:] == [
        [f"| {name}", length] for name in MEASURED for length in ("96", "48")
    ]
    assert sum("no device" in line for line in lines) == 2


def test_a_second_call_measures_only_what_is_missing(output, report) -> None:
    process = run(output, "--device", "cpu", "--keep", "96,24")
    assert process.returncode == 0, process.stderr[-3000:]
    layouts = json.loads((output / "train_step.json").read_text())["layouts"]
    for name in MEASURED:
        assert list(layouts[name]) == ["96", "48", "24"]
        assert layouts[name]["96"] == report["layouts"][name]["96"]


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


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_cuts_the_same_sequences_up(name) -> None:
    recipe, is_packed = recipe_of(name, []), name.endswith("packed")
    facts = {"sequence_layout": "packed" if is_packed else "padded"}
    batches = random_batches(train_step.Pair(None, None, model_configs(False), facts), recipe, 4096)
    shape = (1, 8192) if is_packed else (2, 4096) if "8k" in name else (1, 4096)
    assert {tuple(batch.input_ids.shape) for batch in batches} == {shape}
    tokens = np.sort(torch.cat([batch.input_ids.flatten() for batch in batches]).numpy())
    shipped = random_batches(
        train_step.Pair(None, None, model_configs(False), {"sequence_layout": "padded"}),
        recipe_of("zero3_zero3", []),
        4096,
    )
    expected = torch.cat([batch.input_ids.flatten() for batch in shipped])
    assert (tokens == np.sort(expected.numpy())).all()


def test_what_does_not_fit_is_a_row_of_its_own(monkeypatch) -> None:
    def fails(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried\nmore")

    monkeypatch.setattr(train_step, "build_pair", fails)
    arguments = Namespace(overrides=[], small=True, steps=2)
    rows = dict(rows_of("gpu_zero1", [48, 96], arguments, layout_of(0, 1)))
    assert list(rows) == [48, 96]
    assert all(row["error"] == "out of memory: CUDA out of memory. Tried" for row in rows.values())
    report = {"layouts": {}, "ratios": {}}
    for length, row in rows.items():
        train_step.add_row(report, "gpu_zero1", length, row)
    assert report["ratios"] == {"gpu_zero1": {}}
    line = train_step.markdown_row("gpu_zero1", "96", rows[96])
    assert line.count("|") == len(train_step.COLUMNS) + 1


def test_a_layout_leaves_torch_as_it_was(monkeypatch) -> None:
    monkeypatch.setattr(nn.functional, "linear", None)
    train_step.release()
    assert nn.functional.linear is train_step.LINEAR


def event(name: str, category: str, start: float, stop: float, thread: int = 1) -> dict:
    return {"name": name, "cat": category, "ts": start, "dur": stop - start, "tid": thread}


TRACE = [
    event("before", "cpu_op", 0, 90),
    event(STEP, "user_annotation", 100, 900),
    event("aten::item", "cpu_op", 200, 500),
    event("aten::_local_scalar_dense", "cpu_op", 210, 490),
    event("cudaStreamSynchronize", "cuda_runtime", 250, 450),
    event("backward", "cpu_op", 300, 350, thread=2),
    event(END, "user_annotation", 900, 1100),
    event("cudaDeviceSynchronize", "cuda_runtime", 910, 1090),
    event("gemm", "kernel", 50, 150, thread=7),
    event("gemm", "kernel", 300, 400, thread=7),
    event("copy", "gpu_memcpy", 350, 450, thread=8),
    event("gemm", "kernel", 1000, 1050, thread=7),
    event(STEP, "gpu_user_annotation", 100, 1050, thread=7),
]


def test_a_profile_counts_waits_and_the_union_of_kernels() -> None:
    facts = step_facts(TRACE, "cuda")
    assert facts["step_ms"] == 1.0
    assert facts["device_busy_share"] == pytest.approx((50 + 150 + 50) / 1000)
    assert (facts["num_host_waits"], facts["host_wait_ms"]) == (1, 0.2)  # not the measurement's own
    assert facts["num_scalar_reads"] == 1
    functions = host_functions(TRACE)
    assert {f["name"]: f["self_ms"] for f in functions} == pytest.approx(
        {
            "cudaStreamSynchronize": 0.2,
            "aten::_local_scalar_dense": 0.08,
            "backward": 0.05,
            "aten::item": 0.02,
        }
    )
    assert functions[0]["name"] == "cudaStreamSynchronize"
    line = profile_line(facts | {"host_functions": functions})
    assert line.startswith("device busy 0.250 of 1.0 ms; 1 host waits (0.2 ms); ")


def test_two_results_are_compared_row_by_row(output, report, tmp_path) -> None:
    row = report["layouts"]["zero3_zero3"]["96"]
    faster = row | {"step_ms": {name: ms / 2 for name, ms in row["step_ms"].items()}}
    other = report | {"layouts": {"zero3_zero3": {"96": faster, "48": {"error": "out of memory"}}}}
    other["settings"] = report["settings"] | {"steps": 7}
    (tmp_path / "train_step.json").write_text(json.dumps(other))
    text = compare(output, tmp_path)
    assert "- settings.steps: 2, 7\n" in text
    lines = [line for line in text.splitlines() if line.startswith("| zero3_zero3")]
    assert "(0.500) |" in lines[0]
    assert "measured -> out of memory" in lines[1]
    assert "measured -> not measured" in text.splitlines()[-1]
    assert "Same hardware, versions and settings." in compare(output, output)
