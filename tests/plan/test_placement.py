"""What "auto" becomes, and what a plan compares."""

import re

import pytest

from kd.errors import UserError
from kd.plan.gpus import GPUS, Site
from kd.plan.lengths import state_traces
from kd.plan.memory import RESERVED_GIB, memory_plan
from kd.plan.placement import CHOICES, compare, settle
from kd.recipe import RECIPES_DIR, Recipe, load_recipe

AUTO = (
    "teacher.shard=auto",
    "deepspeed.student=auto",
    "student.gradient_checkpointing=auto",
)


def chosen(recipe: Recipe) -> tuple[object, ...]:
    assert recipe.teacher is not None
    section = recipe.student
    return recipe.teacher.shard, recipe.deepspeed.student, section.gradient_checkpointing


def test_without_auto_a_recipe_stays_as_it_is():
    recipe = load_recipe("qwen3_8b_to_4b_trunc50")
    assert settle(recipe, 1, 8, 1.0, None) == (recipe, "")


def test_what_takes_least_time_on_large_gpus_is_whole_and_not_recomputed():
    recipe = load_recipe("qwen7b_to_1p5b_trunc50", AUTO)
    settled, why = settle(recipe, 1, 8, 79.6, Site(GPUS["h100"], 1, 8))
    shard, _, checkpointing = chosen(settled)
    assert (shard, checkpointing) == ("gpu", False)
    assert why.startswith("auto is teacher.shard = gpu, deepspeed.student = zero")
    assert "of 79.6 GiB on each rank, " in why
    assert "s per step planned, the fastest that fits" in why
    assert not settled.autos


def test_on_devices_that_are_not_known_the_least_divided_that_fits_is_taken():
    recipe = load_recipe("qwen7b_to_1p5b_trunc50", AUTO)
    settled, why = settle(recipe, 1, 8, 1000.0, None)
    assert chosen(settled) == ("gpu", "zero1_bf16.json", False)
    assert why.endswith("the least divided")


@pytest.mark.parametrize("gib", [16.0, 20.0, 26.0, 40.0, 60.0, 80.0])
def test_what_is_taken_fits_and_nothing_before_it_does(gib: float):
    recipe = load_recipe("qwen7b_to_1p5b_trunc50", AUTO)
    settled, _ = settle(recipe, 1, 8, gib, None)
    assert memory_plan(settled, 1, 8).total_gib + RESERVED_GIB <= gib
    assert settled.teacher is not None
    if settled.teacher.shard == "world":
        whole = settled.with_values({"teacher.shard": "gpu"})
        assert memory_plan(whole, 1, 8).total_gib + RESERVED_GIB > gib


def test_where_one_gpu_is_not_enough_the_optimizer_is_offloaded():
    recipe = load_recipe("qwen3_8b_to_4b_trunc50", AUTO)
    settled, _ = settle(recipe, 1, 1, 79.6, Site(GPUS["h100"], 1, 1))
    assert settled.deepspeed.student == "zero3_bf16_offload.json"


def test_a_single_auto_leaves_the_other_values_of_the_recipe():
    recipe = load_recipe("qwen3_8b_to_4b_trunc50", ["deepspeed.student=auto"])
    settled, _ = settle(recipe, 1, 8, 79.6, None)
    assert chosen(settled) == ("world", "zero1_bf16.json", True)


def test_where_nothing_fits_it_is_said_what_would():
    recipe = load_recipe("qwen3_8b_to_4b_trunc50", AUTO)
    with pytest.raises(UserError) as error:
        settle(recipe, 1, 1, 20.0, None)
    message = str(error.value)
    assert message.startswith("teacher.shard and deepspeed.student and student.gradient_checkpoin")
    assert re.search(r"do not fit in 20\.0 GiB: use \d+ nodes", message)


def test_memory_is_not_planned_before_the_choice():
    with pytest.raises(UserError, match='teacher.shard = "auto" depends on the kind of GPU'):
        memory_plan(load_recipe("tiny_trunc50", ["teacher.shard=auto"]))


@pytest.mark.parametrize(("num_nodes", "gpus_per_node"), [(1, 1), (1, 8), (4, 8)])
def test_all_places_are_compared_the_fastest_that_fits_first(num_nodes: int, gpus_per_node: int):
    site = Site(GPUS["h100"], num_nodes, gpus_per_node)
    recipe = load_recipe("qwen3_8b_to_4b_trunc50")
    found = compare(recipe, state_traces(recipe), site)
    seconds = [round(one.plan.step_time(site).seconds, 4) for one in found if one.fits]
    assert seconds == sorted(seconds)
    assert sum(one.changes == {} for one in found) == 1, "the recipe's own"
    assert found[-1].fits or found[-1].changes == {}
    names = [one.settings for one in found]
    assert len(set(names)) == len(names)
    for one in found:
        if one.changes:
            own = load_recipe("qwen3_8b_to_4b_trunc50", one.settings.replace("--set ", "").split())
            assert own == recipe.with_values(one.changes), "pasted, the settings say the same"
    nodes_share = "--set teacher.shard=node" in " ".join(names)
    assert nodes_share is (num_nodes > 1)
    budgets = any("max_tokens" in name for name in names)
    assert budgets is (site.num_gpus < 8), "where a rank has more than one sequence"


def test_every_key_that_may_be_auto_has_choices():
    assert set(load_recipe("tiny_trunc50", AUTO).autos) == set(CHOICES)


PLANNED = re.compile(
    r"^\| `(\w+)` \| (\d+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) "
    r"\| `(.*)` \|$",
    re.MULTILINE,
)


def planned_row(name: str, mean: int) -> str:
    """A line of the table in recipes/README.md."""
    site, recipe = Site(GPUS["h100"], 1, 8), load_recipe(name)
    traces = state_traces(recipe, mean)
    whole = compare(recipe.with_values({"truncation.keep_fraction": 1.0}), traces, site)
    half = compare(recipe, traces, site)
    fastest, own = half[0], next(one for one in half if not one.changes)
    seconds = own.plan.step_time(site).seconds
    of_whole = next(one for one in whole if not one.changes).plan.step_time(site).seconds
    cells = [f"`{name}`", str(mean), f"{own.plan.memory.total_gib:.1f}", f"{seconds:.3f}"]
    cells += [f"{of_whole:.3f}", f"{seconds / of_whole:.2f}"]
    cells += [f"{fastest.plan.step_time(site).seconds:.3f}"]
    cells += [f"{fastest.plan.memory.total_gib:.1f}", f"`{fastest.settings}`"]
    return f"| {' | '.join(cells)} |"


def test_the_table_of_recipes_is_what_the_plan_says():
    rows = list(PLANNED.finditer((RECIPES_DIR / "README.md").read_text(encoding="utf-8")))
    assert len(rows) == 5
    for row in rows:
        assert row[0] == planned_row(row[1], int(row[2]))
