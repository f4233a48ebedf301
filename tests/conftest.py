"""Fixtures of all tests; what they are made of is in tiny.py."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from forked import run_ranks
from tiny import ROOT

Launch = Callable[..., subprocess.CompletedProcess[str]]
# What implies the mark `process`. A test that starts one otherwise has the mark itself, or fails.
PROCESS_MARKS = ("benchmark", "dist", "fault", "gpu", "hosts", "profile", "real", "slurm", "vllm")
PROCESS_FIXTURES = {"launch", "script"}
STARTS = {"forked.Forked", "subprocess.Popen", "os.fork", "os.posix_spawn", "os.system"}
running: list[pytest.Item] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--profile", action="store_true", help="measure the loss: tests/profile")
    folder = ROOT / "build" / "profile"
    parser.addoption(
        "--profile-output", type=Path, default=folder, help="folder of its traces and CSV"
    )


def pytest_itemcollected(item: pytest.Item) -> None:
    """Before -m selects among them, so that `make quick` is all tests that start no process."""
    is_marked = any(item.get_closest_marker(name) for name in PROCESS_MARKS)
    if is_marked or PROCESS_FIXTURES & set(getattr(item, "fixturenames", ())):
        item.add_marker("process")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    running.append(item)
    try:
        return (yield)
    finally:
        running.pop()


def check_mark(event: str, arguments: tuple[object, ...]) -> None:
    if event in STARTS and running and not running[-1].get_closest_marker("process"):
        pytest.fail(f"starts a process and is not marked so: {event}{arguments[:2]}")


sys.addaudithook(check_mark)


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
