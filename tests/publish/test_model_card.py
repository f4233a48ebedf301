"""A card says what the run's files say, and states no licence that nobody gave."""

import json
from pathlib import Path
from typing import Any

import pytest
from publish.conftest import Export
from publish.hub_server import Hub
from report.run_folders import STUDENT, TEACHER, write_evaluation
from tiny import ROOT

from kd.errors import UserError
from kd.files import write_json
from kd.publish.licence import find_licence
from kd.publish.model_card import model_card, read_finished

MIT = {"license": "mit"}
STUDIED = ROOT / "benchmarks/results/study/tiny/keep0.5_prompt+cot+answer_head_seed0"


def rows(card: str) -> dict[str, list[str]]:
    """The first cell of a table's row -> the others."""
    cells = [line.strip("| ").split(" | ") for line in card.splitlines() if line.startswith("|")]
    return {first: others for first, *others in cells}


def change_recipe(run: Path, section: str, **values: Any) -> None:
    recipe = json.loads((run / "recipe.json").read_text())
    recipe[section] |= values
    write_json(run / "recipe.json", recipe)


def test_a_card_of_a_run_of_the_study_has_its_numbers_and_its_recipe():
    card = model_card(read_finished(STUDIED), "best", MIT)
    found = rows(card)
    scores = json.loads((STUDIED / "evaluation" / "export-best.json").read_text())
    low, high = scores["ci95"]
    task = scores["problems"]
    assert found["this model"][:3] == [task, f"{scores['accuracy']:.3f}", f"{low:.3f}-{high:.3f}"]
    assert found["teacher"][:2] == [task, "0.997"]
    assert found["student before training"][:2] == [task, "0.347"]
    steps = [json.loads(line) for line in (STUDIED / "metrics.jsonl").read_text().splitlines()]
    assert found["tokens read"] == [f"{sum(step['num_input_tokens'] for step in steps):,}"]
    assert found["tokens supervised"] == [
        f"{sum(step['num_supervised_tokens'] for step in steps):,}"
    ]
    assert found["training time, s"] == [f"{sum(step['step_ms'] for step in steps) / 1000:,.1f}"]
    assert "FLOPs of sampling" not in found, "nothing was sampled"
    assert found["0.5"][:3] == ["head", "no limit", "prompt+cot+answer"]
    environment = json.loads((STUDIED / "environment.json").read_text())
    assert f"at commit `{environment['commit']}`" in card
    assert f"torch {environment['packages']['torch']}" in card
    assert json.loads((STUDIED / "data.json").read_text())["report"] in card
    recipe = card.partition("```json\n")[2].partition("\n```")[0]
    assert json.loads(recipe) == json.loads((STUDIED / "recipe.json").read_text())
    assert "deepspeed launch/train.py --recipe recipe.json" in card


def test_a_card_says_what_its_own_export_scored_and_compares_like_with_like(run: Path):
    write_evaluation(run / "evaluation" / "last.json", "runs/student/export/last", num_correct=30)
    write_evaluation(run / "evaluation" / "teacher.json", TEACHER, num_correct=90)
    other = {"sampling": {"temperature": 1.0}}
    write_evaluation(run / "evaluation" / "base.json", STUDENT, num_correct=20, **other)
    finished = read_finished(run)
    best = rows(model_card(finished, "best", MIT))
    assert best["this model"][1] == "0.800"
    assert best["teacher"][1] == "0.900"
    assert "student before training" not in best, "it was sampled otherwise"
    assert rows(model_card(finished, "last", MIT))["this model"][1] == "0.300"
    (run / "evaluation" / "student-after.json").unlink()
    card = model_card(finished, "best", MIT)
    assert "Not evaluated: the run holds no score of export/best." in card
    assert "teacher" not in rows(card)


def test_a_card_names_models_and_data_by_hub_id_only_where_they_are_of_the_hub(run: Path):
    card = model_card(read_finished(run), "best", MIT)
    assert f"base_model: {STUDENT}\n" in card
    assert f"- teacher: [{TEACHER}](https://huggingface.co/{TEACHER})\n" in card
    assert "datasets:" not in card
    assert "- traces.jsonl (a local path)\n" in card
    change_recipe(run, "student", model=str(run / "export" / "best"))
    change_recipe(run, "data", source="openthoughts", path=None, revision="v1")
    card = model_card(read_finished(run), "best", MIT)
    assert "base_model:" not in card
    assert "datasets:\n- open-thoughts/OpenThoughts-114k\n" in card
    assert "datasets/open-thoughts/OpenThoughts-114k), revision v1\n" in card


def test_a_card_tells_of_adapters_gpus_steps_and_random_weights(run: Path):
    card = model_card(read_finished(run), "best", MIT)
    assert "`adapter/`" in card
    assert "LoRA" not in card
    assert "of step 2 of 2\n" in card
    change_recipe(run, "student", lora={"rank": 4, "alpha": 8.0}, init="random")
    write_json(run / "environment.json", {"gpus": ["H100", "H100"], "commit": "abc+"})
    write_json(run / "SUCCESS", {"step": 2, "best_step": 1})
    finished = read_finished(run)
    card = model_card(finished, "best", MIT)
    assert "LoRA of rank 4, alpha 8, merged into the weights" in card
    assert rows(card)["GPUs of rank 0's node"] == ["2 x H100"]
    assert "`abc+` (plus changes that are in no commit)" in card
    assert "of step 1 of 2\n" in card
    assert "of step 2 of 2\n" in model_card(finished, "last", MIT)
    assert "shape only, random weights" in card
    assert "base_model:" not in card


def test_a_licence_is_what_is_asked_or_what_the_base_model_states(tmp_path: Path):
    card = tmp_path / "README.md"
    card.write_text("---\nlicense: other\nlicense_name: qwen\nlicense_link: LICENSE\n---\n# Base\n")
    stated = {"license": "other", "license_name": "qwen", "license_link": "LICENSE"}
    assert find_licence(None, str(tmp_path), None) == stated
    assert find_licence("mit", str(tmp_path), None) == MIT
    assert find_licence("mit", None, None) == MIT


@pytest.mark.parametrize(
    "content", [None, "no metadata", "---\nlicense: [mit, gpl]\n---\n", "---\na: [\n---\n"]
)
def test_a_licence_that_is_not_stated_is_asked_for(tmp_path: Path, content: str | None):
    if content is not None:
        (tmp_path / "README.md").write_text(content)
    for model in (str(tmp_path), None):
        with pytest.raises(UserError, match="^--license is required: ") as caught:
            find_licence(None, model, None)
        assert "--license other" in str(caught.value)


def test_a_hub_that_does_not_know_the_base_model_is_no_licence(hub: Hub):
    assert find_licence(None, STUDENT, None) == MIT
    with pytest.raises(
        UserError, match="--license is required: the licence of .*'no/model' cannot be read"
    ):
        find_licence(None, "no/model", None)


def test_a_card_is_written_without_a_push_or_an_export(
    export: Export, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "new" / "card.md"
    export(STUDIED, "--card", path, "--license", "mit")
    assert path.read_text() == model_card(read_finished(STUDIED), "best", MIT)
    assert capsys.readouterr().out == f"{path}\n"
    with pytest.raises(UserError, match="--card = .*: cannot be written"):
        export(STUDIED, "--card", tmp_path, "--license", "mit")
    with pytest.raises(SystemExit):
        export(STUDIED, "--card", path, "--private")
    with pytest.raises(SystemExit):
        export(STUDIED, "--card", path, "--push", "me/student")
    assert "--private, --revision, --card-only and --dry-run need --push" in capsys.readouterr().err
