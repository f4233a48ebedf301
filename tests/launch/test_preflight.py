"""launch/preflight.py: one line per check, each figure or remedy in it, and a status that is not 0
when one fails.
"""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import forked
import pytest
from forked import Forked, with_launcher
from tiny import ROOT, disk_of_its_own, free_port, write_tiny_recipe

from kd.cluster.hostfile import read_hostfile
from kd.errors import UserError
from kd.preflight.start import check_ssh

PREFLIGHT = "launch/preflight.py"
CHECKS = [
    "port",
    "same everywhere",
    "models and data",
    "attention",
    "GPU memory",
    "host memory",
    "process group",
    "shared folder",
    "free space",
    "write speed",
    "bandwidth in a node",
]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    return write_tiny_recipe(tmp_path_factory.mktemp("preflight"), num_rows=30)


@pytest.fixture
def small_disk(tmp_path):
    """Too small for four checkpoints."""
    with disk_of_its_own(tmp_path / "disk", "256k") as folder:
        yield folder


def preflight(
    recipe: Path, *arguments: str, has_real_launcher: bool = False
) -> subprocess.CompletedProcess[str]:
    """As a user calls it: it starts the ranks itself."""
    command = [PREFLIGHT, "--recipe", str(recipe), *arguments]
    env = {**os.environ, "MASTER_PORT": free_port()}
    if not has_real_launcher:
        return forked.run(with_launcher(*command), env=env, nested=True)
    command = [sys.executable, *command]
    return subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False
    )


def start_rank(
    recipe: Path, rank: int, port: str, *arguments: str, wrapper: tuple = (), **environment: str
):
    """One rank of two, as a launcher starts it."""
    variables = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **environment}
    command, env = [PREFLIGHT, "--recipe", str(recipe), *arguments], {**os.environ, **variables}
    if not wrapper:
        return Forked(command, env=env)
    pipe = subprocess.PIPE
    command = [*wrapper, sys.executable, *command]
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=pipe, stderr=pipe, text=True)


def statuses(output: str) -> dict[str, str]:
    """{check: status} of the lines printed."""
    found = re.findall(r"^(ok|FAIL|skipped) +(\S.*?)  ", output, flags=re.MULTILINE)
    return {name: status for status, name in found}


def line_of(output: str, check: str) -> str:
    (line,) = [line for line in output.splitlines() if line[8:].startswith(check)]
    return line


@pytest.mark.dist
def test_what_is_well_is_one_line_each_and_leaves_nothing_behind(recipe):
    done = preflight(recipe, has_real_launcher=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    found = statuses(done.stdout)
    assert list(found) == CHECKS, done.stdout
    assert found.pop("GPU memory") == "skipped"
    assert set(found.values()) == {"ok"}
    assert re.search(r"teacher sdpa, student sdpa", line_of(done.stdout, "attention"))
    assert re.search(r"all_gather [\d.]+ GB/s \(2 ranks", line_of(done.stdout, "bandwidth"))
    assert list((recipe.parent / "runs").iterdir()) == []


@pytest.mark.dist
@pytest.mark.fault
def test_each_thing_that_is_wrong_is_a_line_with_its_remedy(recipe, small_disk):
    done = preflight(
        recipe,
        "--min-bandwidth",
        "1e9",
        "--set",
        f"run.output_dir={small_disk}",
        "--set",
        "data.path=gone.jsonl",
    )
    assert done.returncode == 1
    found = statuses(done.stdout)
    assert [name for name, status in found.items() if status == "FAIL"] == [
        "models and data",
        "free space",
        "bandwidth in a node",
    ]
    assert "data.path = 'gone.jsonl': no such file" in line_of(done.stdout, "models and data")
    assert "free some space, or lower training.keep_last" in line_of(done.stdout, "free space")
    assert "less than --min-bandwidth" in line_of(done.stdout, "bandwidth")
    assert "Traceback" not in done.stderr


@pytest.mark.dist
@pytest.mark.fault
def test_checkpoints_that_are_there_need_no_room_again(recipe, tmp_path):
    """Some 500 KiB are needed: 424 of 1024 are free, and the other 600 are at first not its own."""
    with disk_of_its_own(tmp_path / "disk", "1m") as folder:
        arguments = ("--set", f"run.output_dir={folder}", "--set", "run.name=continued")
        assert statuses(preflight(recipe, *arguments).stdout)["free space"] == "ok"
        other = folder / "other"
        other.write_bytes(bytes(600 * 1024))
        assert statuses(preflight(recipe, *arguments).stdout)["free space"] == "FAIL"
        checkpoint = folder / "continued" / "checkpoints" / "step_4"
        checkpoint.mkdir(parents=True)
        other.rename(checkpoint / "states.pt")
        line = line_of(preflight(recipe, *arguments).stdout, "free space")
        assert line.startswith("ok")
        assert "minus 0.59 MiB written already" in line


@pytest.mark.dist
@pytest.mark.fault
def test_a_folder_that_is_not_shared_and_a_variable_that_did_not_arrive_are_found(recipe):
    """Rank 1 has a disk of its own at the place of run.output_dir, as a host without the mount
    has.
    """
    folder, port = recipe.parent / "runs", free_port()
    folder.mkdir(exist_ok=True)
    own_disk = (
        "unshare",
        "--mount",
        "sh",
        "-ec",
        'mount -t tmpfs none "$0"; exec "$@"',
        str(folder),
    )
    ranks = [
        start_rank(recipe, 0, port),
        start_rank(recipe, 1, port, wrapper=own_disk, NVIDIA_TF32_OVERRIDE="0"),
    ]
    (output, errors), _ = (rank.communicate(timeout=200) for rank in ranks)
    assert [rank.returncode for rank in ranks] == [1, 1], errors[-3000:]
    found = statuses(output)
    assert [name for name, status in found.items() if status == "FAIL"] == [
        "same everywhere",
        "shared folder",
    ]
    assert "NVIDIA_TF32_OVERRIDE = None on rank 0, '0' there" in line_of(output, "same everywhere")
    assert "1 of 2 ranks do not see the files of rank 0" in line_of(output, "shared folder")


@pytest.mark.dist
def test_a_rank_that_does_not_come_is_a_line_and_no_hang(recipe):
    rank = start_rank(recipe, 0, free_port(), "--timeout", "3")
    output, errors = rank.communicate(timeout=100)
    assert rank.returncode == 1, errors[-3000:]
    assert statuses(output) == {"port": "ok", "rendezvous": "FAIL"}
    assert "rank 1 of 2 has not started" in line_of(output, "rendezvous")
    assert "check that it started" in line_of(output, "rendezvous")


@pytest.mark.dist
def test_a_master_that_is_not_there_is_a_line_of_the_rank_that_looked_for_it(recipe):
    rank = start_rank(recipe, 1, free_port(), "--timeout", "3")
    output, errors = rank.communicate(timeout=100)
    assert rank.returncode == 1, errors[-3000:]
    assert statuses(output) == {"rendezvous": "FAIL"}
    assert "rank 1: rank 0 does not answer at 127.0.0.1:" in line_of(output, "rendezvous")


@pytest.mark.dist
def test_a_port_in_use_is_named(recipe):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        rank = start_rank(recipe, 0, str(other.getsockname()[1]))
        output, errors = rank.communicate(timeout=100)
    assert rank.returncode == 1, errors[-3000:]
    assert "is in use on" in line_of(output, "port")


@pytest.mark.process
def test_a_single_micro_batch_is_looked_at_on_one_rank(recipe):
    done = preflight(recipe, "--set", "training.global_batch_size=2")
    assert done.returncode == 0, done.stdout
    assert "a single rank" in line_of(done.stdout, "bandwidth")


@pytest.mark.process
def test_a_host_that_ssh_does_not_reach_ends_it_before_anything_is_started(recipe, tmp_path):
    hostfile = tmp_path / "hosts"
    hostfile.write_text("# two of them\n127.77.77.77 slots=1\n127.77.77.78 slots=1\n")
    assert read_hostfile(hostfile) == ["127.77.77.77", "127.77.77.78"]
    done = preflight(recipe, "--hostfile", str(hostfile))
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    for line, host in zip(lines, read_hostfile(hostfile), strict=True):
        assert line.startswith(f"FAIL    ssh {host}")
        assert "work without a prompt" in line
    assert check_ssh("127.77.77.77").status == "FAIL"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("node-1 slots=eight\n", "line 1: 'node-1 slots=eight': write NAME slots=N"),
        ("node-1\n", "line 1: 'node-1': write NAME slots=N"),
        ("# nothing\n", "names no host"),
        ("a slots=0\n", "line 1: 'a slots=0': write NAME slots=N"),
        ("a slots = 1\n", "line 1: 'a slots = 1': write NAME slots=N"),
        ("a slots=1 slots=2\n", "line 1: 'a slots=1 slots=2': write NAME slots=N"),
        ("a slots=1\r\n\nb slots=1\na slots=2", "line 4: 'a slots=2': a is on line 1 already"),
        ("root@10.0.0.1 slots=1\n", "line 1: 'root@10.0.0.1 slots=1': ranks look up the host name"),
        ("-oProxyCommand=x slots=1\n", "is not a host name or address"),
        ("$(reboot) slots=1\n", "is not a host name or address"),
        ("localhost slots=1\n127.0.0.1 slots=1\n", "localhost and 127.0.0.1 are the same host"),
    ],
)
def test_a_hostfile_that_is_none_is_an_error(tmp_path, text, message):
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(UserError, match=re.escape(message)):
        read_hostfile(tmp_path / "hosts")
