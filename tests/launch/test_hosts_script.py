"""launch/hosts.sh refuses bad arguments and variables that would not arrive, before it reaches for
any host.
"""

import os
import subprocess
from pathlib import Path

import pytest
from tiny import ROOT

pytestmark = pytest.mark.process

HOSTFILE = str(ROOT / "launch/hostfile.example")
RECIPE = ["--recipe", "tiny_trunc50"]


def hosts_sh(
    *arguments: str, cwd: Path = ROOT, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(ROOT / "launch/hosts.sh"), *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "HOSTFILE '': no such file; usage: hosts.sh"),
        (["nowhere", *RECIPE], "HOSTFILE 'nowhere': no such file"),
        (["--restarts", "many", HOSTFILE, *RECIPE], "--restarts many: give a whole number"),
        (["--node-rank", "2", HOSTFILE, *RECIPE], "--node-rank 2: "),
        ([HOSTFILE], "--recipe"),
        (
            [HOSTFILE, *RECIPE, "--resume", "runs/a/checkpoints/step_4"],
            "--resume: every start here continues from",
        ),
        ([HOSTFILE, "--recipe", "tiny_trunc51"], "Did you mean tiny_trunc"),
    ],
)
def test_bad_arguments_are_refused_with_what_would_be_right(arguments, message):
    done = hosts_sh(*arguments)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr


def test_an_address_that_nobody_knows_is_refused_before_anything_waits_for_it():
    done = hosts_sh(HOSTFILE, *RECIPE, MASTER_ADDR="root@127.0.0.1")
    assert done.returncode == 2
    assert done.stderr.count("MASTER_ADDR = 'root@127.0.0.1' is not a name or address that") == 1


def test_a_hostfile_without_a_host_is_refused(tmp_path):
    (tmp_path / "hosts").write_text("# none yet\n\n")
    done = hosts_sh(str(tmp_path / "hosts"), *RECIPE)
    assert done.returncode == 2
    assert f"{tmp_path}/hosts names no host" in done.stderr


@pytest.mark.parametrize(
    "line", ["", "# a comment", "# A=b", "export A=b", "A", 'A="b c"', "A='b'", "A=$HOME", "A=5%n"]
)
def test_a_line_of_variables_that_would_not_arrive_as_it_stands_is_refused(tmp_path, line):
    (tmp_path / "nodes.env").write_text(f"HF_HUB_OFFLINE=1\n{line}\n")
    done = hosts_sh(HOSTFILE, *RECIPE, DS_ENV_FILE=str(tmp_path / "nodes.env"))
    assert done.returncode == 2
    assert f"{tmp_path}/nodes.env, line 2: {line}: write KEY=VALUE" in done.stderr


def test_the_variables_and_the_hostfile_that_are_shipped_are_read_by_deepspeeds_own_parsers():
    from deepspeed.launcher.runner import _parse_hostfile

    assert _parse_hostfile((ROOT / "launch/hostfile.example").read_text().splitlines()) == {
        "node-1": 8,
        "node-2": 8,
    }
    for line in (ROOT / "launch/nodes.env").read_text().splitlines():
        key, value = line.split("=", maxsplit=1)  # as runner.py does
        assert key.isidentifier()
        assert value


def test_a_finished_run_is_left_alone(tmp_path):
    folder = tmp_path / "runs" / "tiny_trunc50"
    folder.mkdir(parents=True)
    (folder / "SUCCESS").write_text("{}")
    done = hosts_sh(HOSTFILE, *RECIPE, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip() == "done already: runs/tiny_trunc50/SUCCESS"
