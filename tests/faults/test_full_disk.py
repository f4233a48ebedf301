"""A disk that fills up while a checkpoint is written: the earlier ones stay whole, and the run goes
on with room.
"""

import hashlib
import json
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from fault_messages import message_of
from tiny import disk_of_its_own, write_tiny_recipe

from kd.runs.records import read_metrics

pytestmark = pytest.mark.fault


@pytest.fixture
def small_disk(tmp_path):
    """With room for two or three checkpoints."""
    with disk_of_its_own(tmp_path / "disk", "600k") as folder:
        yield folder


def assert_whole(checkpoint: Path) -> None:
    for name, entry in json.loads((checkpoint / "manifest.json").read_text())["files"].items():
        data = (checkpoint / name).read_bytes()
        assert {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} == entry, name


def test_a_full_disk_keeps_earlier_checkpoints_and_the_run_resumes_with_room(
    launch, tmp_path, small_disk, fault_table
):
    recipe = write_tiny_recipe(tmp_path / "recipe")
    arguments = [
        "launch/train.py",
        "--recipe",
        str(recipe),
        "--set",
        f"run.output_dir={small_disk}",
    ]
    arguments += ["--set", "training.keep_last=9"]
    done = launch(*arguments)
    ended = time.time()
    folder = small_disk / "tiny_test"
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert done.stderr.count("could not be written") == 1
    assert "Earlier checkpoints are whole" in done.stderr
    assert not (folder / "SUCCESS").exists()
    kept = sorted((folder / "checkpoints").glob("step_*"))
    assert kept, f"the disk is too small for one checkpoint: {shutil.disk_usage(small_disk)}"
    assert not list((folder / "checkpoints").glob(".step_*"))
    for checkpoint in kept:
        assert_whole(checkpoint)
    fault_table.append(
        {
            "fault": "full disk",
            "shows": message_of(done.stderr, "could not be written", small_disk),
            "seconds": ended
            - (folder / "metrics.jsonl").stat().st_mtime,  # the last step was taken then
            "lost_steps": len(read_metrics(folder / "metrics.jsonl"))
            - int(kept[-1].name.removeprefix("step_")),
        }
    )
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    done = launch(*arguments, "--resume", "auto")
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"resuming from {kept[-1]}" in done.stderr
    assert (folder / "SUCCESS").exists()


def test_a_cache_whose_disk_is_full_says_so_on_all_ranks_and_is_filled_with_room(launch, tmp_path):
    recipe = write_tiny_recipe(tmp_path / "recipe")
    with disk_of_its_own(tmp_path / "disk", "200k") as folder:
        arguments = ["launch/cache.py", "--recipe", str(recipe), "--output", str(folder / "cache")]
        done = launch(*arguments, "--dtype", "fp32")
        assert done.returncode == 2, done.stderr[-2000:]
        assert "Traceback" not in done.stderr
        assert (
            done.stderr.count(
                "free some space and run the same command again; what is written is kept"
            )
            == 1
        )
        assert not (folder / "cache" / "filled.json").exists()
        assert not list((folder / "cache" / "shards").glob("*.partial"))
        subprocess.run(["mount", "-o", "remount,size=8m", folder], check=True)
        done = launch(*arguments, "--dtype", "fp32")
        assert done.returncode == 0, done.stderr[-2000:]
        assert (folder / "cache" / "filled.json").exists()
