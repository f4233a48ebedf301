"""A lock that keeps other processes out of a folder, and is released however its process ends."""

import contextlib
import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from kd.errors import UserError

log = logging.getLogger(__name__)

# A file server takes that long to notice that a node with a lock has died.
PATIENCE_SECONDS = 120.0
QUIET_SECONDS = 30.0
_held: dict[Path, IO[str]] = {}  # open for the life of this process


def hold(
    folder: Path,
    name: str = ".lock",
    patience_seconds: float = PATIENCE_SECONDS,
    *,
    quiet_seconds: float = 0.0,
) -> None:
    """Keep other processes that ask for the same lock out of the folder until this one ends; makes
    the folder.

    Raises UserError that names the holder if it has not ended in time. A wait of more than
    quiet_seconds is logged. File systems without locks get a warning.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder.resolve() / name
    if path in _held:
        return
    file = path.open("a+", encoding="utf-8")
    started, is_told = time.monotonic(), False
    while not _try(file):
        holder = _holder(file)
        waited = time.monotonic() - started
        if waited >= patience_seconds:
            raise UserError(
                f"{folder} is in use by {holder}: wait until it ends, or end it; if its node is "
                f"lost, remove {path}"
            )
        if not is_told and waited >= quiet_seconds:
            log.warning(
                "%s is in use by %s: waiting up to %g s for it to end",
                folder,
                holder,
                patience_seconds,
            )
            is_told = True
        time.sleep(0.5)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    _held[path] = file


@contextlib.contextmanager
def holding(folder: Path, name: str, patience_seconds: float = PATIENCE_SECONDS) -> Iterator[None]:
    """hold(), for as long as the context is open. A lock that this process already holds is kept.

    Ranks that work together meet here, so that a short wait is not logged. Raises UserError as
    hold() does.
    """
    path = folder.resolve() / name
    is_new = path not in _held
    hold(folder, name, patience_seconds, quiet_seconds=QUIET_SECONDS)
    try:
        yield
    finally:
        if is_new:
            _held.pop(path).close()


def is_free(folder: Path) -> bool:
    """Whether no process holds the folder now."""
    path = folder / ".lock"
    if not path.exists():
        return True
    with path.open("a+", encoding="utf-8") as file:
        return _try(file)


def _holder(file: IO[str]) -> str:
    """Who has the lock, by what it wrote; a moment passes between its lock and its name."""
    for _ in range(20):
        file.seek(0)
        if name := file.read().strip():
            return name
        time.sleep(0.05)
    return "another process"


def _try(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        log.warning(
            "%s: this file system has no locks (%s): do not start a second run in this folder",
            file.name,
            error,
        )
    return True
