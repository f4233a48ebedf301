"""The watchdog ends a process that hangs, and leaves one alone that does not."""

import subprocess
import sys

import pytest

from kd.constants import EXIT_HANG

pytestmark = pytest.mark.process

SCRIPT = """
import sys, time
sys.path.insert(0, {root!r})
import kd.distributed.watchdog
kd.distributed.watchdog.OTHER_RANKS_SECONDS = 0.1
kd.distributed.watchdog.BACKSTOP_SECONDS = 0.3
with kd.distributed.watchdog.Watchdog(minutes=2 / 60) as watchdog:
    for _ in range(6):  # together longer than the limit, and each far from it on a busy machine
        time.sleep(0.4)
        watchdog.pat()
    print("steps done", flush=True)
    {end}
time.sleep(3)
print("out of the watched part")
"""


def run(end: str) -> subprocess.CompletedProcess[str]:
    from tiny import ROOT

    script = SCRIPT.format(root=str(ROOT), end=end)
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )


def test_steps_in_time_are_left_alone_and_so_is_what_comes_after_them() -> None:
    done = run("pass")
    assert (done.returncode, done.stderr) == (0, "")
    assert "out of the watched part" in done.stdout


def test_a_hang_prints_the_stack_and_ends_the_process() -> None:
    done = run("time.sleep(60)")
    assert done.returncode == EXIT_HANG
    assert "steps done" in done.stdout
    assert "no step within run.watchdog_minutes = 0.0333333" in done.stderr
    assert 'File "<string>", line' in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="needs the C library by name")
def test_a_hang_that_holds_the_interpreters_lock_is_ended_too() -> None:
    done = run("import ctypes; ctypes.PyDLL('libc.so.6').sleep(60)")
    assert done.returncode != 0
    assert "Timeout" in done.stderr
    assert "out of the watched part" not in done.stdout
