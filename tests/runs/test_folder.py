"""A run that is continued: what it left is whole, or one error names the file and the field."""

import json
from pathlib import Path

import pytest

from kd.engine.ds_config import read_ds_config
from kd.errors import UserError
from kd.files import write_json
from kd.recipe import Recipe, load_recipe
from kd.runs.folder import check_same_run, record_data

STEP = {
    "step": 1,
    "loss": 1.0,
    "step_ms": 1.0,
    "peak_memory_gib": 1.0,
    "num_input_tokens": 2,
    "num_supervised_tokens": 1,
}


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """Whose folder holds a run of one step."""
    recipe = load_recipe("tiny_trunc50", [f"run.output_dir={tmp_path}"])
    write_json(recipe.run_dir / "recipe.json", recipe.as_file())
    engines = {role: read_ds_config(recipe, role) for role in ("student", "teacher")}
    write_json(recipe.run_dir / "ds_config.json", engines)
    write_json(recipe.run_dir / "data.json", {"fingerprint": "f", "report": "r"})
    (recipe.run_dir / "metrics.jsonl").write_text(json.dumps(STEP) + "\n" + '{"step": 2, "lo')
    return recipe


def check_same_data(recipe: Recipe) -> None:
    record_data(recipe.run_dir, "r", {1: "f", 2: "t"})


def test_a_whole_run_goes_on_and_its_torn_last_line_is_left_out(recipe):
    check_same_run(recipe)
    record_data(recipe.run_dir, "r", {1: "f", 2: "t"})
    with pytest.raises(UserError, match="was started with other data"):
        record_data(recipe.run_dir, "r", {1: "g", 2: "u"})


@pytest.mark.parametrize("file", ["recipe.json", "ds_config.json", "data.json"])
@pytest.mark.parametrize("how", ["cut", "gone", "empty", "list", "binary", "nan"])
def test_a_damaged_file_of_a_begun_run_is_one_error_and_stays_as_it_is(recipe, file, how):
    path = recipe.run_dir / file
    content = path.read_bytes()
    damaged = {
        "cut": content[: len(content) // 2],
        "gone": None,
        "empty": b"",
        "list": b"[1]",
        "binary": b"\xff\xfe\x00",
        "nan": content.replace(b"{", b'{"x": NaN, ', 1),
    }[how]
    if damaged is None:
        path.unlink()
    else:
        path.write_bytes(damaged)
    check = check_same_run if file != "data.json" else check_same_data
    with pytest.raises(UserError, match=f"{file}: .*: restore it, or start another run"):
        check(recipe)
    assert (path.read_bytes() if path.exists() else None) == damaged


@pytest.mark.parametrize("line", ["garbage", "[]", "{}", '{"step": -1}', '{"step": "1"}', "\0\0"])
def test_a_first_line_of_metrics_that_is_no_step_is_named(recipe, line):
    path = recipe.run_dir / "metrics.jsonl"
    path.write_text(f"{line}\n{path.read_text()}")
    with pytest.raises(UserError, match="metrics.jsonl: line 1: "):
        check_same_run(recipe)


@pytest.mark.parametrize(
    ("section", "value"), [("run", 5), ("monitor", "x"), ("student", []), ("loss", 1.5)]
)
def test_a_section_of_another_type_is_named(recipe, section, value):
    path = recipe.run_dir / "recipe.json"
    write_json(path, recipe.as_file() | {section: value})
    with pytest.raises(UserError, match=f"recipe.json: {section}"):
        check_same_run(recipe)
