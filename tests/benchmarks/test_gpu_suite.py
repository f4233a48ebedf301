"""The suite for a borrowed GPU, in small form on the CPU: it stops in time, continues, and repeats what failed alone."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
from tiny import ROOT

SUITE = ROOT / "benchmarks" / "gpu_suite.sh"


def suite(output: Path, seconds: int, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(SUITE), str(output), str(seconds)],
        cwd=output,  # it finds the repository itself
        env={**os.environ, "KD_COMMIT": "c0ffee", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def outcomes(process: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """part -> what came of it, from the summary, which stands last."""
    return dict(line.split(maxsplit=1) for line in process.stdout.strip().splitlines()[-4:])


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> dict[str, subprocess.CompletedProcess[str]]:
    """Three calls on one folder: too short, with a file on which the training step fails, and without that file."""
    folder = tmp_path_factory.mktemp("results")
    broken = folder / "train_step.json"
    short = suite(folder, 9, SUITE_DEVICE="cpu")
    broken.write_text("{")
    failing = suite(folder, 500, SUITE_DEVICE="cpu")
    broken.unlink()
    return {"short": short, "failing": failing, "last": suite(folder, 500, SUITE_DEVICE="cpu"), "folder": folder}


def test_a_call_that_is_too_short_stops_in_time_and_says_so(calls) -> None:
    short = calls["short"]
    assert short.returncode == 75, short.stdout + short.stderr
    assert outcomes(short)["tests"].startswith("unfinished")
    assert outcomes(short)["train_step"].startswith("unfinished")
    (seconds,) = re.findall(r"^== CPU, commit c0ffee, (\d+) of 9 s$", short.stdout, re.MULTILINE)
    assert int(seconds) <= 9 + 20  # imports on a busy machine


def test_a_part_that_fails_leaves_the_others_their_turn(calls) -> None:
    failing, parts = calls["failing"], outcomes(calls["failing"])
    assert failing.returncode == 1, failing.stdout + failing.stderr
    assert list(parts) == ["tests", "loss", "train_step", "profile"]
    assert parts["tests"].startswith("passed in")
    assert parts["loss"].startswith("passed in")
    assert parts["train_step"].startswith("failed with status 1")
    assert not parts["profile"].startswith("unfinished")
    assert "JSONDecodeError" in failing.stdout


def test_the_next_call_repeats_only_what_failed(calls) -> None:
    last, parts = calls["last"], outcomes(calls["last"])
    assert last.returncode == 0, last.stdout + last.stderr
    assert parts["tests"] == parts["loss"] == "passed in an earlier call"
    assert parts["train_step"].startswith("passed in")
    assert "| 128 |" in last.stdout


def test_the_results_are_a_few_flat_files(calls) -> None:
    names = {path.name for path in calls["folder"].iterdir()}
    assert {"suite.txt", "tests.txt", "loss_cpu.json", "loss_cpu.md", "train_step.json", "train_step.md"} <= names
    assert len(names) <= 8
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+", name) for name in names)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_without_a_gpu_it_stops_with_one_line(tmp_path) -> None:
    process = suite(tmp_path, 100)
    assert process.returncode == 2
    assert process.stderr.splitlines() == [
        "error: PyTorch sees no CUDA device here; SUITE_DEVICE=cpu runs everything in small form"
    ]
    assert list(tmp_path.iterdir()) == []
