"""Errors on the command line: one block, printed by one rank, and a status that launchers see."""

import os
import subprocess
import sys
import time

import pytest
from tiny import ROOT

from kd.cli import recipe_parser, run
from kd.errors import UserError


class Exit(Exception):
    """In the place of os._exit, which would end the tests."""


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that were slept, without sleeping; os._exit raises Exit."""

    def leave(status: int) -> None:
        raise Exit(status)

    slept: list[float] = []
    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(time, "sleep", slept.append)
    return slept


def fail() -> None:
    raise UserError("data.path = 'x': no such file")


@pytest.mark.parametrize("rank", [None, "0"])
def test_rank_zero_prints_the_error_once_and_exits_with_status_2(
    waits: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rank: str | None
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    with pytest.raises(Exit, match="^2$"):
        run(fail)
    assert tuple(capsys.readouterr()) == ("", "\nerror: data.path = 'x': no such file\n\n")
    assert waits == []


def test_another_rank_leaves_time_to_rank_zero_and_then_names_itself(
    waits: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(Exit, match="^2$"):
        run(fail)
    assert capsys.readouterr().err == "\nerror on rank 3: data.path = 'x': no such file\n\n"
    assert len(waits) == 1
    assert waits[0] >= 1


def test_an_error_that_is_not_the_users_keeps_its_stack(waits: list[float]) -> None:
    with pytest.raises(ZeroDivisionError):
        run(lambda: print(1 // 0))
    assert waits == []


def test_overrides_are_collected_in_their_order() -> None:
    arguments = ["--recipe", "tiny", "--set", "run.seed=1", "--set", "run.seed=2"]
    assert recipe_parser("").parse_args(arguments).overrides == ["run.seed=1", "run.seed=2"]


@pytest.mark.parametrize("field", ["data.chat_template", "evaluation.path"])
def test_check_finds_a_missing_file_without_torch(field: str) -> None:
    command = [sys.executable, "-X", "importtime", "launch/train.py", "--recipe", "qwen7b_to_1p5b_trunc50", "--check"]
    done = subprocess.run(
        [*command, "--set", f"{field}=nowhere"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert f"error: {field} = 'nowhere': no such file" in done.stderr
    assert not {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()} & {"torch", "transformers"}
