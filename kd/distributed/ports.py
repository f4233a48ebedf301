"""The port at which a run's ranks meet."""

import socket
import zlib
from pathlib import Path


def port_of_run(run_dir: Path) -> int:
    """One run, one port: on hosts, a start finds what is left of the one before it.

    Below the ports that kernels give out.
    """
    return 20000 + zlib.crc32(bytes(run_dir.resolve())) % 10000


def free_port() -> int:
    """One that is free on this machine now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
