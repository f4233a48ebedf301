"""What a user gets wrong, as the command line shows it: one block on stderr, a status that is not
0, nothing lost.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import forked
import pytest
from tiny import ROOT, free_port, launcher_command, write_tiny_recipe

from kd.runs.records import read_metrics

pytestmark = pytest.mark.process

TRAIN = "launch/train.py"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    return write_tiny_recipe(tmp_path_factory.mktemp("bad_input"), num_rows=30)


def train(
    recipe: Path, *overrides: str, resume: str | None = None, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """One rank, without a launcher."""
    command = [TRAIN, "--recipe", str(recipe), *(f"--set={text}" for text in overrides)]
    command += ["--resume", resume] if resume else []
    return forked.run(command, env=env, timeout=200)


def assert_one_block(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error") - done.stderr.count("error_") >= 1
    for part in parts:
        assert done.stderr.count(part) == 1, done.stderr


@pytest.fixture(scope="module")
def finished(recipe) -> Path:
    """A finished run of two steps; the tests below must leave every byte of it."""
    done = train(recipe, "run.name=finished", "training.max_steps=2")
    assert done.returncode == 0, done.stderr[-3000:]
    return recipe.parent / "runs" / "finished"


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_loss_that_cannot_run_here_is_named_before_a_model_is_loaded(recipe):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = train(recipe, "run.name=backend", "loss.backend=triton", env=environment)
    assert_one_block(
        done, "loss.backend = 'triton': backend='triton' runs on CUDA, but the tensors are on cpu"
    )
    assert not (recipe.parent / "runs" / "backend").exists()


def test_a_finished_run_is_not_overwritten(recipe, finished):
    before = content(finished)
    done = train(recipe, "run.name=finished", "training.max_steps=2")
    assert_one_block(done, "already holds a run: continue it with --resume auto")
    assert content(finished) == before


def test_another_recipes_run_is_not_continued(recipe, finished):
    before = content(finished)
    done = train(
        recipe, "run.name=finished", "training.max_steps=2", "loss.temperature=2.0", resume="auto"
    )
    assert_one_block(
        done, "holds the run of another recipe", "loss.temperature: 1.0 there, 2.0 here"
    )
    assert content(finished) == before


def test_resume_from_a_path_without_a_checkpoint_is_an_error(recipe, tmp_path):
    done = train(recipe, "run.name=from_nowhere", resume=str(tmp_path))
    assert_one_block(done, "not a checkpoint (no manifest.json)")


def test_resume_auto_without_a_checkpoint_starts_fresh_and_says_so(recipe):
    done = train(recipe, "run.name=fresh", "training.max_steps=1", resume="auto")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "no whole checkpoint, starting fresh" in done.stderr
    assert (recipe.parent / "runs" / "fresh" / "SUCCESS").exists()


def test_a_loss_that_is_not_finite_stops_the_run_with_step_and_rows(launch, recipe):
    done = launch(
        TRAIN,
        "--recipe",
        str(recipe),
        "--set",
        "run.name=explodes",
        "--set",
        "training.learning_rate=1e30",
        "--set",
        "training.warmup_fraction=0.0",
    )
    assert_one_block(done, "are not both finite", "Rows of the batch, counted from 1: ")
    assert not (recipe.parent / "runs" / "explodes" / "SUCCESS").exists()


def test_steps_that_are_not_finite_are_skipped_and_counted_when_allowed(recipe):
    done = train(
        recipe,
        "run.name=skips",
        "training.learning_rate=1e30",
        "training.warmup_fraction=0.0",
        "training.skip_nonfinite=3",
    )
    assert_one_block(done, "training.skip_nonfinite = 3 allows no more such steps")
    records = [
        json.loads(line)
        for line in (recipe.parent / "runs/skips/metrics.jsonl").read_text().splitlines()
    ]
    # Three allowed, one that stops
    assert [record["skipped"] for record in records].count(True) == 4


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_an_error_of_every_rank_is_printed_once_and_every_launcher_fails(recipe, launcher):
    arguments = [
        TRAIN,
        "--recipe",
        str(recipe),
        "--set",
        "run.name=odd",
        "--set",
        "deepspeed.student=zero9.json",
    ]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    commands = {
        "deepspeed": launcher_command(*arguments),
        "torchrun": [*torchrun, "--nproc_per_node", "2", *arguments],
    }
    done = subprocess.run(
        commands[launcher], cwd=ROOT, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode != 0
    assert done.stderr.count("deepspeed.student = 'zero9.json': no such file") == 1
    assert not (recipe.parent / "runs" / "odd").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "teacher.model=no/such/folder",
            "teacher.model = 'no/such/folder': no such file or folder",
        ),
        ("data.path=missing.jsonl", "data.path = 'missing.jsonl': no such file or folder"),
        (
            "deepspeed.student=zero9.json",
            "deepspeed.student = 'zero9.json': no such file; the files in ds_configs/ ",
        ),
    ],
)
def test_check_finds_what_is_missing_without_loading_anything(recipe, override, message):
    done = forked.run([TRAIN, "--recipe", recipe, "--set", override, "--check"], timeout=60)
    assert done.returncode == 2
    assert_one_block(done, message)


def test_a_hub_id_without_a_network_says_what_to_do(recipe):
    done = train(recipe, "run.name=offline", "student.model=owner/model")
    assert_one_block(done, "student.model = 'owner/model'", "launch/prepare.py")


def test_a_missing_attention_is_an_error_before_a_model_is_loaded(recipe):
    done = train(recipe, "run.name=flash", "student.attention=flash_attention_2")
    assert_one_block(done, 'student.attention = "flash_attention_2" is not available here')


def test_a_corrected_recipe_may_take_over_the_folder_of_a_run_that_never_took_a_step(recipe):
    done = train(recipe, "run.name=corrected", "training.max_steps=1", "data.end_token=nonsense")
    assert_one_block(done, "nonsense")
    done = train(recipe, "run.name=corrected", "training.max_steps=1")
    assert done.returncode == 0, done.stderr[-3000:]


def test_resume_from_a_path_goes_back_and_sets_later_checkpoints_aside(recipe, finished):
    folder = recipe.parent / "runs" / "back"
    overrides = (
        "run.name=back",
        "training.max_steps=6",
        "training.checkpoint_every=2",
        "training.keep_last=9",
    )
    assert train(recipe, *overrides).returncode == 0
    losses = [record["loss"] for record in read_metrics(folder / "metrics.jsonl")]
    other = train(recipe, *overrides, resume=str(finished / "checkpoints" / "step_2"))
    assert_one_block(other, "is not a checkpoint of this run")
    done = train(recipe, *overrides, resume=str(folder / "checkpoints" / "step_2"))
    assert done.returncode == 0, done.stderr[-3000:]
    names = {path.name for path in (folder / "checkpoints").iterdir() if path.is_dir()}
    assert names == {"step_2", "step_4", "step_6", "abandoned_step_4", "abandoned_step_6"}
    assert [record["loss"] for record in read_metrics(folder / "metrics.jsonl")] == losses
    assert len(read_metrics(folder / "metrics.abandoned.jsonl")) == 4
    manifest = folder / "checkpoints" / "step_4" / "manifest.json"
    manifest.write_text(manifest.read_text()[:-40])
    done = train(recipe, *overrides, resume=str(folder / "checkpoints" / "step_4"))
    assert_one_block(done, "its manifest.json is damaged")


def test_another_seed_or_other_data_is_not_a_continuation(recipe, finished):
    arguments = ("run.name=finished", "training.max_steps=2")
    done = train(recipe, *arguments, "run.seed=5", resume="auto")
    assert_one_block(done, "run.seed: 0 there, 5 here")
    traces = recipe.parent / "traces.jsonl"
    rows = traces.read_text()
    traces.write_text("".join(rows.splitlines(keepends=True)[:-1]))
    done = train(recipe, *arguments, resume="auto")
    traces.write_text(rows)
    assert_one_block(done, "was started with other data")


def test_several_processes_without_ranks_are_an_error(recipe):
    environment = {**os.environ, "SLURM_NTASKS": "2"}
    command = [TRAIN, "--recipe", str(recipe), "--set", "run.name=no_ranks"]
    done = forked.run(command, env=environment, timeout=60)
    assert_one_block(done, "SLURM_NTASKS = 2, but RANK is not set")
    assert not (recipe.parent / "runs" / "no_ranks").exists()


@pytest.mark.dist
def test_a_run_folder_that_ranks_do_not_share_is_found_before_the_first_step(recipe, tmp_path):
    """Of the same relative name, in another current directory, as on nodes without a shared one."""
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    ranks = []
    for rank in range(2):
        folder = tmp_path / f"node{rank}"
        folder.mkdir()
        command = [str(ROOT / TRAIN), "--recipe", str(recipe), "--set=run.output_dir=runs"]
        variables = {**os.environ, **meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        ranks.append(forked.Forked(command, env=variables, cwd=folder))
    _, errors = ranks[0].communicate(timeout=100)
    assert ranks[0].returncode == 2
    assert "run.output_dir = 'runs': rank 1 on " in errors
    assert "1 of 2 ranks do not see the files of rank 0" in errors
    ranks[1].communicate(timeout=100)
    assert not (tmp_path / "node0/runs/tiny_test/metrics.jsonl").exists()
