"""A whole run by the real path: what it leaves, and that an interrupted one ends like an
uninterrupted one.
"""

import csv
import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import ROOT, launcher_command, write_tiny_recipe
from transformers import AutoModelForCausalLM, AutoTokenizer
from wandb_files import wandb_history

from kd.runs.records import read_metrics
from kd.training.monitors import scalars

pytestmark = pytest.mark.dist
SECRET_NAMES = ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "GITHUB_TOKEN", "DB_PASSWORD")
SECRETS = {name: f"secret-of-{name.lower()}" for name in SECRET_NAMES}
MONITORS = ("monitor.csv=true", "monitor.tensorboard=true", "monitor.wandb_project=kd")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    return write_tiny_recipe(tmp_path_factory.mktemp("train"))


@pytest.fixture(scope="module")
def whole(launch, recipe) -> subprocess.CompletedProcess[str]:
    """40 steps without interruption, which say what they do in a file, and to all monitors."""
    settings = ("run.name=whole", "run.log_seconds=0", *MONITORS)
    words = [word for setting in settings for word in ("--set", setting)]
    variables = SECRETS | {"WANDB_MODE": "offline", "WANDB_NOTES": str(recipe)}
    done = launch("launch/train.py", "--recipe", str(recipe), *words, **variables)
    assert done.returncode == 0, done.stderr[-4000:]
    return done


@pytest.fixture(scope="module")
def whole_run(whole, recipe) -> Path:
    """Its folder."""
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


def test_tensorboard_csv_and_wandb_have_the_same_scalars_of_every_step(whole_run):
    expected = {r["step"]: scalars(r) for r in read_metrics(whole_run / "metrics.jsonl")}
    assert len(expected) == 40
    names = set().union(*expected.values())
    groups = {name.partition("/")[0] for name in names}
    divergences = {"divergence", "divergence_by_section", "divergence_by_position"}
    assert groups == {"loss", "speed", "training", *divergences}
    assert {"loss/val_total", "divergence_by_position/val_reverse_kl_eighth_4"} <= names

    events = EventAccumulator(str(whole_run / "monitor")).Reload()
    assert set(events.Tags()["scalars"]) == names
    of_csv = {step: {} for step in expected}
    with (whole_run / "monitor" / "scalars.csv").open() as file:
        for row in csv.DictReader(file):
            of_csv[int(row["step"])][row["name"]] = float(row["value"])
    of_wandb = wandb_history(whole_run / "monitor")
    for step, values in expected.items():
        assert of_csv[step] == values
        assert {name: of_wandb[step][name] for name in values} == pytest.approx(values)
    for name in names:
        written = {event.step: event.value for event in events.Scalars(name)}
        of_name = {step: values[name] for step, values in expected.items() if name in values}
        assert written == pytest.approx(of_name, rel=1e-6), name


def test_no_process_of_wandb_outlives_the_run(whole, recipe):
    left = [process for process in psutil.process_iter() if "wandb" in process.name()]
    assert not [one for one in left if one.environ().get("WANDB_NOTES") == str(recipe)]


def test_the_log_says_what_runs_where_and_then_one_line_a_step(whole, whole_run):
    lines = whole.stderr.splitlines()
    stamped = re.compile(r"\d\d:\d\d:\d\d (?! )| {19}\S")
    assert not [line for line in lines if not stamped.match(line)]
    facts, first_step = {}, next(i for i, line in enumerate(lines) if " step  1/40 " in line)
    for line in lines[:first_step]:
        label, text = line[9:19].strip(), line[19:]
        facts.setdefault(label, []).append(text)
    assert list(facts) == [
        *("run", "ranks", "data", "", "wandb", "teacher", "student", "layout", "attention"),
        *("batch", "loss", "plan", "logits"),
    ]
    assert f"whole, in {whole_run}, on " in facts["run"][0]
    assert facts["ranks"][0].startswith("2 on 1 node (rank 0 on ")
    assert "divided by 2 on 2 ranks (teacher.shard = world): " in facts["teacher"][-1]
    assert "divided by 2 on 2 ranks (ZeRO-3, zero3_cpu.json): " in facts["student"][-1]
    assert facts["layout"] == ["padded: packing takes flash attention"]
    assert "teacher sdpa (flash attention needs a GPU)" in facts["attention"][0]
    assert facts["batch"] == [
        "8 sequences a step: on each rank 2 micro-batches of at most 2 sequences, padded"
    ]
    assert facts["loss"] == ["0.5 forward_kl + 0.5 cross-entropy, over prompt+cot+answer"]

    records = read_metrics(whole_run / "metrics.jsonl")
    line = r"step +(\d+)/40  loss (\S+)  KL (\S+)  CE (\S+)  [\d,]+ tokens/s  (.+ left  )?waiting "
    steps = [found for line_ in lines if (found := re.search(line, line_))]
    assert [int(found[1]) for found in steps] == list(range(1, 41))
    for found, record in zip(steps, records, strict=True):
        assert [float(found[i]) for i in (2, 3, 4)] == pytest.approx(
            [record["loss"], record["kd"], record["ce"]], abs=1e-4
        )
        assert (found[5] is None) == (record["step"] in (1, 40))
    validated = [r["step"] for r in records if "val_loss" in r]
    found = re.findall(r"step +(\d+)/40  validation  loss ", whole.stderr)
    assert [int(step) for step in found] == validated


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
