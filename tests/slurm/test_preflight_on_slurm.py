"""launch/preflight.py as a step of a job: srun starts its ranks."""

import sys
from pathlib import Path

import pytest
from slurm_cluster import Cluster
from tiny import ROOT, free_port, write_tiny_recipe

pytestmark = pytest.mark.slurm
STEP = [
    "srun",
    "--nodes=2",
    "--ntasks-per-node=1",
    sys.executable,
    str(ROOT / "launch" / "preflight.py"),
]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_recipe(tmp_path_factory.mktemp("preflight"), num_rows=30)


def test_a_rank_on_each_node_meets_the_other(cluster: Cluster, recipe: Path):
    master = ["MASTER_ADDR=127.0.0.1", f"MASTER_PORT={free_port()}"]
    done = cluster.run("env", *master, *STEP, "--recipe", str(recipe))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FAIL" not in done.stdout
    assert "2 ranks on 2 hosts" in done.stdout
    assert "bandwidth of all" in done.stdout


def test_a_step_without_a_master_is_told_what_to_set(cluster: Cluster, recipe: Path):
    done = cluster.run("env", "--unset=MASTER_ADDR", *STEP, "--recipe", str(recipe))
    assert done.returncode == 1
    assert "MASTER_ADDR is not set: export it before srun" in done.stdout
