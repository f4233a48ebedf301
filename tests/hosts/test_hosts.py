"""Runs on two hosts: by DeepSpeed's launcher as it stands, by --no_ssh, and by launch/hosts.sh
whatever happens.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tiny import ROOT, wait_until, write_tiny_recipe
from two_hosts import VARIABLES, Host, child_of

from kd.constants import EXIT_INTERRUPTED
from kd.runs.records import read_metrics

pytestmark = pytest.mark.hosts
FIELDS = ("step", "loss", "kd", "ce", "lr", "grad_norm", "num_supervised_tokens", "val_loss")
# What shells and pdsh might change on the way, without a space and with one.
EVERY = 20
NAME, TEXT = "cut&50%", 'it\'s 100% "$HOME" \\ `more` & <that>'


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    """Twice as many steps between checkpoints as elsewhere: a signal comes by ssh, in seconds, and
    is to be there before the next one.
    """
    recipe = write_tiny_recipe(tmp_path_factory.mktemp("recipe"))
    text = recipe.read_text().replace("max_steps = 40", "max_steps = 100")
    recipe.write_text(text.replace("checkpoint_every = 10", f"checkpoint_every = {EVERY}"))
    return recipe


@pytest.fixture(scope="module")
def whole_run(launch, recipe) -> Path:
    """Two ranks on one host, without interruption."""
    done = launch("launch/train.py", "--recipe", str(recipe), "--set", "run.name=whole")
    assert done.returncode == 0, done.stderr[-4000:]
    return recipe.parent / "runs" / "whole"


def losses(run: Path) -> list[list[Any]]:
    return [
        [record.get(field) for field in FIELDS] for record in read_metrics(run / "metrics.jsonl")
    ]


def steps(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


def ranks_on(host: Host) -> list[int]:
    """The process ids, on that host, of the ranks that run there."""
    return [int(line.split()[0]) for line in host.processes("-u " + str(ROOT / "launch/train.py"))]


def test_deepspeeds_own_launcher_trains_on_two_hosts_with_the_variables_of_the_file(
    hosts, hostfile, environment, recipe, whole_run
):
    run = recipe.parent / "runs" / "pdsh"
    launcher = hosts["alpha"].start(
        *(
            str(Path(sys.executable).with_name("deepspeed")),
            "--hostfile",
            str(hostfile),
            "--master_addr",
            "alpha",
        ),
        *(
            "--no_local_rank",
            str(ROOT / "launch/train.py"),
            "--recipe",
            str(recipe),
            "--set",
            "run.name=pdsh",
        ),
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    for rank, name in enumerate(hosts):
        (process,) = wait_until(
            lambda host=hosts[name]: ranks_on(host), f"a rank starts on {name}", 60
        )
        of_rank = hosts[name].run("cat", f"/proc/{process}/environ").split("\0")
        assert f"RANK={rank}" in of_rank
        assert {f"{key}={value}" for key, value in VARIABLES.items()} <= set(of_rank)
    output, _ = launcher.communicate(timeout=200)
    assert launcher.returncode == 0, output[-4000:]
    assert (run / "SUCCESS").exists()
    assert losses(run) == losses(whole_run)


class Start(NamedTuple):
    """What one start of launch/hosts.sh came to."""

    status: int
    output: str
    saved: int  # the step of the newest checkpoint
    left: list[str]  # processes that a host still has

    @property
    def last_line(self) -> str:
        return self.output.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def hosts_sh(hosts, hostfile, environment, recipe) -> Callable[..., subprocess.Popen]:
    """Start launch/hosts.sh on a host, for the run of that name."""

    def start(
        host: str, *options: str, name: str, arguments: tuple[str, ...] = ()
    ) -> subprocess.Popen:
        return hosts[host].start(
            *(
                "bash",
                str(ROOT / "launch/hosts.sh"),
                *options,
                str(hostfile),
                "--recipe",
                str(recipe),
            ),
            *("--set", f"run.name={name}", *arguments),
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return start


def test_where_ssh_is_forbidden_each_host_starts_its_own_ranks(hosts_sh, recipe, whole_run):
    processes = [
        hosts_sh(host, "--node-rank", str(i), name="no_ssh")
        for i, host in enumerate(("alpha", "beta"))
    ]
    for process in processes:
        output, _ = process.communicate(timeout=200)
        assert process.returncode == 0, output[-4000:]
        assert (
            output.strip().splitlines()[-1]
            == f"done: the student is in {recipe.parent}/runs/no_ssh/export"
        )
    assert losses(recipe.parent / "runs" / "no_ssh") == losses(whole_run)


@pytest.fixture(scope="module")
def starts(hosts, hosts_sh, recipe) -> dict[str, Start]:
    """One run by the same command again and again, until it is done; something happens to it each
    time.
    """
    run = recipe.parent / "runs" / NAME

    def start(event: Callable[[subprocess.Popen], None], *options: str, step: int) -> Start:
        """Let the event happen once that step has been taken."""
        arguments = ("--set", "run.watchdog_minutes=0.25", "--set", f"evaluation.path={TEXT}")
        process = hosts_sh("alpha", *options, name=NAME, arguments=arguments)
        wait_until(lambda: steps(run) >= step or process.poll() is not None, f"step {step}", 120)
        event(process)
        output, _ = process.communicate(timeout=200)
        saved = max(int(path.name[5:]) for path in (run / "checkpoints").glob("step_*"))
        left = [
            f"{host.name}: {line}"
            for host in hosts.values()
            for line in host.processes("launch/train.py")
        ]
        return Start(process.returncode, output, saved, left)

    def kill_a_rank(_: subprocess.Popen) -> None:
        (rank,) = ranks_on(hosts["beta"])
        hosts["beta"].run("kill", "-KILL", str(rank))

    # Ranks may take more steps before an event than this process, which looks at them, would like
    told = start(lambda process: os.kill(child_of(process), signal.SIGTERM), step=4)
    cut = start(lambda _: hosts["beta"].set_link("down"), step=told.saved + 3)
    hosts["beta"].set_link("up")
    killed = start(kill_a_rank, "--restarts", "1", step=cut.saved + EVERY + 3)
    again = start(lambda _: None, step=0)
    return {"told": told, "cut": cut, "killed": killed, "again": again}


def test_a_wrapper_told_to_stop_has_the_ranks_save(starts):
    told = starts["told"]
    assert told.status == EXIT_INTERRUPTED, told.output[-4000:]
    assert told.saved >= 4
    assert told.last_line.startswith("interrupted: ")
    assert f"step_{told.saved} is saved" in told.last_line
    assert told.left == []


def test_a_link_cut_in_the_middle_ends_the_run_on_both_hosts_and_says_what_to_do(starts):
    cut = starts["cut"]
    assert cut.status == 1, cut.output[-4000:]
    assert cut.saved == starts["told"].saved or cut.saved % EVERY == 0
    assert "rank 0 on alpha: no step within run.watchdog_minutes = 0.25" in cut.output
    assert "its network is lost" in cut.output
    assert "a host cannot be reached" in cut.output
    assert cut.last_line.startswith("failed: the first error above says why")
    assert "; the same command starts again from " in cut.last_line
    assert cut.last_line.endswith(f"step_{cut.saved}")
    assert cut.left == []


def test_a_killed_rank_is_started_again_without_help_after_progress(starts):
    killed = starts["killed"]
    assert killed.status == 0, killed.output[-4000:]
    assert "resuming from" in killed.output
    assert killed.output.count("failed: start 2 of at most 2 continues from ") == 1
    assert killed.last_line.startswith("done: ")
    assert killed.left == []


def test_after_all_that_the_losses_are_those_of_an_uninterrupted_run_to_the_last_bit(
    starts, recipe, whole_run
):
    assert losses(recipe.parent / "runs" / NAME) == losses(whole_run)


def test_a_finished_run_is_not_started_again(starts):
    assert starts["again"].status == 0
    assert starts["again"].last_line.startswith("done already: ")


def test_arguments_reach_the_hosts_as_they_were_written(starts, recipe):
    resolved = json.loads((recipe.parent / "runs" / NAME / "recipe.json").read_text())
    assert resolved["run"]["name"] == NAME
    assert resolved["evaluation"]["path"] == TEXT
