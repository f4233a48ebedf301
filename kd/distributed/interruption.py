"""What asks a run to stop at the next step boundary: USR1 or TERM to any rank, or a launcher that
has gone.

SLURM sends USR1 ahead of its time limit, and TERM on preemption and scancel. DeepSpeed's launcher
passes TERM on from launch.py, and kills after 30 seconds; its front, `deepspeed`, dies of a signal
and leaves launch.py and the ranks behind, as does a broken ssh connection. They would train on,
unseen.
"""

import os
import signal
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Interruption:
    """Made before the slow imports, and armed when the ranks have met: until then there is nothing
    to save, and USR1 and TERM end the process at once.
    """

    def __init__(self) -> None:
        self._signalled = False
        self._launcher = _deepspeed_launcher()

    def arm(self) -> None:
        for number in SIGNALS:
            signal.signal(number, self._note)

    def is_requested(self) -> bool:
        """Whether this rank was asked to stop. Once is enough: further signals change nothing."""
        return self._signalled or _deepspeed_launcher() != self._launcher

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True


def _deepspeed_launcher() -> tuple[int, int] | None:
    """The process of launch.py, this one's parent, and its own parent; None when another launcher,
    or none, is used.
    """
    parent = os.getppid()
    try:
        if b"deepspeed.launcher.launch" not in Path(f"/proc/{parent}/cmdline").read_bytes():
            return None
        return parent, int(Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:  # it ended just now, or the system has no /proc
        return None
