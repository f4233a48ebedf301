"""Whose end it was, when a collective fails."""

import os
import socket
import subprocess
import sys

import pytest

from kd.distributed.peers import Peer, watching
from kd.errors import LostPeer

CLOSED = (
    "[/build/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:1: Connection reset by peer. "
    "This is typically"
)
HOST = socket.gethostname()


def lose(peers: list[Peer], message: str) -> str:
    with pytest.raises(LostPeer) as lost, watching(peers):
        raise RuntimeError(message)
    return str(lost.value)


@pytest.mark.process
def test_a_process_that_has_ended_is_named_and_its_zombie_too() -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])  # not waited for: a zombie
    peers = [Peer(0, HOST, os.getpid()), Peer(1, HOST, ended.pid), Peer(2, "elsewhere", ended.pid)]
    try:
        os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
        message = lose(peers, CLOSED)
        assert message.startswith(f"rank 1 (process {ended.pid} on this host) ended.")
        assert message.endswith("[Read error [127.0.0.1]:1: Connection reset by peer]")
    finally:
        ended.wait()


def test_a_rank_of_another_host_cannot_be_seen_and_its_host_is_named() -> None:
    peers = [Peer(0, HOST, os.getpid()), Peer(1, "node7", 1)]
    assert lose(peers, CLOSED).startswith(
        "a rank on another host ended, or its network failed (node7)"
    )


def test_a_time_out_names_the_field_that_sets_it() -> None:
    message = lose(
        [Peer(0, HOST, os.getpid())], "Timed out waiting 1000ms for recv operation to complete"
    )
    assert message.startswith("another rank does not answer (run.collective_timeout_minutes)")


def test_an_error_of_this_rank_stays_what_it_is() -> None:
    with pytest.raises(RuntimeError, match="mat1 and mat2") as error, watching([]):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    assert not isinstance(error.value, LostPeer)
