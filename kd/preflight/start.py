"""From one command to a rank on every GPU: the deepspeed launcher, on this machine or on the hosts
of a hostfile.
"""

import os
import re
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from kd.cluster.hostfile import check_address, read_hostfile
from kd.cluster.local import LAUNCHER, local_launch
from kd.distributed.ports import port_of_run
from kd.preflight.verdict import Check, fail, ok
from kd.recipe import ROOT, Recipe

SCRIPT = ROOT / "launch" / "preflight.py"
NODES_ENV = ROOT / "launch" / "nodes.env"
SSH = ["ssh", "-oBatchMode=yes", "-oConnectTimeout=10"]


def start_here(recipe: Recipe, arguments: list[str]) -> int:
    """Run preflight on this machine's GPUs, or on its CPU; returns the launcher's status."""
    command, environment = local_launch(recipe, SCRIPT)
    return subprocess.call([*command, *arguments], env=environment)


def start_on_hosts(recipe: Recipe, hostfile: Path, arguments: list[str]) -> int:
    """Run preflight on all hosts of a hostfile, over pdsh and ssh; returns a status.

    MASTER_ADDR (the first host) and MASTER_PORT (the run's own) are taken from the environment, and
    the hosts' own variables from launch/nodes.env, or the file that DS_ENV_FILE names. Raises
    UserError for a hostfile that is none.
    """
    hosts = read_hostfile(hostfile)
    check_address(os.environ.get("MASTER_ADDR", hosts[0]), "MASTER_ADDR")
    with ThreadPoolExecutor(max_workers=32) as pool:
        checks = list(pool.map(check_ssh, hosts))
    for check in checks:
        print(check, flush=True)
    if any(check.status == "FAIL" for check in checks):
        return 1
    environment = {"DS_ENV_FILE": str(NODES_ENV), **os.environ, "PDSH_RCMD_TYPE": "ssh"}
    environment["PDSH_SSH_ARGS_APPEND"] = (
        f"-oBatchMode=yes {os.environ.get('PDSH_SSH_ARGS_APPEND', '')}"
    )
    # force_multi: a hostfile of one host means that host, not this one.
    how = ["--hostfile", str(hostfile), "--force_multi", "--no_ssh_check"]
    how += ["--master_addr", os.environ.get("MASTER_ADDR", hosts[0])]
    how += ["--master_port", os.environ.get("MASTER_PORT") or str(port_of_run(recipe.run_dir))]
    command = [*LAUNCHER, *how, str(SCRIPT), *map(_through_pdsh, arguments)]
    return subprocess.call(command, env=environment, stdin=subprocess.DEVNULL)


def check_ssh(host: str) -> Check:
    """Whether this machine reaches a host without a password, and the checkout is there."""
    name, started = f"ssh {host}", time.perf_counter()
    test = f"test -x {shlex.quote(sys.executable)} && test -f {shlex.quote(str(SCRIPT))}"
    done = subprocess.run(
        [*SSH, host, test], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if done.returncode == 0:
        return ok(
            name,
            f"{time.perf_counter() - started:.2f} s, no password; environment and checkout found",
        )
    if done.returncode != 255:
        return fail(
            name,
            f"{sys.executable} or {SCRIPT} is missing: every host needs both at the same path as "
            "here",
        )
    said = (done.stderr.strip().splitlines() or ["no message"])[-1]
    return fail(
        name,
        f"{said}: make `ssh {host}` work without a prompt (check name, key, known_hosts and sshd)",
    )


def _through_pdsh(argument: str) -> str:
    """As DeepSpeed must get it: it puts an argument with a space between double quotes."""
    text = argument.replace("%", "%%")
    return re.sub(r"([\\$`])", r"\\\1", text) if " " in text else shlex.quote(text)
