"""RUN/plan.json: a run of two ranks, planned beside measured."""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import layout_of, write_tiny_recipe

from kd.data.dataset import load_data
from kd.data.loader import Loader
from kd.data.step_plan import BatchShape
from kd.data.tokenizers import load_tokenizers
from kd.errors import UserError
from kd.plan.cost import pair_of
from kd.plan.gpus import GPUS, Site, find_gpu
from kd.recipe import Recipe, load_recipe
from kd.runs.records import read_metrics
from kd.training.plan_report import PlanReport, plan_training

NUM_STEPS = 8  # an epoch


@pytest.fixture(scope="module")
def run(launch, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    recipe = write_tiny_recipe(tmp_path_factory.mktemp("measured"))
    done = launch(
        "launch/train.py", "--recipe", str(recipe), "--set", f"training.max_steps={NUM_STEPS}"
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return recipe, done.stderr


@pytest.fixture(scope="module")
def report(run) -> dict[str, Any]:
    return json.loads((run[0].parent / "runs" / "tiny_test" / "plan.json").read_text())


@pytest.mark.dist
@pytest.mark.parametrize("name", ["teacher_weights_gib", "student_weights_gib", "optimizer_gib"])
def test_memory_of_a_rank_is_measured_as_planned(report, name: str):
    assert report["measured"][name] == pytest.approx(report["planned"][name], rel=0.05)
    assert report["measured"][name] > 0


@pytest.mark.dist
def test_flops_and_tokens_of_a_step_are_those_planned(run, report):
    records = read_metrics(run[0].parent / "runs" / "tiny_test" / "metrics.jsonl")
    measured, planned = report["measured"], report["planned"]
    # Planned: the mean of an epoch, which is the run; measured: without the first step.
    for name, key in {
        "flops_per_step": "flops",
        "num_input_tokens_per_step": "num_input_tokens",
    }.items():
        values = [record[key] for record in records]
        assert planned[name] == pytest.approx(sum(values) / NUM_STEPS)
        assert measured[name] == pytest.approx(sum(values[1:]) / (NUM_STEPS - 1))
    assert (measured["num_steps"], planned["num_steps"]) == (NUM_STEPS - 1, NUM_STEPS)
    assert measured["seconds_per_step"] > 0
    assert measured["peak_gib"] > 0
    # No GPU: its peak is not known.
    assert measured["mfu"] is planned["mfu"] is planned["seconds_per_step"] is None


@pytest.mark.dist
def test_flops_of_a_record_grow_with_its_tokens(run):
    recipe = load_recipe(str(run[0]))
    pair = pair_of(recipe)
    for record in read_metrics(run[0].parent / "runs" / "tiny_test" / "metrics.jsonl"):
        per_token = 2 * (3 * pair.student.num_active_weights + pair.teacher.num_active_weights)
        assert record["flops"] > per_token * record["num_input_tokens"]


@pytest.mark.dist
def test_the_log_says_what_is_planned_first_and_both_after_three_steps_and_at_the_end(run):
    planned = re.search(rf"plan +{NUM_STEPS} steps of ([\d,]+) tokens .* GiB at most", run[1])
    measured = r"measured +over (\d+) steps: .* ([\d.]+) tokens a step \(planned ([\d.]+)\)"
    found = re.findall(measured, run[1])
    assert [int(steps) for steps, *_ in found] == [2, NUM_STEPS - 1]
    for _, tokens, of_plan in found:
        assert float(of_plan) == pytest.approx(float(planned[1].replace(",", "")), abs=0.5)
        assert float(tokens) == pytest.approx(float(of_plan), rel=0.2)
    assert max(map(len, run[1].splitlines())) < 400


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return load_recipe(str(write_tiny_recipe(tmp_path)))


@pytest.fixture
def loader(recipe: Recipe) -> Loader:
    train = load_data(recipe, load_tokenizers(recipe)).train
    return Loader(train, BatchShape(8, 2), seed=0, pad_token_id=0)


@pytest.mark.parametrize(
    ("error", "has_stack"), [(UserError("of no shape"), False), (KeyError("of no shape"), True)]
)
def test_a_model_that_cannot_be_planned_does_not_end_a_run(
    recipe, loader, monkeypatch, caplog, error, has_stack
):
    def plan_nothing(*_: object, **__: object):
        raise error

    monkeypatch.setattr("kd.training.plan_report.plan_run", plan_nothing)
    assert plan_training(recipe, loader, [[0]]) is None
    assert "could not plan this run" in caplog.text
    assert "of no shape" in caplog.text
    assert ("Traceback" in caplog.text) is has_stack


@pytest.fixture
def on_h100(recipe: Recipe, loader: Loader) -> PlanReport:
    """Of two nodes of two ranks, where time and batches are stated and nothing is trained."""
    nodes = ((0, 1), (2, 3))
    plan = plan_training(recipe, loader, nodes)
    assert plan is not None
    optimizer = SimpleNamespace(optimizer=SimpleNamespace(state={}))
    student = SimpleNamespace(module=torch.nn.Linear(2, 2), optimizer=optimizer)
    report = PlanReport(plan, loader, [], student, replace(layout_of(0, 4), nodes=nodes))
    report._site = Site(GPUS["h100"], 2, 2)
    return report


def test_mfu_is_flops_a_second_of_all_ranks_over_their_peak(on_h100: PlanReport, tmp_path: Path):
    seconds_at_peak = 1e15 / (4 * 989e12)
    for seconds in (100.0, 2 * seconds_at_peak, 2 * seconds_at_peak):
        on_h100.add({"flops": 1e15, "num_input_tokens": 10, "step_ms": 1000 * seconds})
    report = json.loads((tmp_path / "runs" / "tiny_test" / "plan.json").read_text())
    # The first step warms up and is left out
    assert report["measured"]["mfu"] == pytest.approx(0.5)
    planned = report["planned"]
    assert planned["seconds_per_step"] == pytest.approx(
        planned["flops_per_step"] / (4 * 989e12 * planned["mfu"])
    )
    names = ("steps_share", "validation_share", "checkpoints_share")
    assert sum(planned[name] for name in names) == pytest.approx(1.0)


def test_a_disk_that_is_full_does_not_end_a_run_here(on_h100: PlanReport, monkeypatch, caplog):
    def refuse(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kd.training.plan_report.write_json", refuse)
    on_h100.add({"flops": 1e15, "num_input_tokens": 10, "step_ms": 1.0})
    on_h100.write()
    assert "No space left on device" in caplog.text


def test_a_gpu_is_known_by_the_name_that_cuda_gives_it():
    assert find_gpu("NVIDIA H100 80GB HBM3") is GPUS["h100"]
    assert find_gpu("NVIDIA H100 PCIe") is None
