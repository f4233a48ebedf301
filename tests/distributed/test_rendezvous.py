"""Where ranks meet, before there is a process group: what they listen on, wait for and say."""

import os
import re
import signal
import socket
import subprocess
import time
from datetime import timedelta
from pathlib import Path

import pytest
from forked import Forked
from tiny import free_port, wait_until

from kd.distributed import process_group
from kd.distributed.process_group import find_rank, find_ranks
from kd.distributed.rendezvous import wait_for
from kd.errors import NotMet, UserError

WORKER = ["tests/distributed/agreement_worker.py", "tiny_trunc50"]


def start(rank: int, port: str, *, world_size: int = 2, **environment: str) -> Forked:
    ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return Forked(WORKER, env={**os.environ, **ranks, **meeting, **environment})


def ends(process: Forked) -> subprocess.CompletedProcess[str]:
    output = process.communicate(timeout=60)
    return subprocess.CompletedProcess(process.args, process.returncode, *output)


def listens_on(port: str) -> set[str]:
    """Addresses, in the form of /proc/net/tcp."""
    return {
        line.split()[1].partition(":")[0]
        for table in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]
        if line.split()[3] == "0A" and int(line.split()[1].rpartition(":")[2], 16) == int(port)
    }


@pytest.mark.dist
def test_the_store_listens_on_the_interface_of_the_run_alone_and_says_who_is_missing() -> None:
    port = free_port()
    first = start(0, port, world_size=3)
    last = start(2, port, world_size=3)
    assert wait_until(lambda: listens_on(port), "rank 0 listens", 30) == {"0100007F"}
    time.sleep(7)
    first.send_signal(signal.SIGTERM)  # has its effect while rank 1 is waited for
    done = ends(first)
    assert done.returncode == -signal.SIGTERM
    host = re.escape(socket.gethostname())
    assert re.search(rf"rank 1 of 3 has not started \({host}: 0, 2 are here\)", done.stderr)
    assert ends(last).returncode == 1


@pytest.mark.dist
def test_a_port_in_use_is_named_with_who_has_it() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        done = ends(start(0, str(other.getsockname()[1])))
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if "cannot listen" in line]
    assert f"process {os.getpid()} (" in line
    assert "set MASTER_PORT to a port that is free" in line


@pytest.mark.dist
@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"MASTER_ADDR": "root@127.0.0.1"}, "MASTER_ADDR = 'root@127.0.0.1' is not a name or"),
        ({"MASTER_ADDR": "192.0.2.1"}, "192.0.2.1 is not an address of "),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT = '99999': write a port"),
    ],
    ids=str,
)
def test_what_cannot_be_met_at_is_one_message_at_once(
    variables: dict[str, str], message: str
) -> None:
    done = ends(start(0, free_port(), **variables))
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_wait_says_what_it_waits_for_and_ends(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(NotMet, match="rank 7, after 0 s"):
        wait_for(lambda: False, lambda: "rank 7", timedelta(seconds=0.3))
    wait_for(lambda: True, lambda: "never said", timedelta(0))
    assert caplog.text == ""  # a word after some seconds only


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    known = (*process_group.OF_SLURM, *process_group.WORLD_SIZES, *process_group.LOCAL_RANKS)
    for name in known:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    return monkeypatch


@pytest.mark.parametrize(
    ("given", "local_rank"),
    [
        ({"RANK": "1", "WORLD_SIZE": "4", "SLURM_LOCALID": "1"}, "1"),
        ({"RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}, "1"),
        ({"RANK": "0", "WORLD_SIZE": "1"}, "0"),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "SLURM_LOCALID": "1"}, "0"),
    ],
    ids=str,
)
def test_a_local_rank_that_the_launcher_leaves_out_is_taken_from_what_it_says(
    variables: pytest.MonkeyPatch, given: dict[str, str], local_rank: str
) -> None:
    for name, value in given.items():
        variables.setenv(name, value)
    find_ranks()
    assert os.environ["LOCAL_RANK"] == local_rank


def test_ranks_that_never_meet_need_no_address(variables: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        variables.delenv(name)
    for name, value in {"PROCID": "5", "STEP_NUM_TASKS": "8", "LOCALID": "1"}.items():
        variables.setenv(f"SLURM_{name}", value)
    assert find_rank() == (5, 8, 1)
    with pytest.raises(UserError, match="MASTER_ADDR is not set"):
        find_ranks()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"RANK": "1", "WORLD_SIZE": "4"}, "RANK = 1 is set but LOCAL_RANK is not"),
        ({"RANK": "1", "LOCAL_RANK": "1"}, "RANK = 1 is set but WORLD_SIZE is not"),
        ({"RANK": "one", "WORLD_SIZE": "4", "LOCAL_RANK": "0"}, "RANK = 'one'"),
        ({"RANK": "4", "WORLD_SIZE": "4", "LOCAL_RANK": "0"}, "from 0 to WORLD_SIZE - 1"),
    ],
    ids=str,
)
def test_ranks_that_cannot_be_known_are_one_message(
    variables: pytest.MonkeyPatch, given: dict[str, str], message: str
) -> None:
    for name, value in given.items():
        variables.setenv(name, value)
    with pytest.raises(UserError, match=message):
        find_ranks()
