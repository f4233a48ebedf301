"""Read and check the hosts of a hostfile, before anything connects to them.

`python -m kd.cluster.hostfile FILE [--master-addr NAME]` prints their names, a line each, for
launch/hosts.sh.
"""

import argparse
import re
import socket
from pathlib import Path

from kd.cli import run
from kd.errors import UserError
from kd.files import read_text

REMEDY = "write NAME slots=N, as in launch/hostfile.example"
_LINE = re.compile(r"(?P<name>\S+)\s+slots=(?P<slots>[1-9][0-9]{0,3})")
_NAME = re.compile(r"[A-Za-z0-9_.:-]+")


def read_hostfile(path: Path) -> list[str]:
    """The names of its hosts, rank 0's first.

    Raises UserError that names the file and the line: for a line that is not `NAME slots=N`, a
    name with a user, and a host that is listed twice, by the same name or the same address.
    """
    if not path.is_file():
        raise UserError(f"--hostfile {path}: no such file; see launch/hostfile.example")
    lines: dict[str, int] = {}  # name -> its line
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        where = f"--hostfile {path}, line {number}: {line!r}"
        found = _LINE.fullmatch(text)
        if not found:
            raise UserError(f"{where}: {REMEDY}")
        name = found["name"]
        if "@" in name:
            raise UserError(
                f"{where}: ranks look up the host name, and only ssh takes a user: write "
                f"{name.rpartition('@')[2]} here, and the user into ~/.ssh/config (Host, User)"
            )
        if not _NAME.fullmatch(name) or name.startswith("-"):
            raise UserError(f"{where}: {name!r} is not a host name or address: {REMEDY}")
        if name in lines:
            raise UserError(
                f"{where}: {name} is on line {lines[name]} already: list each host once"
            )
        lines[name] = number
    if not lines:
        raise UserError(f"--hostfile {path} names no host; see launch/hostfile.example")
    _check_addresses(path, list(lines))
    return list(lines)


def check_address(name: str, field: str) -> None:
    """Raise UserError for a name that this machine cannot resolve."""
    if not _addresses(name):
        raise UserError(
            f"{field} = {name!r} is not a name or address that this machine knows: set "
            "MASTER_ADDR to one by which all hosts reach the first, or add it to /etc/hosts"
        )


def _check_addresses(path: Path, names: list[str]) -> None:
    """A name that only ssh knows, from its configuration, has no address and is let pass."""
    owner: dict[str, str] = {}
    for name in names:
        for address in _addresses(name):
            other = owner.setdefault(address, name)
            if other != name:
                raise UserError(
                    f"--hostfile {path}: {other} and {name} are the same host ({address}): list "
                    "it once, with all of its slots"
                )


def _addresses(name: str) -> set[str]:
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return set()
    return {str(entry[4][0]) for entry in found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("hostfile", type=Path)
    parser.add_argument("--master-addr", help="check that this machine knows it")
    arguments = parser.parse_args()
    hosts = read_hostfile(arguments.hostfile)
    if arguments.master_addr is not None:
        check_address(arguments.master_addr, "MASTER_ADDR")
    print(*hosts, sep="\n")


if __name__ == "__main__":
    run(main)
