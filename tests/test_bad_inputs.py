"""Whatever comes in, a command ends with status 0 or with one message without a stack, and leaves
no half-written file. Commands are called in this process.
"""

import importlib.util
import json
import os
import string
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from report.run_folders import write_run, write_study
from tiny import ROOT

from kd.errors import UserError
from kd.recipe import Recipe, key_facts, load_recipe
from kd.report.read_runs import read_runs
from kd.runs.folder import check_same_run

pytestmark = pytest.mark.slow

RECIPE = "qwen7b_to_1p5b_trunc50"
DEEP = "[" * 100_000
DIGITS = "9" * 5000


def script(name: str) -> ModuleType:
    specification = importlib.util.spec_from_file_location(
        f"{name}_command", ROOT / "launch" / f"{name}.py"
    )
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def call(name: str, *arguments: str) -> str | None:
    """The message of a command that refused its input; None when it ended well."""
    before = sys.argv
    sys.argv = [f"{name}.py", *arguments]
    try:
        script(name).main()
    except UserError as error:
        return str(error)
    finally:
        sys.argv = before
    return None


def refused(message: str | None, part: str, folder: Path) -> None:
    assert message is not None, "it was accepted"
    assert part in message
    assert len(message) < 3000
    assert not list(folder.rglob("*.partial"))


# A recipe: what its file holds, and what the message must name.
RECIPES: dict[str, tuple[str | bytes, str]] = {
    "not UTF-8": (b'base = "tiny\xff"', "line 1"),
    "digits": (f'base = "tiny"\n[training]\nmax_steps = {DIGITS}', "mine.toml"),
    "hex digits": (f'base = "tiny"\n[training]\nmax_steps = 0x{"f" * 5000}', "max_steps"),
    "deep": (f"base = {DEEP}", "mine.toml"),
    "torn": ('base = "tiny"\n[run', "mine.toml"),
    "twice": ('base = "tiny"\n[run]\nseed = 1\nseed = 2', "seed"),
    "base of 5,000": (f'base = "{"b" * 5000}"', "base"),
    "base a number": ("base = 5", "base"),
    "base a list": ('base = ["tiny"]', "base"),
    "base a way out": ('base = "../tiny_trunc50/.."', "base"),
    "a date": ('base = "tiny"\n[training]\nmax_steps = 2020-01-01', "max_steps"),
    "a table": ('base = "tiny"\n[training.max_steps]\na = 1', "max_steps"),
    "tables": ('base = "tiny"\n[[training]]\nmax_steps = 1', "training"),
    "nothing": ("", "student"),
    "nul": (b"base = \x00", "mine.toml"),
}
# An override: section.key=value; the message must name the key.
OVERRIDES = [
    *[f"run.name={name}" for name in ("..", "../../x", "/etc/x", "-rf", "a/b", "'a\nb'")],
    *[f"run.name={name}" for name in ('"a\\u0000"', "x" * 300, '" "', "[1]", "true", "0")],
    *[f"run.seed={value}" for value in ("-1", str(10**23), "1.0", "true", '"1"', DIGITS)],
    *[f"data.split_seed={value}" for value in ("-1", "nan", "{}")],
    *[f"run.watchdog_minutes={value}" for value in ("1e300", "-1", "inf", "nan", "0")],
    *[f"training.learning_rate={value}" for value in ("1e300", "nan", "true", '"1e-4"')],
    *[f"training.max_steps={value}" for value in (str(10**30), "0", "4.0", "[4]", "{a=1}")],
    *[f"training.global_batch_size={value}" for value in (str(10**18), "0", "1.5")],
    *[f"training.epochs={value}" for value in (str(10**30), "-1")],
    *[f'{key}=""' for key in ("student.model", "data.path", "data.end_token", "data.cache_dir")],
    f"student.model={'m' * 5000}",
    f"teacher.model={'a/' * 3000}",
    "data.chat_template=nowhere.jinja",
    "deepspeed.student=nowhere.json",
    f"deepspeed.student={'d' * 300}",
    "data.loss_sections=cot",
    "data.loss_sections=[[]]",
    "loss.chunk_size=0",
    "truncation.keep_fraction=1.0000001",
    f"run.output_dir={__file__}",
    f"run.output_dir={__file__}/below",
    "loss=5",
    "loss.=5",
    "=",
    f"{'k' * 5000}=1",
]


@pytest.mark.parametrize("name", RECIPES)
def test_a_bad_recipe_is_one_message(tmp_path, name):
    content, part = RECIPES[name]
    path = tmp_path / "mine.toml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(call("train", "--recipe", str(path), "--check"), part, tmp_path)


@pytest.mark.parametrize("override", OVERRIDES, ids=lambda override: repr(override[:40]))
def test_a_bad_override_is_one_message_that_names_it(tmp_path, override):
    part = override.partition("=")[0][:50]
    refused(call("train", "--recipe", RECIPE, "--check", "--set", override), part, tmp_path)


@pytest.mark.parametrize("label", ["", "..", "-rf", "x" * 300])
def test_a_label_that_is_no_plain_name_is_refused(label):
    check_labels = script("evaluate").check_labels
    with pytest.raises(UserError, match="--label = .*give --model m a --label"):
        check_labels(["m"], [label])
    assert check_labels(["runs/a/export/best"], []) == ["export-best"]


class Damage(NamedTuple):
    """To a file of a run, and what the reason must name."""

    file: str
    content: bytes | Callable[[Path], None]
    part: str


DAMAGES = {
    "recipe cut": Damage("recipe.json", b'{"run": {"na', "recipe.json"),
    "recipe deep": Damage("recipe.json", DEEP.encode(), "nested"),
    "recipe a list": Damage("recipe.json", b"[]", "recipe.json"),
    "recipe not UTF-8": Damage("recipe.json", b'{"\xff": 1}', "UTF-8"),
    "recipe digits": Damage("recipe.json", f'{{"run": {DIGITS}}}'.encode(), "recipe.json"),
    "metrics garbage": Damage("metrics.jsonl", b"garbage\n", "line 1"),
    "metrics NaN": Damage("metrics.jsonl", b'{"step": 1, "loss": NaN}\n', "NaN"),
    "metrics a pipe": Damage("metrics.jsonl", os.mkfifo, "metrics.jsonl"),
    "metrics a loop": Damage("metrics.jsonl", lambda p: os.symlink(p, p), "metrics.jsonl"),
    "data half": Damage("data.json", b'{"fingerprint": "a"', "data.json"),
    "data a pipe": Damage("data.json", os.mkfifo, "data.json"),
    "environment a list": Damage("environment.json", b"[]", "environment.json"),
    "evaluation infinite": Damage("evaluation/a.json", b'{"label": Infinity}', "a.json"),
    "evaluation a folder": Damage("evaluation/b.json", os.mkdir, "b.json"),
}


@pytest.fixture(scope="module")
def damaged_report(tmp_path_factory) -> dict[str, Any]:
    """Of one whole run and one run of each damage: report.json, made by the command."""
    folder = tmp_path_factory.mktemp("damaged")
    write_run(folder / "runs" / "whole", num_correct=5)
    for name, damage in DAMAGES.items():
        path = write_run(folder / "runs" / name, num_correct=5) / damage.file
        path.unlink(missing_ok=True)
        if callable(damage.content):
            damage.content(path)
        else:
            path.write_bytes(damage.content)
    (folder / "runs" / "study.json").write_text('{"cells": 7}')
    assert call("report", str(folder / "runs"), "-o", str(folder / "report")) is None
    assert not list(folder.rglob("*.partial"))
    page = (folder / "report" / "index.html").read_text()
    assert all(name in page for name in DAMAGES)
    found: dict[str, Any] = json.loads((folder / "report" / "report.json").read_text())
    return found


@pytest.mark.parametrize("name", DAMAGES)
def test_a_report_names_a_damaged_run_and_leaves_it_out(damaged_report, name):
    assert [run["name"] for run in damaged_report["runs"]] == ["whole"]
    (reason,) = [row["reason"] for row in damaged_report["left_out"] if row["name"] == name]
    assert DAMAGES[name].part in reason


quickly = settings(
    deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
KEYS = sorted(key_facts())
numbers = st.integers() | st.floats() | st.integers(10**20, 10**40)
scalars = st.none() | st.booleans() | numbers | st.text(max_size=9)
values = st.recursive(
    scalars,
    lambda part: st.lists(part, max_size=3) | st.dictionaries(st.text(max_size=5), part),
    max_leaves=6,
)


def loaded(name: str, *overrides: str) -> tuple[Recipe | None, str]:
    """The recipe, or the message that refuses it."""
    try:
        return load_recipe(name, overrides), ""
    except UserError as error:
        return None, str(error)


@quickly
@given(st.sampled_from(KEYS), st.text(max_size=30) | values.map(str))
def test_any_override_is_taken_or_refused_in_one_message(key, text):
    recipe, message = loaded(RECIPE, f"{key}={text}")
    assert len(message) < 3000
    assert recipe is None or Recipe.model_validate_json(recipe.model_dump_json()) == recipe


@quickly
@given(st.binary(max_size=60) | st.text(string.printable, max_size=60).map(str.encode))
def test_any_file_is_a_recipe_or_one_message(tmp_path, content):
    path = tmp_path / "mine.toml"
    path.write_bytes(b'base = "tiny"\n' + content)
    recipe, message = loaded(str(path))
    assert recipe is not None or "mine.toml" in message


def paths_of(value: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else ()
    return [prefix, *[path for key, part in inner for path in paths_of(part, (*prefix, key))]]


def with_value(content: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    return {**content, path[0]: with_value(content[path[0]], path[1:], value)}


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory) -> Path:
    study = write_study(tmp_path_factory.mktemp("whole") / "tiny")
    return next(path for path in study.iterdir() if (path / "SUCCESS").exists())


@settings(quickly, max_examples=400)
@given(st.data())
def test_a_run_with_any_value_in_any_field_is_read_or_named(whole_run, data):
    file = data.draw(st.sampled_from(["recipe.json", "metrics.jsonl", "environment.json"]))
    path = whole_run / file
    before = path.read_text()
    first, newline, rest = before.partition("\n" if file.endswith("l") else "\0")
    content = json.loads(first)
    place = data.draw(st.sampled_from(paths_of(content)))
    try:
        changed = json.dumps(with_value(content, place, data.draw(values)))
        path.write_text(changed + newline + rest)
        runs, _, damaged = read_runs([whole_run])
        assert len(runs) + len(damaged) == 1
        assert all(file in reason for _, _, reason in damaged)
    finally:
        path.write_text(before)


@quickly
@given(st.binary(max_size=40))
def test_any_bytes_in_a_run_that_is_continued_are_one_message(tmp_path, content):
    recipe = load_recipe("tiny_trunc50", [f"run.output_dir={tmp_path}"])
    recipe.run_dir.mkdir(exist_ok=True)
    (recipe.run_dir / "metrics.jsonl").write_bytes(b"\n")
    (recipe.run_dir / "recipe.json").write_bytes(content)
    with pytest.raises(UserError, match=r"recipe\.json"):
        check_same_run(recipe)


# What other parts of the project refuse: the JSON of an engine, and rows of data.
ENGINES = {
    "not UTF-8": b'{"zero_optimization": "\xff"}',
    "deep": DEEP.encode(),
    "digits": f'{{"zero_optimization": {{"stage": {DIGITS}}}}}'.encode(),
    "a list": b"[]",
    "unknown key": b'{"zero_optimization": {"stage": 3}, "zero_optimisation": {}}',
    "duplicate key": b'{"zero_optimization": {"stage": 3}, "zero_optimization": {"stage": 3}}',
    "offload a string": b'{"zero_optimization": {"stage": 3, "offload_optimizer": "cpu"}}',
    "stage 3.0": b'{"zero_optimization": {"stage": 3.0}}',
    "bf16 a string": b'{"zero_optimization": {"stage": 3}, "bf16": {"enabled": "true"}}',
    "NaN": b'{"zero_optimization": {"stage": 3, "reduce_bucket_size": NaN}}',
    "negative bucket": b'{"zero_optimization": {"stage": 3, "reduce_bucket_size": -1}}',
    "hpz true": b'{"zero_optimization": {"stage": 3, "zero_hpz_partition_size": true}}',
    "amp": b'{"zero_optimization": {"stage": 3}, "amp": {"enabled": true}}',
    "elasticity": b'{"zero_optimization": {"stage": 3}, "elasticity": {"enabled": true}}',
}
ROWS = {
    "rows not UTF-8": b'{"messages": "\xff"}\n',
    "rows deep": f'{{"messages": {DEEP}\n'.encode(),
    "rows digits": f'{{"messages": {DIGITS}}}\n'.encode(),
    "rows garbage": b"garbage\n",
    "a number": b"5\n",
    "empty": b"",
    "other columns": b'{"a": 1}\n',
}
PENDING: set[str] = set()


@pytest.mark.parametrize("name", [name for name in ENGINES if name not in PENDING])
def test_a_bad_json_of_an_engine_is_one_message(tmp_path, name):
    path = tmp_path / "engine.json"
    path.write_bytes(ENGINES[name])
    arguments = ["--recipe", RECIPE, "--check", "--set", f"deepspeed.student={path}"]
    refused(call("train", *arguments), "engine.json", tmp_path)


@pytest.mark.parametrize("name", [name for name in ROWS if name not in PENDING])
def test_bad_rows_are_one_message(tmp_path, name):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(ROWS[name])
    changes = {"data.path": path, "data.cache_dir": tmp_path / "cache", "run.output_dir": tmp_path}
    overrides = [f"--set={key}={value}" for key, value in changes.items()]
    refused(call("audit", "--recipe", "tiny_trunc50", *overrides), "rows.jsonl", tmp_path)
