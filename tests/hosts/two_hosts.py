"""Two hosts on one machine: each a set of Linux namespaces with its own hostname, network,
processes, /run and sshd.

They share the disk, as nodes of a cluster share a file system, and one cable. Nothing outside is
touched: no file in /etc or ~/.ssh, no named namespace. A host ends with its first process, and
everything in it with the host.
"""

import functools
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tiny import wait_until

ADDRESSES = {"alpha": "10.77.0.1", "beta": "10.77.0.2"}
NAMESPACES = (
    "--net",
    "--uts",
    "--ipc",
    "--pid",
    "--fork",
    "--kill-child",
    "--mount",
    "--mount-proc",
)
PACKAGES = {"pdsh": "pdsh", "sshd": "openssh-server", "ip": "iproute2"}

# What the hosts are to get, and get by the file alone; a value with spaces for one.
VARIABLES = {
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "KD_COMMIT": "a commit of the tests",
}


class Host:
    """A running host. Start programs on it with `enter`, cut its cable with `set_link`."""

    def __init__(self, name: str, folder: Path):
        self.name, self.folder = name, folder
        sshd = f"""\
mount --bind '{folder}/hosts' /etc/hosts
mount -t tmpfs tmpfs /run
mkdir /run/sshd
hostname {name}
exec {shutil.which("sshd")} -D -f '{folder}/sshd_config' -E '{folder}/sshd_{name}.log'
"""
        self._unshare = subprocess.Popen(["unshare", *NAMESPACES, "sh", "-ec", sshd])
        self.pid = child_of(self._unshare)
        log = folder / f"sshd_{name}.log"
        wait_until(
            lambda: log.exists() and "Server listening" in log.read_text(),
            f"sshd of {name} listens",
        )

    def enter(self, *command: str) -> list[str]:
        """The command, as it is called on this host."""
        return [
            "nsenter",
            f"--target={self.pid}",
            f"--wd={os.getcwd()}",
            "--net",
            "--uts",
            "--ipc",
            "--pid",
            "--mount",
            *command,
        ]

    def start(self, *command: str, **options: Any) -> subprocess.Popen:
        """Start a command here; `child_of` has the process id of the command itself, which signals
        are for.
        """
        return subprocess.Popen(self.enter(*command), **options)

    def run(self, *command: str) -> str:
        return subprocess.run(
            self.enter(*command), check=True, capture_output=True, text=True
        ).stdout

    def set_link(self, state: str) -> None:
        """Plug the cable in ("up") or pull it ("down")."""
        self.run("ip", "link", "set", "eth0", state)

    def processes(self, pattern: str) -> list[str]:
        """Process ids and command lines on this host that match, zombies left out."""
        lines = self.run("ps", "-ww", "-eo", "pid=,stat=,args=").splitlines()
        return [line for line in lines if pattern in line and line.split()[1][0] != "Z"]

    def stop(self) -> None:
        # --kill-child: its first process goes, and with it all others of its namespace
        self._unshare.kill()
        self._unshare.wait()


@contextmanager
def two_hosts(folder: Path) -> Iterator[dict[str, Host]]:
    """alpha and beta, connected; each reaches the other by folder/bin/ssh, for PATH to begin
    with.
    """
    _write_ssh_files(folder)
    with ExitStack() as stack:
        hosts = {}
        for name in ADDRESSES:
            hosts[name] = Host(name, folder)
            stack.callback(hosts[name].stop)
        alpha, beta = hosts.values()
        ends = f"ip link add eth0 netns {alpha.pid} type veth peer name eth0 netns {beta.pid}"
        subprocess.run(ends.split(), check=True)
        for name, host in hosts.items():
            host.run("ip", "link", "set", "lo", "up")
            host.run("ip", "address", "add", f"{ADDRESSES[name]}/24", "dev", "eth0")
            host.set_link("up")
        yield hosts


@functools.cache
def why_not() -> str | None:
    """What stands in the way of two hosts on this machine, in one line; None when nothing does."""
    missing = [package for program, package in PACKAGES.items() if shutil.which(program) is None]
    if missing:
        return (
            f"two hosts need packages: apt-get install --no-install-recommends {' '.join(missing)}"
        )
    allowed = subprocess.run(
        ["unshare", *NAMESPACES, "true"], capture_output=True, text=True, check=False
    )
    if os.geteuid() != 0 or allowed.returncode != 0:
        why = allowed.stderr.strip() or "not root"
        return f"two hosts need root and the right to make namespaces: {why}"
    return None


def child_of(process: subprocess.Popen) -> int:
    """The process id of what unshare or nsenter has started."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return int(wait_until(children.read_text, f"{process.args[0]} starts a process").split()[0])


def _write_ssh_files(folder: Path) -> None:
    for key in ("host_key", "user_key"):
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)], check=True
        )
    (folder / "hosts").write_text(
        "127.0.0.1 localhost\n"
        + "".join(f"{address} {name}\n" for name, address in ADDRESSES.items())
    )
    (folder / "sshd_config").write_text(f"""\
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/user_key.pub
StrictModes no
UsePAM no
PermitRootLogin yes
""")
    (folder / "ssh_config").write_text(f"""\
IdentityFile {folder}/user_key
IdentitiesOnly yes
StrictHostKeyChecking no
UserKnownHostsFile /dev/null
LogLevel ERROR
""")
    (folder / "bin").mkdir()
    wrapper = folder / "bin" / "ssh"
    wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/ssh_config "$@"\n')
    wrapper.chmod(0o755)
