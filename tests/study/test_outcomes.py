"""What a job writes of a cell into study.json, from the cell's folder."""

import json
from pathlib import Path

import pytest

from kd.recipe import load_recipe
from kd.study.cells import Axes, make_study, write_study
from kd.study.outcomes import record_outcome


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The first of two cells."""
    overrides = [f"run.output_dir={tmp_path}", "evaluation.path=problems.jsonl"]
    study = make_study("tiny_trunc50", overrides, Axes(keep_fraction=(0.5, 1.0)))
    write_study(study)
    return study.cells[0].recipe.run_dir


def outcomes(run: Path) -> list[str]:
    content = json.loads((run.parent / "study.json").read_text())
    return [f"{cell['status']}: {cell['text']}" for cell in content["cells"]]


def test_each_end_of_a_cell_is_told_from_its_folder(run: Path) -> None:
    assert record_outcome(run)
    assert outcomes(run)[0].startswith("failed: see the log of its job")
    run.mkdir()
    (run / "SUCCESS").write_text("{}")
    record_outcome(run)
    assert outcomes(run) == ["pending: trained but not scored yet", "pending: "]
    (run / "SUCCESS").unlink()
    (run / "NOTHING_TO_LEARN").write_text("no token is supervised\n")
    record_outcome(run)
    assert outcomes(run) == ["no_supervised_token: no token is supervised", "pending: "]


def test_a_run_of_no_study_is_left_alone(run: Path, tmp_path: Path) -> None:
    assert not record_outcome(tmp_path / "alone" / "run")
    before = (run.parent / "study.json").read_bytes()
    assert not record_outcome(run.with_name("not a cell of it"))
    assert (run.parent / "study.json").read_bytes() == before
    assert load_recipe(str(run.parent / "recipes" / f"{run.name}.json")).run.name == run.name
