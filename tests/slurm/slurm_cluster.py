"""A SLURM of two nodes on this machine: munged, slurmctld and two slurmd, all in one folder, on
free ports.
"""

import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tiny import ROOT, free_ports, wait_until

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")

# The nodes' names are addresses of this machine, so that rank 0 is found by them without a line in
# /etc/hosts. Their cores need not exist, and their GPUs are terminals, which no task opens.
CONFIG = """\
ClusterName=kd
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
FirstJobId={first_job}
KillWait=30
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
GresTypes=gpu
NodeName=127.0.0.1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 Gres=gpu:2
NodeName=127.0.0.2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4 Gres=gpu:2
PartitionName=main Nodes=ALL Default=YES State=UP MaxTime=INFINITE
PartitionName=short Nodes=ALL State=UP MaxTime=5
PartitionName=closed Nodes=ALL State=DOWN MaxTime=INFINITE
"""


SECRETS = {name: f"secret-of-{name}" for name in ("HF_TOKEN", "WANDB_API_KEY", "DB_PASSWORD")}


class Cluster:
    """Commands as a user gives them on the login node."""

    def __init__(self, config: Path) -> None:
        self.environment = {**os.environ, "SLURM_CONF": str(config), **SECRETS}

    def run(self, *command: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            cwd=cwd,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def submit(self, *arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
        """launch/submit.py, for one rank on each of two nodes unless told otherwise."""
        gpus = any(argument.startswith("--gpus-per-node") for argument in arguments)
        size = () if gpus else ("--nodes=2", "--gpus-per-node=0", "--tasks-per-node=1")
        return self.run(
            sys.executable, str(ROOT / "launch" / "submit.py"), *size, *arguments, cwd=cwd
        )

    def job(self, job: str) -> dict[str, str]:
        """What SLURM knows of a job: JobState, Restarts, ExitCode and so on."""
        done = self.run("scontrol", "--oneliner", "show", "job", job)
        assert done.returncode == 0, done.stderr
        return dict(
            word.split("=", 1) for word in done.stdout.splitlines()[0].split() if "=" in word
        )

    def wait_for_state(self, job: str, *states: str, timeout: float = 150) -> None:
        wait_until(
            lambda: self.job(job)["JobState"] in states,
            f"{job} to be {' or '.join(states)}",
            timeout,
        )

    def start_now(self, job: str) -> None:
        """A requeued job would wait for two minutes, counted from when its last process is gone."""
        wait_until(
            lambda: self.job(job)["Reason"] == "BeginTime", f"{job} to be in the queue again", 60
        )
        # Slurmd has revoked the job's credentials, and for a second takes new ones for old
        time.sleep(2)
        done = self.run("scontrol", "update", f"JobId={job}", "StartTime=now")
        assert done.returncode == 0, done.stderr


@contextmanager
def running_cluster(folder: Path) -> Iterator[Cluster]:
    (folder / "state").mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    config = folder / "slurm.conf"
    # A run takes its port from its job: two clusters on one machine must not count alike.
    config.write_text(
        CONFIG.format(folder=folder, ports=free_ports(3), first_job=random.randrange(1, 50_000))
    )
    (folder / "gres.conf").write_text("Name=gpu File=/dev/tty[0-1]\n")
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    files = [f"--{name}-file={folder}/munged.{name}" for name in ("pid", "log", "seed")]
    daemons = [
        [
            "munged",
            "--foreground",
            "--force",
            f"--key-file={key}",
            f"--socket={folder}/munge.socket",
            *files,
        ]
    ]
    daemons += [["slurmctld", "-D", "-f", str(config)]]
    daemons += [["slurmd", "-D", "-N", f"127.0.0.{node}", "-f", str(config)] for node in (1, 2)]
    cluster, started = Cluster(config), []
    try:
        for index, command in enumerate(daemons):
            with (folder / f"{index}_{command[0]}.log").open("w") as log:
                started.append(
                    subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
                )
            if command[0] == "munged":
                wait_until((folder / "munge.socket").exists, "munged", 10)
        wait_until(
            lambda: "idle 2\n" in cluster.run("sinfo", "--noheader", "--format=%T %D").stdout,
            "both nodes",
            30,
        )
        yield cluster
    finally:
        try:
            cluster.run("scancel", "--user=root", "--state=PENDING")
            cluster.run("scancel", "--user=root", "--signal=KILL", "--full")
            wait_until(
                lambda: not cluster.run("squeue", "--noheader").stdout, "the queue to be empty", 60
            )
        finally:
            for process in reversed(started):
                process.terminate()
                process.wait(30)


def missing() -> str | None:
    """Why there can be no cluster here."""
    absent = [program for program in PROGRAMS if shutil.which(program) is None]
    if absent:
        return f"no {absent[0]}: apt-get install slurm-wlm slurm-wlm-basic-plugins munge"
    return None if os.geteuid() == 0 else "slurmd starts jobs as root alone"
