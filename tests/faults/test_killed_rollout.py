"""A run that samples its responses loses a rank while it does so: the cause stands on top, and the
resumed run samples, and learns, what an uninterrupted one does, to the last bit.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import ROOT, write_tiny_recipe

from kd.runs.records import read_metrics

pytestmark = pytest.mark.fault
SETTINGS = [
    "training.max_steps=10",
    "training.checkpoint_every=4",
    "rollout.fraction=0.5",
    "rollout.max_new_tokens=8",
]
KILLED = 247  # what the launcher makes of signal 9


@pytest.fixture(scope="module")
def runs(launch: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Any]:
    """Folders of the run that was left alone and of the other, and how its first start ended."""
    folder = tmp_path_factory.mktemp("killed_rollout")
    recipe = write_tiny_recipe(folder)

    def arguments(name: str) -> list[str]:
        words = [w for s in [f"run.name={name}", *SETTINGS] for w in ("--set", s)]
        return ["--recipe", str(recipe), *words]

    whole = launch("launch/train.py", *arguments("whole"))
    assert whole.returncode == 0, whole.stderr[-3000:]
    fault = ["tests/faults/faulty_train.py", "killed in rollout", "7", str(folder / "time")]
    killed = launch(*fault, *arguments("killed"), PYTHONPATH=str(ROOT / "tests"))
    rest = launch("launch/train.py", *arguments("killed"), "--resume", "auto")
    assert rest.returncode == 0, rest.stderr[-3000:]
    assert "resuming from" in rest.stderr
    return folder / "runs" / "whole", folder / "runs" / "killed", killed


def test_rollouts_that_yield_nothing_are_counted_and_told_and_not_fatal(
    launch: Any, tmp_path: Path
) -> None:
    recipe = write_tiny_recipe(tmp_path)
    settings = ['data.loss_sections=["answer"]', "truncation.keep_fraction=1.0"]
    settings += ["rollout.fraction=1.0", "rollout.max_new_tokens=1", "training.max_steps=2"]
    words = [w for s in ["run.name=nothing", *settings] for w in ("--set", s)]
    done = launch("launch/train.py", "--recipe", str(recipe), *words)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "step 1: nothing to learn from: no sampled response has a token in" in done.stderr
    records = read_metrics(tmp_path / "runs" / "nothing" / "metrics.jsonl")
    assert [record["rollouts"]["num_without_label"] for record in records] == [8, 8]
    assert [record["loss"] for record in records] == [0.0, 0.0]


def test_the_rank_that_was_killed_is_named(runs: tuple[Path, Path, Any]) -> None:
    _, _, killed = runs
    assert killed.returncode == KILLED
    assert "rank 1 (process" in killed.stderr
    assert "has gone" in killed.stderr or "was killed" in killed.stderr, killed.stderr[-2000:]


def test_the_resumed_run_is_the_uninterrupted_one_to_the_last_bit(
    runs: tuple[Path, Path, Any],
) -> None:
    whole, killed, _ = runs
    keys = ("step", "loss", "kd", "ce", "grad_norm", "val_loss", "num_supervised_tokens")
    records = [
        [{key: record.get(key) for key in keys} for record in read_metrics(run / "metrics.jsonl")]
        for run in (whole, killed)
    ]
    assert records[0] == records[1]
    samples = [
        [json.loads(line) for line in (run / "rollouts.jsonl").read_text().splitlines()]
        for run in (whole, killed)
    ]
    assert [sample["step"] for sample in samples[0]] == list(range(1, 11))
    assert samples[0] == samples[1]
    weights = [load_file(run / "export" / "last" / "model.safetensors") for run in (whole, killed)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
