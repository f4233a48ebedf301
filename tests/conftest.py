"""Fixtures of all tests; what they are made of is in tiny.py."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from forked import run_ranks
from tiny import ROOT

Launch = Callable[..., subprocess.CompletedProcess[str]]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--profile", action="store_true", help="measure the loss: tests/profile")
    folder = ROOT / "build" / "profile"
    parser.addoption(
        "--profile-output", type=Path, default=folder, help="folder of its traces and CSV"
    )


@pytest.fixture(scope="session")
def launch() -> Launch:
    """Run a script on forked ranks, as the deepspeed launcher does: launch("launch/train.py",
    "--recipe", ..., num_ranks=2).
    """

    def run(
        script: str, *arguments: str, num_ranks: int = 2, timeout: float = 300, **environment: str
    ):
        command, variables = [ROOT / script, *arguments], {**os.environ, **environment}
        return run_ranks(command, num_ranks, env=variables, timeout=timeout)

    return run
