"""Fixtures of all tests; what they are made of is in tiny.py."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import ROOT, launcher_command

Launch = Callable[..., subprocess.CompletedProcess[str]]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--profile", action="store_true", help="measure the loss: tests/profile")
    folder = ROOT / "build" / "profile"
    parser.addoption(
        "--profile-output", type=Path, default=folder, help="folder of its traces and CSV"
    )


@pytest.fixture(scope="session")
def launch() -> Launch:
    """Run a script under the deepspeed launcher: launch("launch/train.py", "--recipe", ...,
    num_ranks=2).
    """

    def run(
        script: str, *arguments: str, num_ranks: int = 2, timeout: float = 300, **environment: str
    ):
        return subprocess.run(
            launcher_command(script, *arguments, num_ranks=num_ranks),
            cwd=ROOT,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    return run
