"""The suite for a GPU machine, in small form on the CPU: it stops in time, continues, and repeats
only what failed.
"""

import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
from tiny import ROOT

pytestmark = pytest.mark.benchmark

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
    """Three calls on one folder: too short, with a file on which the training step fails, and
    without that file.
    """
    folder = tmp_path_factory.mktemp("results")
    broken = folder / "train_step.json"
    short = suite(folder, 9, SUITE_DEVICE="cpu")
    broken.write_text("{")
    failing = suite(folder, 500, SUITE_DEVICE="cpu")
    broken.unlink()
    return {
        "short": short,
        "failing": failing,
        "last": suite(folder, 500, SUITE_DEVICE="cpu"),
        "folder": folder,
    }


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
    assert list(parts) == ["train_step", "loss", "profile", "tests"]
    assert re.fullmatch(r"passed in \d+ s", parts["tests"])
    assert re.fullmatch(r"passed in \d+ s", parts["loss"])
    assert parts["train_step"].startswith("failed with status 1")
    assert re.fullmatch(r"passed in \d+ s", parts["profile"])
    assert "JSONDecodeError" in failing.stdout


def test_the_next_call_repeats_only_what_failed(calls) -> None:
    last, parts = calls["last"], outcomes(calls["last"])
    assert last.returncode == 0, last.stdout + last.stderr
    assert re.fullmatch(r"passed in \d+ s", parts["train_step"])
    assert {parts[part] for part in ("tests", "loss", "profile")} == {"passed in an earlier call"}
    assert "| gpu_zero2 | 128 |" in last.stdout


def test_the_results_are_a_few_flat_files(calls) -> None:
    names = {path.name for path in calls["folder"].iterdir()}
    assert names == {
        "suite.txt",
        "tests.txt",
        "loss_cpu.json",
        "loss_cpu.md",
        "train_step.json",
        "train_step.md",
        "profile.csv",
        "profile_traces.tar.gz",
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_without_a_gpu_it_stops_with_one_line(tmp_path) -> None:
    process = suite(tmp_path, 100)
    assert process.returncode == 2
    assert process.stderr.splitlines() == [
        "error: PyTorch sees no CUDA device here; SUITE_DEVICE=cpu runs everything in small form"
    ]
    assert list(tmp_path.iterdir()) == []


def test_the_carried_wheels_are_the_versions_of_the_tests() -> None:
    def versions(path: Path) -> dict[str, str]:
        lines = [
            line for line in path.read_text().splitlines() if line and not line.startswith("#")
        ]
        return dict(line.split("==") for line in lines)

    carried, tested = (
        versions(ROOT / "benchmarks" / "wheels.txt"),
        versions(ROOT / "constraints.txt"),
    )
    shared = carried.keys() & tested.keys()
    assert {"deepspeed", "datasets", "pydantic", "pytest-xdist", "execnet"} <= shared
    assert {name: carried[name] for name in shared} == {name: tested[name] for name in shared}
