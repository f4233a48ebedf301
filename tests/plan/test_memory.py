"""The memory plan of the shipped recipes: what each part is, and what would make a plan fit."""

import dataclasses
import re

import pytest

from kd.engine.ds_config import read_ds_config
from kd.plan import MemoryPlan, memory_plan, model_shapes
from kd.plan.memory import RESERVED_GIB, plan_filler
from kd.plan.rank_memory import _chunk_bytes
from kd.plan.zero_memory import ZeroEngine
from kd.recipe import RECIPES_DIR, Recipe, load_recipe

GIB = 2**30
STUDENT, TEACHER = 1_543_714_304, 7_615_616_512  # parameters of qwen7b_to_1p5b
PART_NAMES = [
    field.name
    for field in dataclasses.fields(memory_plan(load_recipe("tiny_trunc50")).gib_per_rank)
]


def plan_of(
    *overrides: str, nodes: int = 1, gpus: int = 8, recipe: str = "qwen7b_to_1p5b_trunc50"
) -> MemoryPlan:
    return memory_plan(load_recipe(recipe, overrides), nodes, gpus)


def test_states_of_zero3_are_divided_over_all_ranks():
    parts = plan_of(nodes=2).gib_per_rank
    assert parts.teacher_shard * GIB == pytest.approx(2 * TEACHER / 16, rel=0.01)
    assert parts.student_weights * GIB == pytest.approx(2 * STUDENT / 16, rel=0.01)
    assert parts.gradients * GIB == pytest.approx(4 * STUDENT / 16, rel=0.01)
    assert parts.optimizer * GIB == pytest.approx(12 * STUDENT / 16, rel=0.01)
    assert plan_of(nodes=2).total_gib == pytest.approx(
        sum(getattr(parts, name) for name in PART_NAMES)
    )


def test_stage_2_keeps_the_student_whole():
    parts = plan_of("deepspeed.student=zero2_bf16.json").gib_per_rank
    assert parts.student_weights * GIB == 2 * STUDENT
    assert parts.optimizer * GIB == pytest.approx(12 * STUDENT / 8, rel=0.01)


def test_an_offloaded_optimizer_is_on_the_host():
    plan = plan_of("deepspeed.student=zero3_bf16_offload.json")
    assert plan.gib_per_rank.optimizer == plan.gib_per_rank.gradients == 0
    assert plan.host_gib >= 16 * STUDENT / GIB


def test_a_teacher_of_a_node_is_divided_over_its_ranks_alone():
    world, node = plan_of(nodes=4), plan_of("teacher.shard=node", nodes=4)
    assert node.gib_per_rank.teacher_shard == pytest.approx(
        4 * world.gib_per_rank.teacher_shard, rel=0.01
    )
    assert node.gib_per_rank.student_weights == world.gib_per_rank.student_weights


def test_a_single_rank_gathers_nothing():
    plan = plan_of(gpus=1)
    assert plan.gib_per_rank.gathered == 0
    assert plan.received_gib_per_step == 0
    assert plan_of(gpus=2).gib_per_rank.gathered > 0


def test_activations_follow_the_tokens_that_are_kept_and_checkpointing():
    half, whole = plan_of(), plan_of(recipe="qwen7b_to_1p5b_trunc100")
    assert (half.num_tokens, whole.num_tokens) == (4096, 8192)
    for name in ("activations_whole_gib", "activations_checkpointed_gib"):
        assert getattr(whole, name) == pytest.approx(2 * getattr(half, name))
    assert half.activations_checkpointed_gib < half.activations_whole_gib / 10
    without = plan_of("student.gradient_checkpointing=false")
    difference = without.gib_per_rank.activations - half.gib_per_rank.activations
    assert difference == pytest.approx(
        half.activations_whole_gib - half.activations_checkpointed_gib
    )


def test_chunks_of_logits_stay_within_their_budget():
    recipe = "qwen3_8b_to_4b_trunc100"
    head = 4 * 151_936 * 2560 / GIB
    for logits_gib in (2.0, 5.0):
        planned = chunk_gib(load_recipe(recipe, [f"loss.logits_gib={logits_gib}"]))
        assert 0.9 * logits_gib < planned <= logits_gib
    small = plan_of("loss.chunk_size=128", recipe=recipe)
    # 128 rows of the student, and as many of the teacher at most: whichever moment takes most now,
    # it is less.
    assert small.gib_per_rank.loss < 2.0 + head


def chunk_gib(recipe: Recipe) -> float:
    engines = (
        ZeroEngine(
            model_shapes(getattr(recipe, role), role=role), read_ds_config(recipe, role), 8, None
        )
        for role in ("student", "teacher")
    )
    return _chunk_bytes(recipe.loss, *engines, num_tokens=2**16) / GIB


def test_a_whole_teacher_is_one_ranks_own_and_a_shared_ones_head_is_kept_whole():
    shared, whole = plan_of(), plan_of("teacher.shard=gpu")
    assert whole.gib_per_rank.teacher_shard == pytest.approx(2 * TEACHER / GIB, rel=0.01)
    assert shared.gib_per_rank.teacher_shard < whole.gib_per_rank.teacher_shard / 4
    heads = [plan.gib_per_rank.gathered for plan in (shared, whole)]
    assert heads[0] - heads[1] == pytest.approx(2 * 152_064 * 3584 / GIB, rel=0.01)


def test_a_cache_that_is_not_filled_yet_is_planned_as_hidden_states_that_leave_the_head():
    parts = plan_of("teacher.cache=/nowhere").gib_per_rank
    assert parts.teacher_shard * GIB == 2 * 152_064 * 3584


def test_what_fills_a_cache_holds_the_teacher_and_no_student():
    recipe = load_recipe("qwen7b_to_1p5b_trunc50")
    alone, shared = (plan_filler(recipe, 1, gpus, 8192, "hidden") for gpus in (1, 8))
    assert 2 * TEACHER / GIB < alone < 2 * TEACHER / GIB + 3
    assert 2 * TEACHER / 8 / GIB < shared < alone
    assert alone < plan_of(gpus=1).total_gib / 2
    head = 4 * 152_064 * 3584 / GIB  # in fp32, for logits
    assert plan_filler(recipe, 1, 1, 8192, "top_k") > alone + head
    assert plan_filler(recipe, 1, 1, 65536, "hidden") > alone + 1


def test_stage_1_holds_all_gradients_in_both_widths():
    plan = plan_of("deepspeed.student=zero1_bf16.json")
    assert plan.gib_per_rank.gradients == pytest.approx((4 + 2) * STUDENT / GIB, rel=0.01)


def test_checkpoints_are_counted_as_they_are_kept():
    two, five = plan_of(), plan_of("training.keep_last=5")
    assert two.checkpoint_gib == pytest.approx(12 * STUDENT / GIB, rel=0.01)
    assert five.disk_gib - two.disk_gib == pytest.approx(3 * two.checkpoint_gib)


def test_what_fits_has_no_verdict():
    plan = plan_of()
    assert plan.verdict(plan.total_gib + RESERVED_GIB) is None
    assert plan.verdict(plan.total_gib) is not None


@pytest.mark.parametrize(
    ("overrides", "gpus", "gpu_gib", "setting"),
    [
        (["student.gradient_checkpointing=false"], 8, 24, "student.gradient_checkpointing = true"),
        (["training.micro_batch_size=4"], 8, 16, "training.micro_batch_size = 1"),
        (["teacher.shard=node"], 2, 18, "deepspeed.student"),
        (
            ["student.model=Qwen/Qwen3-4B-Base", "deepspeed.student=zero2_bf16.json"],
            8,
            23,
            '"zero3_bf16.json"',
        ),
        ([], 1, 24, "nodes"),
    ],
)
def test_what_a_verdict_proposes_fits(
    overrides: list[str], gpus: int, gpu_gib: float, setting: str
):
    verdict = plan_of(*overrides, gpus=gpus).verdict(gpu_gib)
    assert verdict is not None
    proposed = verdict.partition(": use ")[2]
    assert setting in proposed
    nodes = re.search(r"(\d+) nodes", proposed)
    settings = [f"{key}={value}" for key, value in re.findall(r"(\w+\.\w+) = (\S+)", proposed)]
    assert (
        plan_of(*overrides, *settings, nodes=int(nodes[1]) if nodes else 1, gpus=gpus).verdict(
            gpu_gib
        )
        is None
    )


def test_what_can_never_fit_is_said_to():
    assert "use larger GPUs" in str(plan_of().verdict(4.0))


def test_every_shipped_recipe_has_a_plan():
    for path in RECIPES_DIR.glob("*.toml"):
        # A second stage, whose first is to be run
        if not load_recipe(path.stem).student.model.startswith("runs/"):
            assert memory_plan(load_recipe(path.stem)).total_gib > 0
