"""End a run that hangs, after every rank has printed where it is."""

import contextlib
import faulthandler
import os
import socket
import sys
import threading
import time
import traceback

from kd.constants import EXIT_HANG

# Ranks do not reach their limit at the same instant; the first to leave ends the others
OTHER_RANKS_SECONDS = 5.0
BACKSTOP_SECONDS = 30.0


class Watchdog:
    """Prints the stacks and ends the process with EXIT_HANG when pat() has not been called for
    `minutes`.

    Use as a context: outside it nothing is watched. A call that holds the interpreter's lock also
    stops the thread that watches; faulthandler, which needs no lock, then ends the process half a
    minute later.
    """

    def __init__(self, minutes: float) -> None:
        self._minutes = minutes
        self._patted = threading.Event()
        self._closed = False
        self._main = threading.get_ident()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        self.pat()
        return self

    def __exit__(self, *_: object) -> None:
        faulthandler.cancel_dump_traceback_later()
        self._closed = True
        self._patted.set()

    def pat(self) -> None:
        """Restart the time, after a step or a checkpoint."""
        faulthandler.dump_traceback_later(self._minutes * 60 + BACKSTOP_SECONDS, exit=True)
        self._patted.set()

    def _watch(self) -> None:
        while self._patted.wait(self._minutes * 60):
            self._patted.clear()
            if self._closed:
                return
        rank = os.environ.get("RANK", "0")
        message = (
            "\n"
            f"rank {rank} on {socket.gethostname()}: no step within run.watchdog_minutes = "
            f"{self._minutes:g}. Every rank prints its stack and ends. The cause is the rank that "
            "waits in no collective; if all wait, a rank or its network is lost. Continue with "
            "--resume auto\n"
        )
        # One write, so that ranks do not mix their lines.
        with contextlib.suppress(OSError):  # whoever read it may have gone, and ssh with it
            sys.stderr.write(
                message + "".join(traceback.format_stack(sys._current_frames()[self._main]))
            )
            sys.stderr.flush()
        time.sleep(OTHER_RANKS_SECONDS)
        os._exit(EXIT_HANG)
