"""Two ranks that were started differently say so, before there is a process group in which they
could wait.
"""

import os
import socket
import subprocess

import pytest
from forked import Forked
from tiny import free_port

pytestmark = pytest.mark.dist


def start(*ranks: tuple[dict[str, str], list[str]]) -> list[subprocess.CompletedProcess[str]]:
    """Start one process per rank, each with its own environment and arguments, and wait for all."""
    common = {"WORLD_SIZE": str(len(ranks)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    worker = ["tests/distributed/agreement_worker.py", "tiny_trunc50"]
    processes = [
        Forked(
            [*worker, *arguments],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank), **environment},
        )
        for rank, (environment, arguments) in enumerate(ranks)
    ]
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
    return [
        subprocess.CompletedProcess(process.args, process.returncode, *output)
        for process, output in zip(processes, outputs, strict=True)
    ]


def test_ranks_that_agree_go_on():
    same = ({"NVIDIA_TF32_OVERRIDE": "0"}, ["training.max_steps=7"])
    for rank, done in enumerate(start(same, same)):
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"rank {rank} goes on\n"


@pytest.fixture(scope="module")
def disagreeing() -> list[subprocess.CompletedProcess[str]]:
    return start(
        ({"KD_COMMIT": "1234567", "DS_ACCELERATOR": "cpu"}, ["training.max_steps=7"]),
        (
            {"KD_COMMIT": "7654321", "DS_ACCELERATOR": "cuda"},
            ["training.max_steps=8", "deepspeed.student=zero3_bf16.json"],
        ),
        ({"KD_COMMIT": "7654321", "DS_ACCELERATOR": "cpu"}, ["training.max_steps=7"]),
    )


@pytest.mark.parametrize("rank", range(3))
def test_every_rank_ends_with_the_rank_and_host_that_differs_each_fact_and_its_remedy(
    disagreeing, rank
):
    done, host = disagreeing[rank], socket.gethostname()
    assert done.returncode == 2, done.stderr
    assert f"rank 1 on {host} (and 1 more) differs from rank 0 on {host}:" in done.stderr
    for fact in (
        "commit = '1234567' on rank 0, '7654321' there",
        "DS_ACCELERATOR = 'cpu' on rank 0, 'cuda' there",
        # another backend: a process group would wait for ever
        "device = 'cpu' on rank 0, 'cuda' there",
        "training.max_steps = 7 on rank 0, 8 there",
        "student's DeepSpeed JSON = {",
    ):
        assert fact in done.stderr
    for remedy in (
        "install the same versions",
        "write the variable into launch/nodes.env",
        "start every host with the same command",
    ):
        assert done.stderr.count(remedy) == 1
    assert done.stdout == ""


def test_what_is_alike_is_not_listed(disagreeing):
    assert "transformers" not in disagreeing[0].stderr
    assert "learning_rate" not in disagreeing[0].stderr
