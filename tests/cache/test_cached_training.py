"""Training from a cache against training from the teacher itself, on two ranks, and what a cache
refuses.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import forked
import psutil
import pytest
from safetensors.torch import load_file
from tiny import ROOT, launcher_command, write_tiny_recipe

from kd.cache import open_cache
from kd.errors import UserError
from kd.recipe import load_recipe
from kd.runs.records import read_metrics

pytestmark = pytest.mark.dist

STEPS = 20
CACHES = {
    "fp32": ("--dtype", "fp32"),
    "bf16": ("--dtype", "bf16"),
    "int8": ("--dtype", "int8"),
    "top_k": ("--kind", "top_k", "--num-tokens", "20"),  # of a vocabulary of 20
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_recipe(tmp_path_factory.mktemp("cached"))


def fill(launch: Any, recipe: Path, folder: Path, *options: str, **keywords: Any) -> Any:
    arguments = ["--recipe", str(recipe), "--output", str(folder), *options]
    return launch("launch/cache.py", *arguments, **keywords)


@pytest.fixture(scope="module")
def caches(launch: Any, recipe: Path) -> dict[str, Path]:
    folders = {name: recipe.parent / f"cache_{name}" for name in CACHES}
    for name, options in CACHES.items():
        done = fill(launch, recipe, folders[name], *options)
        assert done.returncode == 0, done.stderr[-3000:]
    return folders


def train(launch: Any, recipe: Path, name: str, *pairs: str, **keywords: Any) -> Path:
    settings = [f"run.name={name}", f"training.max_steps={STEPS}", *pairs]
    words = [word for pair in settings for word in ("--set", pair)]
    done = launch("launch/train.py", "--recipe", str(recipe), *words, **keywords)
    assert done.returncode == 0, done.stderr[-3000:]
    return recipe.parent / "runs" / name


def losses(run: Path, key: str = "loss") -> list[float]:
    return [record[key] for record in read_metrics(run / "metrics.jsonl") if record.get(key)]


LENGTHS = {
    "quarter": ("truncation.keep_fraction=0.25",),
    "half": ("truncation.keep_fraction=0.5",),
    "whole": ("truncation.keep_fraction=1.0",),
    "packed": (
        "truncation.keep_fraction=0.5",
        "training.sequence_layout=packed",
        "training.max_tokens_per_micro_batch=90",
    ),
    "tail": (
        "truncation.keep_fraction=0.5",
        "truncation.window=tail",
        "truncation.window_context=keep",
    ),
}


@pytest.fixture(scope="module")
def live(launch: Any, recipe: Path) -> dict[str, Path]:
    return {name: train(launch, recipe, f"live_{name}", *s) for name, s in LENGTHS.items()}


@pytest.mark.parametrize("length", LENGTHS)
def test_one_cache_in_fp32_gives_the_losses_and_weights_of_the_teacher_at_every_length(
    launch, recipe, caches, live, length: str
):
    cache = f"teacher.cache={caches['fp32']}"
    run = train(launch, recipe, f"fp32_{length}", cache, *LENGTHS[length])
    for key in ("loss", "val_loss", "kd"):
        assert losses(run, key) == pytest.approx(losses(live[length], key), rel=1e-5)
    weights, expected = (
        load_file(path / "export" / "last" / "model.safetensors") for path in (run, live[length])
    )
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        assert float((weights[name] - tensor).abs().max()) < 1e-4, name
    records = read_metrics(run / "metrics.jsonl")
    assert all(record["teacher_wait_ms"] >= 0 for record in records)
    measured = json.loads((run / "plan.json").read_text())["measured"]
    planned = json.loads((run / "plan.json").read_text())["planned"]
    assert measured["teacher_weights_gib"] == pytest.approx(planned["teacher_weights_gib"])
    of_live = json.loads((live[length] / "plan.json").read_text())["measured"]
    assert measured["flops_per_step"] < of_live["flops_per_step"]
    without = sum(record["flops"] for record in read_metrics(live[length] / "metrics.jsonl"))
    assert sum(r["flops"] + r["flops_spared"] for r in records) == pytest.approx(without)


@pytest.mark.parametrize(("kind", "bound"), [("bf16", 0.02), ("int8", 0.05), ("top_k", 1e-4)])
def test_narrower_caches_are_close_and_all_tokens_are_exact(
    launch, recipe, caches, live, kind: str, bound: float
):
    run = train(launch, recipe, f"kind_{kind}", f"teacher.cache={caches[kind]}")
    assert losses(run) == pytest.approx(losses(live["half"]), rel=bound)


@pytest.mark.parametrize("trained", ["student.freeze_head=true", "student.lora.rank=4"])
def test_a_vector_serves_a_student_whose_head_is_frozen_exactly(
    launch, recipe, live, tmp_path: Path, trained: str
):
    folder = tmp_path / "vector"
    options = ("--kind", "vector", "--dtype", "fp32", "--set", trained)
    done = fill(launch, recipe, folder, *options)
    assert done.returncode == 0, done.stderr[-3000:]
    name = trained.partition("=")[0].replace(".", "_")
    expected = train(launch, recipe, f"live_{name}", trained)
    run = train(launch, recipe, f"vector_{name}", trained, f"teacher.cache={folder}")
    for key in ("loss", "val_loss", "kd"):
        assert losses(run, key) == pytest.approx(losses(expected, key), rel=1e-5)
    assert losses(run) != pytest.approx(losses(live["half"]), rel=1e-3), "the head is not trained"
    words = ["--set", f"teacher.cache={folder}", "--set", "run.name=refused"]
    done = launch("launch/train.py", "--recipe", str(recipe), *words, num_ranks=1)
    assert done.returncode == 2
    assert "but this recipe trains that head: set student.freeze_head = true" in done.stderr


def test_drawn_tokens_train_to_about_the_same_loss(launch, recipe, live, tmp_path: Path):
    folder = tmp_path / "sampled"
    done = fill(launch, recipe, folder, "--kind", "sampled", "--num-tokens", "200")
    assert done.returncode == 0, done.stderr[-3000:]
    run = train(launch, recipe, "sampled", f"teacher.cache={folder}")
    assert losses(run) == pytest.approx(losses(live["half"]), rel=0.05)


def test_a_run_goes_on_from_a_cache_to_the_last_bit_and_on_another_number_of_ranks(
    launch, recipe, caches
):
    cache = f"teacher.cache={caches['fp32']}"
    whole = recipe.parent / "runs" / "fp32_half"
    for num_ranks in (2, 1):
        folder = recipe.parent / "runs" / f"again_{num_ranks}"
        shutil.copytree(whole, folder)
        shutil.rmtree(folder / "checkpoints" / "step_20")
        resolved = json.loads((folder / "recipe.json").read_text())
        resolved["run"]["name"] = folder.name
        (folder / "recipe.json").write_text(json.dumps(resolved))
        settings = [f"run.name={folder.name}", f"training.max_steps={STEPS}", cache]
        words = [w for pair in (*settings, *LENGTHS["half"]) for w in ("--set", pair)]
        arguments = ["launch/train.py", "--recipe", str(recipe), *words, "--resume", "auto"]
        done = launch(*arguments, num_ranks=num_ranks)
        assert done.returncode == 0, done.stderr[-3000:]
        if num_ranks == 2:
            assert losses(folder) == losses(whole)
        else:
            assert losses(folder) == pytest.approx(losses(whole), rel=1e-5)


def test_more_rows_are_filled_alone(launch, recipe, caches, tmp_path: Path):
    folder = tmp_path / "cache"
    shutil.copytree(caches["fp32"], folder)
    before = {path: path.read_bytes() for path in (folder / "shards").iterdir()}
    more = write_tiny_recipe(tmp_path / "more", num_rows=90)
    for role in ("teacher", "student"):  # the models of the first
        shutil.rmtree(tmp_path / "more" / role)
        shutil.copytree(recipe.parent / role, tmp_path / "more" / role)
    text = more.read_text().replace(f'"{tmp_path}/more/teacher"', f'"{recipe.parent}/teacher"')
    more.write_text(text)
    arguments = ["--recipe", str(more), "--set", f"teacher.cache={folder}"]
    done = launch("launch/train.py", *arguments)
    assert done.returncode == 2
    assert f"teacher.cache = '{folder}' lacks " in done.stderr
    assert "run launch/cache.py with this recipe, which fills only these" in done.stderr
    done = fill(launch, more, folder, "--dtype", "fp32", num_ranks=1)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {path: path.read_bytes() for path in before} == before
    rows = json.loads(sorted((folder / "shards").glob("*.json"))[-1].read_text())["num_rows"]
    assert len(open_cache(folder)) > len(open_cache(caches["fp32"]))
    assert rows < 80


def test_of_two_fillers_at_once_one_waits_and_nothing_is_filled_twice(
    recipe, caches, tmp_path: Path
):
    folder = tmp_path / "cache"
    arguments = ["--recipe", str(recipe), "--output", str(folder), "--dtype", "fp32"]
    fillers = [
        subprocess.Popen(
            launcher_command("launch/cache.py", *arguments, num_ranks=1),
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    said = [filler.communicate(timeout=200)[1] for filler in fillers]
    assert [filler.returncode for filler in fillers] == [0, 0], said
    assert sum(": filling 0 rows" in text for text in said) == 1, said
    records = [json.loads(path.read_text()) for path in (folder / "shards").glob("*.json")]
    expected = len(open_cache(caches["fp32"]))
    assert sum(record["num_rows"] for record in records) == len(open_cache(folder)) == expected


def test_another_tokenizer_is_an_error_that_names_both(launch, recipe, caches):
    paths = [recipe.parent / role / "tokenizer.json" for role in ("teacher", "student")]
    before = [path.read_text() for path in paths]
    for path, text in zip(paths, before, strict=True):
        content = json.loads(text)
        content["normalizer"] = {"type": "Lowercase"}
        path.write_text(json.dumps(content))
    try:
        words = ["--set", f"teacher.cache={caches['fp32']}", "--set", "run.name=refused"]
        done = launch("launch/train.py", "--recipe", str(recipe), *words, num_ranks=1)
    finally:
        for path, text in zip(paths, before, strict=True):
            path.write_text(text)
    assert done.returncode == 2
    assert re.search(r"tokenizer_sha256': '\w+'.* there, .*tokenizer_sha256': '\w+'", done.stderr)


def test_what_differs_is_an_error_that_names_both(launch, recipe, caches, tmp_path: Path):
    def refusal(*pairs: str, kind: str = "fp32") -> str:
        settings = (f"teacher.cache={caches[kind]}", "run.name=refused", *pairs)
        words = [w for pair in settings for w in ("--set", pair)]
        done = launch("launch/train.py", "--recipe", str(recipe), *words, num_ranks=1)
        assert done.returncode == 2, done.stderr[-2000:]
        return done.stderr

    said = refusal("loss.temperature=2.0", kind="top_k")
    assert "was filled at temperature 1.0, but loss.temperature = 2.0" in said
    other = tmp_path / "teacher"
    shutil.copytree(recipe.parent / "student", other)
    said = refusal(f"teacher.model={other}")
    assert "is the cache of another teacher" in said
    assert f"'{recipe.parent}/teacher'" in said
    assert f"'{other}'" in said
    done = fill(launch, recipe, caches["bf16"], "--dtype", "int8", num_ranks=1)
    assert done.returncode == 2
    assert (
        "{'dtype': 'bf16', 'group': 32} there, {'dtype': 'int8', 'group': 32} here" in done.stderr
    )


def test_a_window_that_a_cache_cannot_serve_is_refused_with_the_reason():
    settings = ["truncation.window=tail", "teacher.cache=/nowhere"]
    with pytest.raises(UserError, match='truncation.window = "tail" with window_context = "drop"'):
        load_recipe("tiny_trunc50", settings)
    load_recipe("tiny_trunc50", [*settings, "truncation.window_context=keep"])


def test_a_cache_that_is_not_there_is_named_by_check(recipe: Path):
    script = [ROOT / "launch" / "train.py", "--recipe", str(recipe), "--check"]
    done = forked.run([*script, "--set", "teacher.cache=/nowhere"], cwd=recipe.parent, timeout=60)
    assert done.returncode == 2
    assert "teacher.cache = '/nowhere': no such cache: fill it with launch/cache.py" in done.stderr


def test_a_filler_that_is_killed_goes_on_and_keeps_what_it_had(
    launch, recipe, caches, tmp_path: Path
):
    folder = tmp_path / "cache"
    options = ["--recipe", str(recipe), "--output", str(folder), "--dtype", "fp32"]
    # One row a shard, and a pause after each: the kill lands among them
    script = tmp_path / "slow_fill.py"
    script.write_text(
        "import sys, time\n"
        "from kd.cache.store import ShardWriter\n"
        "flush = ShardWriter.flush\n"
        "ShardWriter.flush = lambda self: (flush(self), time.sleep(0.05))\n"
        "from kd.distributed.interruption import Interruption\n"
        "from kd.cache.kinds import HiddenKind\n"
        "from kd.recipe import load_recipe\n"
        "from kd.training.fill_cache import fill_cache\n"
        "from pathlib import Path\n"
        f"fill_cache(load_recipe({str(recipe)!r}), HiddenKind('fp32'), Path({str(folder)!r}),\n"
        "    Interruption(), shard_bytes=1)\n"
    )
    filler = subprocess.Popen(
        launcher_command(str(script)), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 120
    while len(list(folder.glob("shards/*.json"))) < 6:
        assert filler.poll() is None, filler.stderr.read().decode()[-3000:]
        assert time.monotonic() < deadline, "no shard was written"
        time.sleep(0.01)
    for process in psutil.Process(filler.pid).children(recursive=True):
        if process.is_running() and process.environ().get("RANK") in ("0", "1"):
            os.kill(process.pid, signal.SIGKILL)
    filler.communicate(timeout=60)
    left = {path: path.read_bytes() for path in folder.glob("shards/*.safetensors")}
    whole = {path for path in left if path.with_suffix(".json").exists()}
    assert 6 <= len(whole) < 80
    done = launch("launch/cache.py", *options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(path.read_bytes() == left[path] for path in whole)
    again, expected = open_cache(folder), open_cache(caches["fp32"])
    assert len(again) == len(expected)
    assert again._rows.keys() == expected._rows.keys()


def test_a_damaged_shard_is_named_by_verify_and_filled_alone(
    launch, recipe, caches, tmp_path: Path
):
    folder = tmp_path / "cache"
    shutil.copytree(caches["bf16"], folder)
    first, second = sorted((folder / "shards").glob("*.safetensors"))
    content = bytearray(first.read_bytes())
    content[len(content) // 2] ^= 1
    first.write_bytes(content)
    untouched = second.read_bytes()
    done = fill(launch, recipe, folder, "--verify", num_ranks=1)
    assert done.returncode == 2
    assert f"{first}: its SHA-256 differs" in done.stderr
    done = fill(launch, recipe, folder, "--dtype", "bf16")
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{first} is damaged" in done.stderr
    assert second.read_bytes() == untouched
    assert fill(launch, recipe, folder, "--verify", num_ranks=1).returncode == 0
    assert len(open_cache(folder)) == len(open_cache(caches["bf16"]))


def test_a_cache_of_tokens_needs_nothing_of_the_teacher_but_its_name_and_tokenizer(
    launch, recipe, caches
):
    weights = recipe.parent / "teacher" / "model.safetensors"
    weights.rename(weights.with_suffix(".away"))
    try:
        run = train(launch, recipe, "no_weights", f"teacher.cache={caches['top_k']}")
        words = ["--set", f"teacher.cache={caches['fp32']}", "--set", "run.name=refused"]
        done = launch("launch/train.py", "--recipe", str(recipe), *words, num_ranks=1)
    finally:
        weights.with_suffix(".away").rename(weights)
    assert losses(run) == losses(recipe.parent / "runs" / "kind_top_k")
    assert done.returncode == 2
    assert "no weights in" in done.stderr
