"""The other ranks of a run: who has gone when a collective fails."""

import contextlib
import os
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

from kd.distributed.process_group import gather_objects
from kd.errors import LostPeer

# How gloo words it when a process of its group has gone, or does not answer; NCCL's errors have a
# class.
GLOO_SIGNS = (
    "gloo/",
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Timed out waiting",
)


class Peer(NamedTuple):
    rank: int
    host: str
    pid: int


def gather_peers() -> list[Peer]:
    """Every rank's host and process. Collective: every rank must call this."""
    return gather_objects(Peer(dist.get_rank(), socket.gethostname(), os.getpid()))


@contextlib.contextmanager
def watching(peers: list[Peer]) -> Iterator[None]:
    """Inside, a collective that fails because of another rank raises LostPeer, which names it when
    it was here.
    """
    try:
        yield
    except RuntimeError as error:
        if not _is_collectives(error):
            raise
        time.sleep(0.5)  # a process closes its connections before it is seen to have ended
        raise LostPeer(_describe(peers, str(error))) from error


def _is_collectives(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or any(sign in str(error) for sign in GLOO_SIGNS)


def _describe(peers: list[Peer], message: str) -> str:
    host = socket.gethostname()
    gone = [peer for peer in peers if peer.host == host and not _is_running(peer.pid)]
    if gone:
        who = (
            " and ".join(f"rank {peer.rank} (process {peer.pid} on this host)" for peer in gone)
            + " ended"
        )
    elif "imed out" in message:
        who = "another rank does not answer (run.collective_timeout_minutes)"
    else:
        hosts = sorted({peer.host for peer in peers} - {host})
        who = (
            f"a rank on another host ended, or its network failed ({', '.join(hosts)})"
            if hosts
            else "a rank ended"
        )
    # No paths of gloo
    reason = re.sub(r"\[/\S*\] ?", "", message.strip().partition("\n")[0]).partition(". This is")[0]
    return (
        f"{who}. Look for its message above. If there is none, it was killed (out of memory?) or "
        f"its node was lost. Continue with --resume auto. [{reason}]"
    )


def _is_running(pid: int) -> bool:
    """Neither gone nor a zombie that its launcher has not reaped yet."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"
