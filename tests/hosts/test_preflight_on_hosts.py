"""launch/preflight.py on the hosts of a hostfile: by ssh first, then a rank on each."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import ROOT, write_tiny_recipe

pytestmark = pytest.mark.hosts
# What shells and pdsh might change on the way.
TEXT = 'it\'s 100% "$HOME" \\ `more` & <that>'


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    return write_tiny_recipe(tmp_path_factory.mktemp("recipe"), num_rows=30)


@pytest.fixture
def preflight(
    hosts, hostfile, environment, recipe
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """As a user calls it on the first host."""

    def run(*arguments: str):
        command = [sys.executable, str(ROOT / "launch" / "preflight.py"), "--recipe", str(recipe)]
        command = hosts["alpha"].enter(*command, "--hostfile", str(hostfile), *arguments)
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=300, check=False
        )

    return run


def test_all_checks_pass_on_two_hosts(preflight):
    done = preflight("--set", f"data.answer_close={TEXT}")
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "FAIL" not in done.stdout
    for expected in (
        "ssh alpha",
        "ssh beta",
        "2 ranks on 2 hosts",
        "gloo, over alpha",
        "bandwidth of all",
    ):
        assert expected in done.stdout
    assert "ok      shared folder" in done.stdout


def test_a_host_without_a_cable_is_named(preflight, hosts):
    hosts["beta"].set_link("down")
    try:
        done = preflight()
    finally:
        hosts["beta"].set_link("up")
    assert done.returncode == 1
    assert "ok      ssh alpha" in done.stdout
    assert "FAIL    ssh beta" in done.stdout
    assert "process group" not in done.stdout
