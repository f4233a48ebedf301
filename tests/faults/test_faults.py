"""One run through everything that can happen to it: each start resumes from the last fault and
meets the next.

At its end its losses and its student are those of a run that met none, to the last bit.
"""

import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from fault_messages import message_of
from safetensors.torch import load_file
from tiny import ROOT, launcher_command, wait_until, write_tiny_recipe
from wandb_files import wandb_history

from kd.constants import EXIT_HANG, EXIT_USER_ERROR
from kd.engine.checkpoint import step_folders
from kd.runs.records import read_metrics

pytestmark = pytest.mark.fault
EVERY = 4
WATCHDOG_SECONDS = 12
OPTIMIZER_OF_RANK_1 = "zero_pp_rank_1_mp_rank_00_optim_states.pt"


def truncate(checkpoint: Path) -> None:
    content = (checkpoint / OPTIMIZER_OF_RANK_1).read_bytes()
    (checkpoint / OPTIMIZER_OF_RANK_1).write_bytes(content[: len(content) // 2])


def flip_a_byte(checkpoint: Path) -> None:
    content = bytearray((checkpoint / OPTIMIZER_OF_RANK_1).read_bytes())
    content[len(content) // 2] ^= 1
    (checkpoint / OPTIMIZER_OF_RANK_1).write_bytes(content)


def remove_a_file(checkpoint: Path) -> None:
    (checkpoint / OPTIMIZER_OF_RANK_1).unlink()


class Leg(NamedTuple):
    """A start of the run, perhaps with its newest checkpoint damaged before, that ends in a
    fault.
    """

    fault: str  # of faulty_train.py
    step: int
    title: str
    shows: str  # in the message that tells of it
    status: int
    damage: Callable[[Path], None] | None = None
    damage_title: str = ""


KILLED = 247  # what the launcher makes of signal 9
DAMAGED = r"is damaged \("
LEGS = [
    Leg(
        "killed in forward",
        6,
        "kill -9 in forward",
        r"rank 0 on .*: rank 1 \(process \d+ on",
        KILLED,
    ),
    Leg(
        "killed in all-reduce",
        11,
        "kill -9 before an all-reduce",
        r"rank 0 on .*: rank 1 \(process \d+ on",
        KILLED,
    ),
    Leg(
        "killed in checkpoint",
        12,
        "kill -9 while a checkpoint is written",
        r"rank 0 on .*: rank 1 \(process",
        KILLED,
    ),
    Leg(
        "exception",
        14,
        "exception, such as out of memory",
        "rank 1 on .* failed",
        1,
        truncate,
        "truncated file",
    ),
    Leg(
        "hang",
        18,
        "hang",
        r"no step within run\.watchdog_minutes",
        EXIT_HANG,
        flip_a_byte,
        "flipped byte",
    ),
    Leg(
        "nan",
        22,
        "NaN in a batch",
        "not both finite",
        EXIT_USER_ERROR,
        remove_a_file,
        "missing file of a rank",
    ),
]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    return write_tiny_recipe(tmp_path_factory.mktemp("faults"))


def arguments_of(recipe: Path, name: str) -> list[str]:
    settings = [f"run.name={name}", f"training.checkpoint_every={EVERY}", "training.keep_last=99"]
    settings += ["training.max_steps=32", f"run.watchdog_minutes={WATCHDOG_SECONDS / 60}"]
    return ["--recipe", str(recipe), *(word for setting in settings for word in ("--set", setting))]


@pytest.fixture(scope="module")
def journey(recipe, launch, fault_table) -> dict[str, Any]:
    """Every leg in turn, then TERM to the launcher, then the rest: stderr and status of each
    start.
    """
    folder, arguments = recipe.parent / "runs" / "journey", arguments_of(recipe, "journey")
    starts: dict[str, subprocess.CompletedProcess[str]] = {}
    for leg in LEGS:
        damaged = step_folders(folder / "checkpoints")[-1] if leg.damage else None
        if damaged:
            leg.damage(damaged)
        time_file = recipe.parent / f"{leg.fault}.time"
        monitor = ["--set", "monitor.wandb_project=kd"] if leg.fault == "nan" else []
        done = launch(
            "tests/faults/faulty_train.py",
            leg.fault,
            str(leg.step),
            str(time_file),
            *arguments,
            "--resume",
            "auto",
            *monitor,
            PYTHONPATH=str(ROOT / "tests"),
            WANDB_MODE="offline",
        )
        ended = time.time()
        starts[leg.fault] = done
        assert time_file.exists(), f"{leg.fault} never happened:\n{done.stderr[-4000:]}"
        if damaged:
            lost = int(damaged.name[5:]) - resumed_from(done.stderr)
            shows = message_of(done.stderr, DAMAGED, folder)
            fault_table.append(
                {"fault": leg.damage_title, "shows": shows, "seconds": None, "lost_steps": lost}
            )
        taken = len(read_metrics(folder / "metrics.jsonl"))
        lost = taken - int(step_folders(folder / "checkpoints")[-1].name[5:])
        shows = message_of(done.stderr, leg.shows, folder)
        seconds = ended - float(time_file.read_text())
        fault_table.append(
            {"fault": leg.title, "shows": shows, "seconds": seconds, "lost_steps": lost}
        )
    starts["TERM"] = terminate(recipe, folder, arguments, fault_table)
    starts["rest"] = launch("launch/train.py", *arguments, "--resume", "auto")
    return starts


def terminate(
    recipe: Path, folder: Path, arguments: list[str], table: list
) -> subprocess.CompletedProcess[str]:
    """TERM, twice, to the process that a user started; its end is awaited, and that of the ranks it
    leaves behind.
    """
    with (recipe.parent / "term.log").open("w") as log:
        launcher = subprocess.Popen(
            launcher_command("launch/train.py", *arguments, "--resume", "auto"),
            cwd=ROOT,
            stdout=log,
            stderr=log,
        )
        wait_until(lambda: len(read_metrics(folder / "metrics.jsonl")) >= 25, "step 25", 120)
        assert launcher.poll() is None
        launcher.send_signal(signal.SIGTERM)
        launcher.send_signal(signal.SIGTERM)
        sent = time.time()
        launcher.wait(60)
        wait_until((folder / "INTERRUPTED").exists, "INTERRUPTED", 30)
        seconds = time.time() - sent
    wait_until(
        lambda: "return code = 85" in (recipe.parent / "term.log").read_text(),
        "the launcher's end",
        30,
    )
    stderr = (recipe.parent / "term.log").read_text()
    newest = int(step_folders(folder / "checkpoints")[-1].name[5:])
    table.append(
        {
            "fault": "TERM to the launcher",
            "shows": message_of(stderr, "asked to stop", folder),
            "seconds": seconds,
            "lost_steps": len(read_metrics(folder / "metrics.jsonl")) - newest,
        }
    )
    return subprocess.CompletedProcess("", launcher.returncode, "", stderr)


def resumed_from(stderr: str) -> int:
    return int(re.search(r"resuming from .*step_(\d+)", stderr).group(1))


@pytest.mark.parametrize("leg", LEGS, ids=lambda leg: leg.fault)
def test_a_fault_is_told_and_costs_at_most_the_steps_since_the_last_checkpoint(
    journey, fault_table, leg
):
    done = journey[leg.fault]
    assert done.returncode == leg.status, done.stderr[-4000:]
    row = next(row for row in fault_table if row["fault"] == leg.title)
    assert 0 <= row["lost_steps"] < EVERY + (leg.fault == "killed in checkpoint")
    assert row["seconds"] < (WATCHDOG_SECONDS + 15 if leg.fault == "hang" else 15)


@pytest.mark.parametrize(
    "leg", [leg for leg in LEGS if leg.damage], ids=lambda leg: leg.damage_title
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(journey, fault_table, leg):
    row = next(row for row in fault_table if row["fault"] == leg.damage_title)
    assert row["lost_steps"] == EVERY
    assert OPTIMIZER_OF_RANK_1 in row["shows"]


def test_wandb_has_the_steps_up_to_the_one_that_ended_the_run(journey, recipe):
    history = wandb_history(recipe.parent / "runs" / "journey" / "monitor")
    assert "not both finite" in journey["nan"].stderr
    assert list(history) == list(range(resumed_from(journey["nan"].stderr) + 1, 23))


def test_the_first_cause_stands_above_what_the_other_rank_says(journey):
    stderr = journey["exception"].stderr
    assert stderr.index("MemoryError: rank 1 wanted more") < stderr.index("\nrank 0 on ")
    assert stderr.count("Traceback") == 1


def test_a_killed_rank_is_named_without_a_stack(journey):
    for fault in ("killed in forward", "killed in all-reduce"):
        assert "Traceback" not in journey[fault].stderr


def test_a_hang_shows_the_stack_of_every_rank(journey):
    stderr = journey["hang"].stderr
    assert stderr.count("no step within") == 2
    assert "in hang\n" in stderr
    assert "in train_step\n" in stderr.split("rank 0 on ")[1]


def test_nan_names_the_rows_of_the_batch(journey):
    assert re.search(r"Rows of the batch, counted from 1: (\d+, ){7}\d+\.", journey["nan"].stderr)


def test_two_terms_to_the_launcher_lose_nothing(journey, fault_table):
    row = next(row for row in fault_table if row["fault"] == "TERM to the launcher")
    assert row["lost_steps"] == 0
    assert row["seconds"] < 30
    assert resumed_from(journey["rest"].stderr) >= 25


def test_the_run_ends_as_if_nothing_had_happened(journey, launch, recipe):
    assert journey["rest"].returncode == 0, journey["rest"].stderr[-4000:]
    whole = launch("launch/train.py", *arguments_of(recipe, "whole"))
    assert whole.returncode == 0, whole.stderr[-4000:]
    runs = recipe.parent / "runs"
    losses, expected = (
        [
            (record["step"], record["loss"], record.get("val_loss"))
            for record in read_metrics(folder / "metrics.jsonl")
        ]
        for folder in (runs / "journey", runs / "whole")
    )
    assert losses == expected
    for export in ("last", "best"):
        one, two = (
            load_file(runs / name / "export" / export / "model.safetensors")
            for name in ("journey", "whole")
        )
        assert all(torch.equal(one[name], two[name]) for name in one.keys() | two.keys())
    assert not (runs / "journey" / "INTERRUPTED").exists()
