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


def test_a_job_of_preflight_has_what_a_run_would_have(
    cluster: Cluster, recipe: Path, tmp_path: Path
):
    setup, variables = tmp_path / "setup", tmp_path / "nodes.env"
    setup.write_text("echo the setup was sourced\n")
    variables.write_text("OMP_NUM_THREADS=1\nDS_ACCELERATOR=cpu\nGLOO_SOCKET_IFNAME=nowhere0\n")
    cluster.environment["DS_ENV_FILE"] = str(variables)
    try:
        done = cluster.submit(str(recipe), "--preflight", f"--setup={setup}")
    finally:
        del cluster.environment["DS_ENV_FILE"]
    assert done.returncode == 0, done.stderr
    job = next(line.split()[1] for line in done.stdout.splitlines() if line.startswith("job "))
    cluster.wait_for_state(job, "FAILED", "COMPLETED")
    (log,) = (recipe.parent / "runs" / "tiny_test" / "slurm" / "1").glob("*.out")
    assert "the setup was sourced" in log.read_text()
    assert "FAIL" in log.read_text(), "an interface that there is not passes"


def test_a_step_without_a_master_is_told_what_to_set(cluster: Cluster, recipe: Path):
    done = cluster.run("env", "--unset=MASTER_ADDR", *STEP, "--recipe", str(recipe))
    assert done.returncode == 1
    assert "MASTER_ADDR is not set: before srun, export" in done.stdout
