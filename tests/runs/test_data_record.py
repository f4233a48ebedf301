"""data.json: a run goes on with the data that it began with, and with no other."""

import json
from pathlib import Path

import pytest

from kd.errors import UserError
from kd.recipe import DS_CONFIGS_DIR, load_recipe
from kd.runs.folder import check_same_run, record_data

TODAY = {1: "lengths", 2: "tokens"}


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"format_version": 2, "step": 1}) + "\n")
    return tmp_path


def test_other_tokens_are_refused_although_the_lengths_are_the_same(begun: Path) -> None:
    (begun / "data.json").write_text(
        json.dumps({"format_version": 2, "fingerprint": "tokens", "report": "report"})
    )
    record_data(begun, "report", TODAY)
    with pytest.raises(UserError, match="was started with other data"):
        record_data(begun, "report", {1: "lengths", 2: "others"})
    assert json.loads((begun / "data.json").read_text()) == {
        "format_version": 2,
        "fingerprint": "tokens",
        "report": "report",
    }


@pytest.mark.parametrize(("lengths", "goes_on"), [("lengths", True), ("others", False)])
def test_a_run_from_before_tokens_were_hashed_is_continued_by_its_lengths(
    begun: Path, lengths: str, goes_on: bool
) -> None:
    (begun / "data.json").write_text(json.dumps({"fingerprint": lengths, "report": "old"}))
    if goes_on:
        record_data(begun, "report", TODAY)
        assert json.loads((begun / "data.json").read_text())["fingerprint"] == "tokens"
    else:
        with pytest.raises(UserError, match="there:\nold\nhere:\nreport"):
            record_data(begun, "report", TODAY)


def test_a_run_from_before_a_key_was_there_is_the_same_run_with_its_default(
    tmp_path: Path,
) -> None:
    recipe = load_recipe("tiny_trunc50", [f"run.output_dir={tmp_path}"])
    recipe.run_dir.mkdir()
    (recipe.run_dir / "metrics.jsonl").write_text(json.dumps({"format_version": 2, "step": 1}))
    content = recipe.as_file()
    del content["data"]["date"], content["data"]["template_kwargs"]
    (recipe.run_dir / "recipe.json").write_text(json.dumps(content))
    ds_config = (DS_CONFIGS_DIR / "zero3_cpu.json").read_text()
    both = {role: json.loads(ds_config) for role in ("student", "teacher")}
    (recipe.run_dir / "ds_config.json").write_text(json.dumps(both))
    check_same_run(recipe)
    with pytest.raises(UserError, match=r"data\.date: '2024-07-26' there, '2025-01-01' here"):
        check_same_run(recipe.with_values({"data.date": "2025-01-01"}))
