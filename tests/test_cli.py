"""Errors on the command line: one block, printed by one rank, and a status that launchers see."""

import errno
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from tiny import ROOT

from kd.cli import recipe_parser, run
from kd.constants import EXIT_INTERRUPTED, EXIT_NO_READER
from kd.errors import Interrupted, LostPeer, UserError


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
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    return slept


def fail() -> None:
    raise UserError("data.path = 'x': no such file")


@pytest.mark.parametrize("rank", [None, "0"])
def test_rank_zero_prints_the_error_once_and_exits_with_status_2(
    waits: list[float],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    rank: str | None,
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


def test_among_many_ranks_it_is_printed_with_the_rank_and_ends_the_process_at_once(
    waits: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(Exit, match="^1$"):
        run(lambda: print(1 // 0))
    stderr = capsys.readouterr().err
    assert stderr.startswith(f"\nrank 3 on {socket.gethostname()} failed:\nTraceback")
    assert "ZeroDivisionError" in stderr
    assert waits == []


def test_a_lost_peer_is_told_in_one_line_after_the_peer_had_time_to_speak(
    waits: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lose_peer() -> None:
        raise LostPeer("rank 1 ended")

    monkeypatch.setenv("RANK", "0")
    with pytest.raises(Exit, match="^1$"):
        run(lose_peer)
    assert capsys.readouterr().err == f"\nrank 0 on {socket.gethostname()}: rank 1 ended\n\n"
    assert len(waits) == 1


def test_an_interrupted_run_has_a_status_of_its_own(
    waits: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    def stop() -> None:
        raise Interrupted

    with pytest.raises(Exit, match=f"^{EXIT_INTERRUPTED}$"):
        run(stop)
    assert capsys.readouterr().err == ""


class Reader:
    """An output that takes `room` writes, and then fails as the kernel would."""

    def __init__(self, room: int, number: int) -> None:
        self.room, self.number = room, number

    def write(self, text: str) -> None:
        self.room -= 1
        self.flush()

    def flush(self) -> None:
        if self.room < 0:
            raise OSError(self.number, os.strerror(self.number))


@pytest.mark.parametrize(
    ("room", "number", "status"),
    [
        (0, errno.EPIPE, EXIT_NO_READER),
        (0, errno.ENOSPC, 1),
        (9, errno.EPIPE, None),
    ],
)
def test_an_output_that_takes_no_more_ends_a_command_without_a_stack(
    waits: list[float],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    room: int,
    number: int,
    status: int | None,
) -> None:
    monkeypatch.setattr(sys, "stdout", Reader(room, number))
    if status is None:
        run(lambda: print("all"))
        return
    with pytest.raises(Exit, match=f"^{status}$"):
        run(lambda: print("all"))
    assert ("No space left" in capsys.readouterr().err) == (number == errno.ENOSPC)


def test_a_broken_pipe_that_is_not_the_outputs_keeps_its_stack(waits: list[float]) -> None:
    def send() -> None:
        raise BrokenPipeError(errno.EPIPE, "a peer has gone")

    with pytest.raises(BrokenPipeError):
        run(send)


@pytest.mark.process
def test_check_into_head_ends_well() -> None:
    command = f"{sys.executable} launch/train.py --recipe qwen7b_to_1p5b_trunc50 --check | head -1"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "{\n")
    assert "Error" not in done.stderr


def test_overrides_are_collected_in_their_order() -> None:
    arguments = ["--recipe", "tiny", "--set", "run.seed=1", "--set", "run.seed=2"]
    assert recipe_parser("").parse_args(arguments).overrides == ["run.seed=1", "run.seed=2"]


@pytest.mark.process
@pytest.mark.parametrize("field", ["data.chat_template", "evaluation.path"])
def test_check_finds_a_missing_file_without_torch(field: str) -> None:
    command = [
        sys.executable,
        "-X",
        "importtime",
        "launch/train.py",
        "--recipe",
        "qwen7b_to_1p5b_trunc50",
        "--check",
    ]
    done = subprocess.run(
        [*command, "--set", f"{field}=nowhere"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert f"error: {field} = 'nowhere': no such file" in done.stderr
    assert not {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()} & {
        "torch",
        "transformers",
    }


@pytest.mark.process
@pytest.mark.parametrize(("world_size", "status"), [("1", -signal.SIGABRT), ("2", 0)])
def test_a_rank_that_is_done_ends_before_destructors_abort_and_after_exit_handlers(
    world_size: str, status: int
) -> None:
    """libc's exit handlers, as torch's destructors are, abort; Python's are those of W&B."""
    script = (
        "import atexit, ctypes\n"
        "from kd.cli import run\n"
        "def main():\n"
        "    libc = ctypes.CDLL(None)\n"
        "    atexit.register(print, 'told')\n"
        "    libc.__cxa_atexit(ctypes.cast(libc.abort, ctypes.c_void_p), None, None)\n"
        "run(main)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "WORLD_SIZE": world_size, "RANK": world_size, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (status, "told\n"), done.stderr
