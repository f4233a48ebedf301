"""A whole run by the real path: what it leaves, and that an interrupted one ends like an
uninterrupted one.
"""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from tiny import ROOT, launcher_command, write_tiny_recipe
from transformers import AutoModelForCausalLM, AutoTokenizer

from kd.runs.records import read_metrics

pytestmark = pytest.mark.dist
SECRET_NAMES = ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "GITHUB_TOKEN", "DB_PASSWORD")
SECRETS = {name: f"secret-of-{name.lower()}" for name in SECRET_NAMES}
MONITORS = ("--set", "monitor.csv=true", "--set", "monitor.tensorboard=true")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    return write_tiny_recipe(tmp_path_factory.mktemp("train"))


@pytest.fixture(scope="module")
def whole_run(launch, recipe) -> Path:
    """The run folder of 40 steps without interruption."""
    arguments = ["--recipe", str(recipe), "--set", "run.name=whole", *MONITORS]
    done = launch("launch/train.py", *arguments, **SECRETS)
    assert done.returncode == 0, done.stderr[-4000:]
    return recipe.parent / "runs" / "whole"


@pytest.fixture(scope="module")
def interrupted_run(launch, recipe) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The same, with a rank killed after step 25, a byte of checkpoint 20 flipped, and --resume
    auto.
    """
    folder = recipe.parent / "runs" / "interrupted"
    # Slower steps, so that the kill lands between two checkpoints; only the cut, not the
    # arithmetic, depends on it.
    arguments = ["launch/train.py", "--recipe", str(recipe), "--set", "run.name=interrupted"]
    launcher = subprocess.Popen(
        launcher_command(*arguments), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    metrics = folder / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 25):
        assert launcher.poll() is None, launcher.stderr.read().decode()[-4000:]
        assert time.monotonic() < deadline, "the run did not reach step 25"
        time.sleep(0.002)
    ranks = [
        p
        for p in psutil.Process(launcher.pid).children(recursive=True)
        if p.environ().get("RANK") == "1"
    ]
    os.kill(ranks[-1].pid, signal.SIGKILL)
    launcher.communicate(timeout=120)
    assert launcher.returncode != 0
    assert not (folder / "SUCCESS").exists()
    newest = max((folder / "checkpoints").glob("step_*"), key=lambda path: int(path.name[5:]))
    assert newest.name in ("step_20", "step_30"), "the kill came too late to show anything"
    victim = newest / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    done = launch(*arguments, "--resume", "auto")
    assert done.returncode == 0, done.stderr[-4000:]
    return folder, done


def test_a_run_leaves_what_the_readme_says(whole_run):
    names = {path.name for path in whole_run.iterdir()}
    assert {
        "recipe.json",
        "environment.json",
        "metrics.jsonl",
        "checkpoints",
        "export",
        "SUCCESS",
    } <= names
    environment = json.loads((whole_run / "environment.json").read_text())
    assert environment["packages"]["torch"] == torch.__version__
    records = read_metrics(whole_run / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, 41))
    assert {"step", "epoch", "loss", "kd", "ce", "lr", "grad_norm", "num_supervised_tokens"} <= set(
        records[0]
    )
    assert {"tokens_per_second", "step_ms", "peak_memory_gib"} <= set(records[0])
    assert records[0]["loss"] == pytest.approx(0.5 * records[0]["kd"] + 0.5 * records[0]["ce"])
    for record in records:
        diagnostics = record["diagnostics"]
        assert diagnostics["num_supervised_tokens"] == record["num_supervised_tokens"]
        # The recipe's divergence, T = 1
        assert diagnostics["forward_kl"] == pytest.approx(record["kd"], rel=1e-4)
        assert {"prompt", "cot"} <= set(diagnostics["by_section"])
        # The first half of each trace is read.
        assert [part is not None for part in diagnostics["by_position"]] == [True] * 4 + [False] * 4
    assert records[9]["val_diagnostics"]["forward_kl"] == pytest.approx(
        records[9]["val_kd"], rel=1e-4
    )
    assert records[-1]["loss"] < 0.9 * records[0]["loss"], "the student learned nothing"


def test_no_file_of_a_run_holds_a_secret_of_the_environment(whole_run):
    files = [path for path in whole_run.rglob("*") if path.is_file()]
    assert len(files) > 20
    for path in files:
        content = path.read_bytes()
        assert not any(secret.encode() in content for secret in SECRETS.values()), path


def test_every_file_of_a_run_has_the_mode_of_the_umask(whole_run):
    mask = os.umask(0o022)
    os.umask(mask)
    for path in whole_run.rglob("*"):
        bits = 0o777 if path.is_dir() else 0o666  # DeepSpeed leaves a script to run
        assert path.stat().st_mode & bits == bits & ~mask, path


def test_deepspeeds_monitor_writes_what_the_recipe_switches_on(whole_run):
    files = [path.name for path in (whole_run / "monitor").rglob("*") if path.is_file()]
    assert any(name.startswith("events.out.tfevents") for name in files)
    (losses,) = (whole_run / "monitor").rglob("*kd_loss.csv")
    records = read_metrics(whole_run / "metrics.jsonl")
    written = [float(line.split(",")[1]) for line in losses.read_text().splitlines()[1:]]
    assert written == pytest.approx([record["loss"] for record in records])
    assert any((whole_run / "monitor").rglob("*kd_diagnostics_by_section_cot_reverse_kl.csv"))


def test_best_checkpoint_is_kept_beside_the_newest(whole_run):
    records = read_metrics(whole_run / "metrics.jsonl")
    losses = {record["step"]: record["val_loss"] for record in records if "val_loss" in record}
    assert sorted(losses) == sorted({*range(4, 41, 4), 10, 30}), "ten times, and where it is saved"
    losses = {step: loss for step, loss in losses.items() if step % 10 == 0}
    best = min(losses, key=losses.get)
    assert json.loads((whole_run / "SUCCESS").read_text())["best_step"] == best
    kept = {path.name for path in (whole_run / "checkpoints").glob("step_*")}
    assert kept == {"step_30", "step_40", f"step_{best}"}


@pytest.mark.parametrize("which", ["last", "best"])
def test_export_loads_and_generates(whole_run, which):
    model = AutoModelForCausalLM.from_pretrained(whole_run / "export" / which)
    tokenizer = AutoTokenizer.from_pretrained(whole_run / "export" / which)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    inputs = tokenizer("1+2*3", return_tensors="pt")
    assert (
        model.generate(input_ids=inputs["input_ids"], max_new_tokens=3).shape[1]
        > inputs["input_ids"].shape[1]
    )


def test_a_resumed_run_has_the_losses_of_an_uninterrupted_one_to_the_last_bit(
    whole_run, interrupted_run
):
    folder, _ = interrupted_run
    fields = ("step", "loss", "kd", "ce", "lr", "grad_norm", "num_supervised_tokens", "val_loss")
    fields += ("diagnostics", "val_diagnostics")
    curves = [
        [[record.get(field) for field in fields] for record in read_metrics(run / "metrics.jsonl")]
        for run in (whole_run, folder)
    ]
    assert curves[0] == curves[1]


@pytest.mark.parametrize("which", ["last", "best"])
def test_a_resumed_run_exports_the_same_weights(whole_run, interrupted_run, which):
    weights = [
        load_file(run / "export" / which / "model.safetensors")
        for run in (whole_run, interrupted_run[0])
    ]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(interrupted_run):
    _, done = interrupted_run
    assert (
        "is damaged (zero_pp_rank_1_mp_rank_00_optim_states.pt differs from its checksum)"
        in done.stderr
    )
    assert "resuming from" in done.stderr
