"""Scalars have one set of names, in groups, wherever they go, and no monitor ends a run."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import ROOT, wait_until
from wandb_files import wandb_history

from kd.errors import UserError
from kd.recipe import Recipe, load_recipe
from kd.training.diagnostics import MEASURES
from kd.training.monitors import CsvMonitor, Monitors, TensorBoardMonitor, WandbMonitor, scalars

MEANS = dict.fromkeys(MEASURES, 0.5) | {"num_supervised_tokens": 3}
RECORD = {
    "format_version": 2,
    "step": 7,
    "epoch": 0.5,
    "loss": 1.0,
    "kd": 0.25,
    "ce": 1.75,
    "lr": 1e-3,
    "skipped": False,
    "step_ms": 12.0,
    "teacher_wait_ms": None,
    "diagnostics": {
        **MEANS,
        "by_section": {"cot": MEANS | {"forward_kl": math.nan}},
        "by_position": [None, MEANS],
        "by_source": {"data/a.jsonl": MEANS, "b.jsonl": None},
    },
    "val_loss": 2.0,
    "val_diagnostics": {**MEANS, "by_section": {}, "by_position": [None, None]},
    "rollouts": {"mean_tokens": 8.0},
    "accuracy": {
        "accuracy": 0.75,
        "ci95": [0.5, 0.875],
        "num_problems": 8,
        "unclosed_fraction": 0.125,
        "mean_response_tokens": 9.0,
    },
}


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    names = {"run.output_dir": str(tmp_path), "run.name": "trial", "monitor.wandb_project": "kd"}
    recipe = load_recipe("tiny_trunc50").with_values(names)
    recipe.run_dir.mkdir()
    return recipe


def test_the_numbers_of_a_record_are_in_groups_that_open_as_such():
    named = scalars(RECORD)
    of_measures = {name for name in named if name.startswith("divergence")}
    assert named.keys() - of_measures == {
        *("loss/total", "loss/kd", "loss/ce", "loss/val_total"),
        *("training/epoch", "training/lr", "training/skipped", "speed/step_ms"),
        *("accuracy/accuracy", "accuracy/ci95_low", "accuracy/ci95_high"),
        *("accuracy/unclosed_fraction", "accuracy/mean_response_tokens"),
        "rollouts/mean_tokens",
    }
    assert {name for name in of_measures if "forward_kl" in name} == {
        "divergence/forward_kl",
        "divergence/val_forward_kl",
        "divergence_by_section/forward_kl_cot",
        "divergence_by_position/forward_kl_eighth_2",
        "divergence_by_source/forward_kl_data_a.jsonl",
    }
    assert len(of_measures) == 5 * len(MEASURES)
    assert (named["loss/total"], named["loss/val_total"]) == (1.0, 2.0)
    assert named["accuracy/ci95_high"] == 0.875
    without_teacher = scalars({"step": 1, "loss": 1.0, "diagnostics": None, "rollouts": None})
    assert without_teacher == {"loss/total": 1.0}


def test_tensorboard_shows_a_repeated_step_once_and_a_text(tmp_path: Path):
    for start_step, value in ((0, 1.0), (2, 2.0)):
        monitor = TensorBoardMonitor(tmp_path, start_step)
        for step in range(start_step + 1, 5):
            monitor.write({"loss/total": value}, step)
        monitor.text("rollouts/sample", "1+1=<think>2", 4)
        monitor.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss/total")] == [
        (1, 1.0),
        (2, 1.0),
        (3, 2.0),
        (4, 2.0),
    ]
    event = events.Tensors("rollouts/sample/text_summary")[-1]
    assert (event.step, event.tensor_proto.string_val) == (4, [b"1+1=<think>2"])


def test_csv_holds_a_repeated_step_once_and_no_torn_line(tmp_path: Path):
    path = tmp_path / "monitor" / "scalars.csv"
    for start_step, value in ((0, 1.0), (1, 2.0)):
        monitor = CsvMonitor(path, start_step)
        for step in range(start_step + 1, 3):
            monitor.write({"loss/total": value, "speed/step_ms": 3.0}, step)
        monitor.close()
        with path.open("a") as file:
            file.write("\0\0\n1" if value == 1.0 else "")  # damaged; and of a line of step 12
    assert path.read_text().splitlines() == [
        "step,name,value",
        "1,loss/total,1.0",
        "1,speed/step_ms,3.0",
        "2,loss/total,2.0",
        "2,speed/step_ms,3.0",
    ]


def test_a_monitor_that_cannot_write_is_left_out_and_the_others_go_on(recipe, caplog):
    settings = {"monitor.csv": True, "monitor.tensorboard": True, "monitor.wandb_project": None}
    monitors = Monitors(recipe.with_values(settings), start_step=0)
    board, _ = monitors._monitors

    def refuse(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    board.write = refuse
    for step in (1, 2):
        monitors.write(RECORD | {"step": step})
    monitors.close()
    assert caplog.text.count("TensorBoardMonitor: No space left on device") == 1
    written = (recipe.run_dir / "monitor" / "scalars.csv").read_text()
    assert "\n1,loss/total,1.0\n" in written
    assert "\n2,loss/total,1.0\n" in written


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_a_monitor_that_is_not_installed_is_one_message(recipe, monkeypatch, package):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    values = {"monitor.tensorboard": package == "tensorboard"}
    with pytest.raises(UserError, match=rf'monitor\.{package}.* needs {package}: .*"track"'):
        Monitors(recipe.with_values(values), start_step=0)


@pytest.mark.process
def test_wandb_holds_every_step_and_text_and_leaves_no_process(recipe, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    before = set(psutil.Process().children(recursive=True))
    monitors = Monitors(recipe, start_step=0)
    started = set(psutil.Process().children(recursive=True)) - before
    for step in (7, 8):
        monitors.write(RECORD | {"step": step})
        monitors.text("rollouts/sample", f"1+1=<think>{step}", step)
    monitors.close()
    history = wandb_history(recipe.run_dir / "monitor")
    assert history.keys() == {7, 8}
    named = scalars(RECORD)
    for step, values in history.items():
        assert named.keys() <= values.keys()
        assert math.isnan(values["divergence_by_section/forward_kl_cot"])
        assert values["loss/val_total"] == 2.0
        (folder,) = (recipe.run_dir / "monitor" / "wandb").glob("offline-run-*/files")
        table = json.loads((folder / values["rollouts/sample/path"]).read_text())
        assert table == {"columns": ["step", "text"], "data": [[step, f"1+1=<think>{step}"]]}
    assert started, "W&B started none"
    wait_until(lambda: not any(one.is_running() for one in started), "W&B's process ends")


@pytest.mark.process
def test_a_run_outlives_wandbs_process(recipe, monkeypatch, caplog):
    """A scheduler's signal reaches all processes of a job."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    before = set(psutil.Process().children(recursive=True))
    monitors = Monitors(recipe, start_step=0)
    for process in set(psutil.Process().children(recursive=True)) - before:
        process.kill()
        process.wait(10)
    for step in range(1, 4):
        monitors.write(RECORD | {"step": step})
    monitors.close()
    assert caplog.text.count("WandbMonitor: ") == 1


def test_wandb_that_does_not_start_is_one_message(recipe, monkeypatch):
    import wandb

    def refuse(**_: Any) -> None:
        raise wandb.Error("no API key configured")

    monkeypatch.setattr("wandb.init", refuse)
    message = r"monitor\.wandb_project = 'kd': .*no API key configured.*WANDB_MODE=offline"
    with pytest.raises(UserError, match=message):
        WandbMonitor(recipe, "kd", recipe.run_dir / "monitor")


@pytest.mark.process
@pytest.mark.parametrize(
    ("mode", "status", "said"),
    [
        ("bogus", 2, "monitor.wandb_project = 'kd': W&B does not start: .*bogus"),
        ("disabled", 0, r"wandb     disabled \(WANDB_MODE\)"),
    ],
)
def test_a_mode_of_wandb_is_refused_or_said(recipe, tmp_path, mode, status, said):
    """W&B reads it once in a process."""
    path = tmp_path / "recipe.json"
    path.write_text(recipe.model_dump_json())
    script = (
        "from kd.cli import run; from kd.logs import configure_logging\n"
        "from kd.recipe import load_recipe; from kd.training.monitors import Monitors\n"
        "configure_logging(0)\n"
        f"run(lambda: Monitors(load_recipe({str(path)!r}), start_step=0).close())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "WANDB_MODE": mode, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == status, done.stderr
    assert re.search(said, done.stderr, re.DOTALL)


def test_a_resumed_run_continues_without_wandb(recipe, monkeypatch, caplog):
    monkeypatch.setattr("wandb.init", lambda **_: (_ for _ in ()).throw(OSError("no route")))
    with pytest.raises(UserError, match="no route"):
        Monitors(recipe, start_step=0)
    Monitors(recipe, start_step=3).write(RECORD | {"step": 4})
    assert "no route" in caplog.text
    assert "This run continues without it" in caplog.text


def test_no_monitor_is_opened_without_being_asked_for(recipe):
    monitors = Monitors(recipe.with_values({"monitor.wandb_project": None}), start_step=0)
    monitors.write(SimpleNamespace())  # which it does not look at
    assert not (recipe.run_dir / "monitor").exists()
