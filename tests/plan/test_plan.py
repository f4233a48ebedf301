"""The memory plan, against what two ranks hold and write."""

import json
from pathlib import Path
from typing import Any

import pytest
from plan_worker import CASES, make_recipe

from kd.plan import memory_plan

pytestmark = pytest.mark.dist
GIB = 2**30


@pytest.fixture(scope="module")
def folder(launch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    zero = {"stage": 3, "reduce_bucket_size": 5_000_000}
    (folder / "zero3_fp32_default.json").write_text(json.dumps({"zero_optimization": zero}))
    done = launch("tests/plan/plan_worker.py", str(folder))
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("part", ["teacher_shard", "student_weights", "optimizer"])
@pytest.mark.parametrize("case", CASES)
def test_weights_and_optimizer_of_each_rank_are_planned_to_within_5_percent(
    folder, ranks, case: str, part: str
):
    plan = memory_plan(make_recipe(folder, case), num_nodes=1, gpus_per_node=2)
    for rank in ranks:
        assert getattr(plan.gib_per_rank, part) * GIB == pytest.approx(rank[case][part], rel=0.05)


@pytest.mark.parametrize("case", [case for case in CASES if "stage" not in case])
def test_gradients_of_each_rank_are_planned_to_within_5_percent(folder, ranks, case: str):
    plan = memory_plan(make_recipe(folder, case), num_nodes=1, gpus_per_node=2)
    assert plan.moment != "the optimizer's step", "gradients are held twice then"
    for rank in ranks:
        assert plan.gib_per_rank.gradients * GIB == pytest.approx(rank[case]["gradients"], rel=0.05)


def test_a_checkpoint_is_planned_to_within_5_percent(folder, ranks):
    for case in CASES:
        plan = memory_plan(make_recipe(folder, case), num_nodes=1, gpus_per_node=2)
        assert plan.checkpoint_gib * GIB == pytest.approx(ranks[0][case]["checkpoint"], rel=0.05), (
            case
        )


def test_models_that_are_partitioned_have_the_shapes_of_their_configurations(ranks):
    assert all(rank[case]["same_shapes"] for rank in ranks for case in CASES)
