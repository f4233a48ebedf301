"""A checkpoint of two ranks gives back what was saved, also to an engine that has trained on; one
that is damaged or foreign is not loaded.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from checkpoint_worker import ENGINES
from tiny import save_tiny_model

from kd.engine.checkpoint import MANIFEST, read_manifest
from kd.engine.pickles import DEEPSPEED_GLOBALS
from kd.errors import UserError
from kd.training.decisions import Progress

STAGES = [f"stage {stage} {dtype}{kind}" for stage, dtype, kind in ENGINES]
RIGHT: dict[str, Any] = {
    "step": 4,
    "world_size": 2,
    "state": {"step": 4, "num_skipped": 0, "best_step": 2, "best_loss": 1.5},
    "files": {"a.pt": {"bytes": 10, "sha256": "0" * 64}},
}


@pytest.fixture(scope="module")
def results(launch, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("checkpoints")
    save_tiny_model(folder / "tied", seed=1)
    output = folder / "results.json"
    done = launch("tests/engine/checkpoint_worker.py", str(folder), str(output))
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(output.read_text()) | {"was run": (folder / "was_run").exists()}


@pytest.mark.dist
@pytest.mark.parametrize("stage", STAGES)
def test_a_checkpoint_gives_back_weights_optimizer_and_state(results, stage):
    cases = {case: result for case, result in results.items() if case.startswith(f"{stage}: t")}
    assert len(cases) == 4
    assert all(cases.values()), cases


@pytest.mark.dist
@pytest.mark.parametrize("stage", ["stage 2 bf16", "stage 3 fp32"])
def test_a_checkpoint_holds_what_is_trained_alone(results, stage):
    whole, adapters, head = (
        results[f"{stage}{kind}: bytes"] for kind in ("", ", adapters", ", frozen head")
    )
    # The model has 20,672 weights, its adapters 3,712, its tied head 5,120
    assert adapters < 0.6 * whole
    assert head < 0.9 * whole


@pytest.mark.dist
def test_checkpoints_name_what_the_list_of_deepspeed_has_and_nothing_else(results):
    names = {stage: set(results[f"{stage}: names"]) for stage in STAGES}
    assert set.union(*names.values()) == DEEPSPEED_GLOBALS
    assert results["universal: files"] > 50
    assert set(results["universal: names"]) <= DEEPSPEED_GLOBALS


@pytest.mark.dist
def test_a_foreign_pickle_is_refused_by_name_and_not_run_though_its_manifest_matches(results):
    for message in results["refused"]["foreign"]:
        assert "step_4/mp_rank_00_model_states.pt names posix.system, which" in message
    assert not results["was run"]


@pytest.mark.dist
@pytest.mark.parametrize("case", ["random_state", "no_random_state"])
def test_a_random_state_that_is_none_is_one_error_on_every_rank(results, case):
    first, second = results["refused"][case]
    assert first == second
    assert "step_4/rng_rank1.safetensors: it holds no random state" in first


@pytest.mark.dist
def test_a_checkpoint_whose_manifest_is_damaged_is_passed_over(results):
    assert results["refused"]["negative_step"] == ["{'note': 'two steps'} of step_2"] * 2


def read(folder: Path, content: object) -> Any:
    (folder / MANIFEST).write_text(content if isinstance(content, str) else json.dumps(content))
    return read_manifest(folder, Progress)


def test_a_manifest_is_read_with_the_types_of_the_loop(tmp_path):
    manifest = read(tmp_path, RIGHT)
    assert manifest.state == Progress(4, 0, 2, 1.5)
    assert manifest.files["a.pt"].bytes == 10


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"step": -4}, "step = -4"),
        ({"step": 4.0}, "step = 4.0"),
        ({"step": True}, "step = True"),
        ({"world_size": "2"}, "world_size = '2'"),
        ({"world_size": 0}, "world_size = 0"),
        ({"files": 7}, "files = 7"),
        ({"files": {}}, "files = {}"),
        ({"files": {"a.pt": 10}}, "files.a.pt = 10"),
        ({"files": {"a.pt": {"bytes": -1, "sha256": "0" * 64}}}, "files.a.pt.bytes = -1"),
        ({"files": {"a.pt": {"bytes": 1, "sha256": "x"}}}, "files.a.pt.sha256 = 'x'"),
        ({"state": 5}, "state = 5"),
        ({"state": None}, "state = None"),
        ({"state": {"step": "4"}}, "step = '4'"),
        ({"state": {"step": 4, "best_step": -1}}, "best_step = -1"),
        ({"state": {"step": 4, "foreign": 1}}, "foreign = 1"),
        ({"state": {}}, "step = 4, state.step = 0"),
        ({"state": {"step": 6}}, "step = 4, state.step = 6"),
        ({"more": 1}, "more = 1"),
    ],
)
def test_a_damaged_manifest_is_named_with_the_key_and_its_value(tmp_path, changes, problem):
    with pytest.raises(UserError) as error:
        read(tmp_path, RIGHT | changes)
    assert str(error.value).startswith(f"{tmp_path}: its manifest.json is damaged: {problem}")


@pytest.mark.parametrize("key", RIGHT)
def test_a_manifest_without_one_of_its_keys_is_damaged(tmp_path, key):
    with pytest.raises(UserError, match=f"is damaged: {key} = "):
        read(tmp_path, {name: value for name, value in RIGHT.items() if name != key})


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(RIGHT)[:-20],
        "[]",
        "\x00",
        "[" * 100_000,
        json.dumps(RIGHT).replace("1.5", "NaN"),
        json.dumps(RIGHT).replace("1.5", "1e999"),
        json.dumps(RIGHT).replace("4", "9" * 5000, 1),
    ],
    ids=["half", "list", "nul", "deep", "nan", "infinite", "digits"],
)
def test_a_manifest_that_is_no_json_or_half_of_one_is_damaged(tmp_path, text):
    with pytest.raises(UserError, match=r"its manifest\.json is damaged"):
        read(tmp_path, text)


def test_a_folder_without_a_manifest_is_no_checkpoint(tmp_path):
    with pytest.raises(UserError, match=r"not a checkpoint \(no manifest\.json\)"):
        read_manifest(tmp_path, Progress)
