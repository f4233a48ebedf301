"""Where a run's ranks meet, before there is a process group: a key-value store that rank 0 serves.

Rank 0 listens on the run's own interface, the one of MASTER_ADDR, and not on all of them as torch
does. Nothing here waits inside of torch: signals have their effect, and after a few seconds a rank
says what it waits for. The process group takes the same store.
"""

import errno
import functools
import logging
import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

from torch.distributed import Store, TCPStore
from torch.distributed.rendezvous import rendezvous

from kd.errors import NotMet, UserError

log = logging.getLogger(__name__)

POLL_SECONDS, WORD_SECONDS = 0.2, 5.0
REMEDY = (
    "check that it started (the first lines of its own host's log) and that hosts can reach each "
    "other"
)


def wait_for(condition: Callable[[], bool], what: Callable[[], str], timeout: timedelta) -> None:
    """Poll until the condition holds. what(): what is waited for, said after a few seconds and
    then every minute. Raises NotMet when the time is over.
    """
    begun, next_word = time.monotonic(), WORD_SECONDS
    while not condition():
        waited = time.monotonic() - begun
        if waited > timeout.total_seconds():
            raise NotMet(f"{what()}, after {waited:.0f} s: {REMEDY}")
        if waited >= next_word:
            log.warning("waiting for %.0f s: %s", waited, what())
            next_word += 60.0
        time.sleep(POLL_SECONDS)


@functools.cache
def store_of_run(timeout: timedelta) -> tuple[Store, int, int]:
    """The store, this rank and how many there are; kept for the life of the process.

    RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set. Raises UserError for an address that
    does not resolve and a port that is in use, NotMet for a rank 0 that does not come.
    """
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun's agent serves it
        store, rank, world_size = next(rendezvous("env://", timeout=timeout))
    else:
        host, port = os.environ["MASTER_ADDR"], _port()
        address = _resolve(host)
        if rank == 0:
            store = _serve(host, address, port, world_size, timeout)
        else:
            wait_for(
                lambda: _answers(address, port),
                lambda: f"rank {rank}: rank 0 does not answer at {host}:{port}",
                timeout,
            )
            store = TCPStore(host, port, world_size, False, timeout, multi_tenant=True)
    store.set_timeout(timeout)
    return store, rank, world_size


def _port() -> int:
    text = os.environ["MASTER_PORT"]
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise UserError(f"MASTER_PORT = {text!r}: write a port, 1 to 65535, that is free on rank 0")
    return int(text)


def _resolve(host: str) -> str:
    """The address of a name. Raises UserError where it has none."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise UserError(
            f"MASTER_ADDR = {host!r} is not a name or address that this host knows ({error}): "
            "write that of the first host, without a user, in a form that all hosts can reach"
        ) from None
    return str(found[0][4][0])


def _serve(host: str, address: str, port: int, world_size: int, timeout: timedelta) -> Store:
    # A name that means the loopback here, as in Debian's /etc/hosts, is another thing elsewhere.
    is_loopback = address.startswith("127.") or address == "::1"
    is_name = host not in (address, "localhost")
    everywhere = is_loopback and is_name and not _is_one_host()
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("" if everywhere else address, port))
        listener.listen(max(world_size, 128))
    except OSError as error:
        listener.close()
        raise UserError(_cannot_listen(host, address, port, error)) from None
    if everywhere:
        log.warning(
            "MASTER_ADDR = %s is %s on this host: the store listens on all interfaces",
            host,
            address,
        )
    return TCPStore(
        host,
        port,
        world_size,
        True,
        timeout,
        wait_for_workers=False,
        multi_tenant=True,
        master_listen_fd=listener.detach(),
    )


def _is_one_host() -> bool:
    """As far as deepspeed, torchrun and srun say."""
    sizes = (os.environ.get(name) for name in ("CROSS_SIZE", "SLURM_STEP_NUM_NODES"))
    if any(size == "1" for size in sizes):
        return True
    return os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]


def _cannot_listen(host: str, address: str, port: int, error: OSError) -> str:
    where = f"rank 0 cannot listen on MASTER_ADDR = {host!r}, MASTER_PORT = {port}"
    if error.errno == errno.EADDRINUSE:
        process = next(_processes_on(port), None)
        who = f"process {process[0]} ({process[1]})" if process else "another process"
        return (
            f"{where}: {who} on {socket.gethostname()} uses the port, perhaps another run or its "
            "remains. End it, or set MASTER_PORT to a port that is free"
        )
    if error.errno == errno.EADDRNOTAVAIL:
        return (
            f"{where}: {address} is not an address of {socket.gethostname()}, where rank 0 runs; "
            "set MASTER_ADDR to one"
        )
    return f"{where}: {error}"


def _processes_on(port: int) -> Iterator[tuple[int, str]]:
    """(id, command) of those that listen on a port, as far as /proc shows them to this user."""
    sockets = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if int(fields[1].rpartition(":")[2], 16) == port and fields[3] == "0A":  # LISTEN
                sockets.add(f"socket:[{fields[9]}]")
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                if any(os.readlink(fd) in sockets for fd in (entry / "fd").iterdir()):
                    command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                    yield int(entry.name), re.sub(r"\s+", " ", command).strip()[:80]
            except OSError:  # gone, or another user's
                continue


def _answers(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), timeout=1.0).close()
    except OSError:
        return False
    return True
