"""Two hosts for a module of tests, with a hostfile and the variables for them."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny import ROOT
from two_hosts import VARIABLES, Host, two_hosts, why_not


def pytest_runtest_setup() -> None:
    if reason := why_not():
        pytest.skip(reason)  # here and not in a fixture: one line for all


@pytest.fixture(scope="module")
def hosts(tmp_path_factory) -> Iterator[dict[str, Host]]:
    with two_hosts(tmp_path_factory.mktemp("hosts")) as hosts:
        yield hosts


@pytest.fixture(scope="module")
def hostfile(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("hostfile") / "hosts"
    file.write_text("# rank 0 first\nalpha slots=1\nbeta slots=1\n")
    return file


@pytest.fixture(scope="module")
def environment(hosts, tmp_path_factory) -> dict[str, str]:
    """Of whoever starts a run: without the variables that the hosts are to get, with the file that
    has them.
    """
    file = tmp_path_factory.mktemp("environment") / "nodes.env"
    file.write_text("".join(f"{name}={value}\n" for name, value in VARIABLES.items()))
    path = os.pathsep.join(
        [str(hosts["alpha"].folder / "bin"), str(ROOT / ".venv/bin"), os.environ["PATH"]]
    )
    own = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    return {
        **own,
        "PATH": path,
        "DS_ENV_FILE": str(file),
        "PDSH_SSH_ARGS_APPEND": "-oServerAliveInterval=3",
    }
