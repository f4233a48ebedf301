"""What a plan says of time: the arithmetic by hand, what bounds a step, and what does not shrink
with the length.
"""

import json

import pytest
from tiny import ROOT

from kd.plan.cost import RunPlan, plan_run
from kd.plan.gpus import GPUS, Site
from kd.plan.lengths import state_traces
from kd.plan.step_time import STUDENT_HOST_MS, TEACHER_HOST_MS, StepTime
from kd.recipe import load_recipe

H100 = Site(GPUS["h100"], 1, 8)


def plan_of(recipe: str, *settings: str, site: Site = H100, mean: int | None = None) -> RunPlan:
    loaded = load_recipe(recipe, settings)
    traces = state_traces(loaded, mean)
    lengths, steps = traces.read(loaded, site.num_gpus)
    sizes = {"num_nodes": site.num_nodes, "gpus_per_node": site.gpus_per_node}
    return plan_run(loaded, lengths, steps, traces.longest, **sizes)


def test_the_largest_part_counts_the_others_disturb_it_and_the_optimizer_comes_after():
    time = StepTime(compute=0.2, gathers=0.1, host=0.3, after=0.05)
    assert time.seconds == pytest.approx(0.3 + 0.1 * (0.2 + 0.1) + 0.05)
    assert time.bound == "host"


def test_a_whole_teacher_and_a_zero1_student_gather_nothing_while_they_compute():
    settings = ("teacher.shard=gpu", "deepspeed.student=zero1_bf16.json")
    time = plan_of("qwen7b_to_1p5b_trunc50", *settings).step_time(H100)
    assert time.gathers == 0
    # 1.54 B parameters in bf16: reduced, which is two ways, and the new ones gathered
    sent = 3 * 7 / 8 * 1.5437e9 * 2 / (0.75 * 450e9)
    optimizer = 30 * 1.5437e9 / 8 / (0.9 * 3.35e12)
    assert time.after == pytest.approx(sent + optimizer, rel=0.01)


def test_a_shared_teacher_is_gathered_for_each_micro_batch_whatever_its_length():
    long, short = (
        plan_of("qwen7b_to_1p5b_trunc50", mean=mean).step_time(H100) for mean in (8000, 100)
    )
    assert long.gathers == short.gathers
    assert long.host == short.host
    # Of 32 sequences each of 8 ranks has 4; 7.6 B and three times 1.54 B parameters in bf16
    expected = 4 * 7 / 8 * 2 * (7.6156e9 + 3 * 1.5437e9) / (0.75 * 450e9)
    assert long.gathers == pytest.approx(expected, rel=0.01)
    assert long.compute > 50 * short.compute
    assert (long.bound, short.bound) == ("compute", "host")


def test_the_network_bounds_gathers_that_cross_nodes_and_no_others():
    slow = Site(GPUS["h100"], 2, 8, network_gbps=100.0)
    world = plan_of("qwen3_8b_to_4b_trunc50", site=slow).step_time(slow)
    settings = ("teacher.shard=node", "deepspeed.student=zero1_bf16.json")
    node = plan_of("qwen3_8b_to_4b_trunc50", *settings, site=slow).step_time(slow)
    assert world.bound == "gathers"
    assert node.gathers == pytest.approx(7 / 8 * 2 * 8.19e9 / (0.75 * 450e9), rel=0.01)
    assert world.gathers > 40 * node.gathers


def test_a_budget_of_tokens_takes_the_host_less_time():
    alone = plan_of("qwen7b_to_1p5b_trunc50", mean=2000).step_time(H100)
    budget = "training.max_tokens_per_micro_batch=4096"
    together = plan_of("qwen7b_to_1p5b_trunc50", budget, mean=2000).step_time(H100)
    assert together.host == pytest.approx(alone.host / 4)
    assert together.compute == pytest.approx(alone.compute)


@pytest.mark.parametrize(("num_nodes", "idle"), [(1, 0.0), (2, 0.5), (4, 0.75)])
def test_ranks_beyond_the_global_batch_wait(num_nodes: int, idle: float):
    site = Site(GPUS["h100"], num_nodes, 8)
    plan = plan_of("qwen3_8b_to_4b_trunc50", site=site)
    assert plan.as_dict(site)["idle_share"] == pytest.approx(idle)
    one = plan_of("qwen3_8b_to_4b_trunc50").step_time(H100)
    assert plan.step_time(site).compute == pytest.approx(one.compute), "no faster than on 8"


@pytest.mark.parametrize("num_ranks", [*range(1, 9), 12, 16, 24, 32])
def test_the_papers_pair_is_planned_on_1_to_32_ranks(num_ranks: int):
    site = Site(GPUS["h100"], *((1, num_ranks) if num_ranks <= 8 else (num_ranks // 8, 8)))
    plan = plan_of("qwen3_8b_to_4b_trunc50", site=site)
    assert plan.lengths.per_step == 8
    assert plan.lengths.micro_batches_per_step == -(-8 // site.num_gpus)
    verdict = plan.memory.verdict(site.gpu.gib)
    # 4 B parameters x 18 bytes and a teacher of 16 GB are more than one GPU holds
    if num_ranks == 1:
        assert "zero3_bf16_offload.json" in str(verdict)
    else:
        assert verdict is None


def test_validation_and_checkpoints_take_a_tenth_of_the_papers_run_at_most():
    for mean in (None, 2850):  # of the longest sequences, and of such as the data has
        time = plan_of("qwen3_8b_to_4b_trunc50", mean=mean).run_time(H100)
        assert time is not None
        assert time.validation + time.checkpoints <= 0.1 * time.seconds
        assert sum(time.shares.values()) == pytest.approx(1.0)


def test_times_of_the_host_are_those_of_the_committed_measurement():
    results = ROOT / "benchmarks" / "results" / "host_time.json"
    measured = json.loads(results.read_text(encoding="utf-8"))
    per_layer: dict[str, dict[str, float]] = {"teacher": {}, "student": {}}
    for row in measured["rows"]:
        teacher, both = row["teacher_ms_per_micro_batch"], row["ms_per_micro_batch"]
        per_layer["teacher"][row["layout"]] = teacher / measured["layers"]
        per_layer["student"][row["layout"]] = (both - teacher) / measured["layers"]
    teachers = {"plain": "gpu_zero1", "zero3": "zero3_zero3"}
    for kind, layout in teachers.items():
        assert TEACHER_HOST_MS[kind] == pytest.approx(per_layer["teacher"][layout], rel=0.05)
    for stage, (without, with_it) in STUDENT_HOST_MS.items():
        layout = "zero3_zero3" if stage == 3 else f"gpu_zero{stage}"
        assert with_it == pytest.approx(per_layer["student"][layout], rel=0.05)
        layout += "_no_checkpointing"
        assert without == pytest.approx(per_layer["student"][layout], rel=0.05)
