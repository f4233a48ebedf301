"""What asks a run to stop: signals, also two of them, and a deepspeed launcher that has gone."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import ROOT

from kd.distributed.interruption import SIGNALS, Interruption

# A front that starts a launcher that starts a rank, as `deepspeed` does; the names are what counts.
RANK = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from kd.distributed.interruption import Interruption
interruption = Interruption()
interruption.arm()
print("rank", interruption.is_requested(), flush=True)
deadline = time.monotonic() + 20
while not interruption.is_requested() and time.monotonic() < deadline:
    time.sleep(0.01)
print("asked", interruption.is_requested(), flush=True)
"""
START = "import subprocess, sys; subprocess.run([sys.executable, *sys.argv[2:]])"


@pytest.fixture
def handlers():
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_asks_and_a_second_one_does_no_harm(
    handlers: None, number: signal.Signals
) -> None:
    before = signal.getsignal(number)
    interruption = Interruption()
    assert signal.getsignal(number) is before  # has its effect while ranks wait for one another
    interruption.arm()
    assert not interruption.is_requested()
    os.kill(os.getpid(), number)
    os.kill(os.getpid(), number)
    assert interruption.is_requested()


@pytest.mark.process
@pytest.mark.parametrize("name", ["deepspeed", "another"])
def test_ranks_notice_that_the_front_of_their_launcher_has_gone(tmp_path: Path, name: str) -> None:
    rank = tmp_path / "rank.py"
    rank.write_text(RANK)
    inner = ["-c", START, f"{name}.launcher.launch", str(rank)]
    front = subprocess.Popen(
        [sys.executable, "-c", START, "front", *inner],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert front.stdout is not None
    assert front.stdout.readline() == "rank False\n"
    front.send_signal(signal.SIGTERM)
    try:
        if name == "deepspeed":
            assert front.stdout.readline() == "asked True\n"
        else:  # an unknown launcher may be given up by its front on purpose, as by nohup
            with pytest.raises(subprocess.TimeoutExpired):
                front.communicate(timeout=2)
    finally:
        os.killpg(front.pid, signal.SIGKILL)
        front.wait()
