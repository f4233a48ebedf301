"""What each rank finds on its own host, and what rank 0 makes of it. No process group is needed."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from kd.distributed.agreement import describe_differences
from kd.distributed.device import device_of_rank, device_type
from kd.distributed.nodes import divide, node_key, size_to_plan
from kd.engine.ds_config import Role, read_ds_config, student_ds_config, teacher_ds_config
from kd.engine.engine import check_ds_config
from kd.errors import UserError
from kd.models.loading import choose_attention, load_config
from kd.models.model_folder import needs_weights
from kd.models.weights import weights_folder
from kd.plan import MemoryPlan, memory_plan
from kd.plan.gpus import Site, find_gpu
from kd.plan.placement import settle
from kd.preflight.verdict import Check, fail, ok, size, skipped
from kd.recipe import ModelSection, Recipe, StudentSection
from kd.runs.check import check_recipe
from kd.runs.environment import facts_of_rank as facts_of_run

GIB = 2**30
Facts = dict[str, Any]
T = TypeVar("T")


def facts_of_rank(recipe: Recipe) -> Facts:
    """JSON: software, environment and recipe of kd.runs.environment, and what is asked of this host
    alone.
    """
    return {
        **facts_of_run(recipe),
        "node": str(node_key()),
        "inputs": _problem_with(lambda: _check_inputs(recipe)),
        "attention": _problem_with(lambda: _choose_attention(recipe)),
        "gpu": _gpu(),
        "host_gib": _available_gib(),
    }


def judge(recipe: Recipe, everyone: list[Facts]) -> list[Check]:
    """The checks of what all ranks found, in the order of ranks."""
    differences = describe_differences(everyone)
    software = everyone[0]["software"]
    same = f"{describe(everyone)}: torch {software['torch']}, deepspeed {software['deepspeed']}"
    checks = [
        fail("same everywhere", differences) if differences else ok("same everywhere", same),
        _judge_inputs(everyone),
        _judge_attention(everyone),
    ]
    try:
        plan = plan_for(recipe, everyone)
    except UserError as error:
        return [*checks, fail("recipe", str(error))]
    return [*checks, _judge_gpu_memory(plan, everyone), _judge_host_memory(plan, everyone)]


def plan_for(recipe: Recipe, everyone: list[Facts]) -> MemoryPlan:
    """The memory plan on these ranks, with a value for each "auto". Raises UserError as they do."""
    num_nodes, ranks_per_node = num_nodes_and_gpus(everyone)
    gpus = [facts["gpu"] for facts in everyone if facts["gpu"]]
    least_gib = min(gpu["total_gib"] for gpu in gpus) if gpus else None
    host_gib = min(facts["host_gib"] for facts in everyone) / ranks_per_node
    gpu = find_gpu(gpus[0]["name"]) if gpus else None
    site = Site(gpu, num_nodes, ranks_per_node) if gpu else None
    settled, _ = settle(recipe, num_nodes, ranks_per_node, least_gib or host_gib, site)
    return memory_plan(settled, num_nodes, ranks_per_node)


def num_nodes_and_gpus(everyone: list[Facts]) -> tuple[int, int]:
    """How many nodes there are, and ranks on each of them, for a plan."""
    return size_to_plan(divide(facts["node"] for facts in everyone))


def describe(everyone: list[Facts]) -> str:
    """4 ranks on 2 hosts."""
    num_nodes = len(divide(facts["node"] for facts in everyone))
    ranks = f"{len(everyone)} rank{'s' * (len(everyone) > 1)}"
    return f"{ranks} on {num_nodes} host{'s' * (num_nodes > 1)}"


def _problem_with(look: Callable[[], T]) -> T | str:
    """What look() finds, or the UserError that it raises."""
    try:
        return look()
    except UserError as error:
        return str(error)


def _check_inputs(recipe: Recipe) -> None:
    check_recipe(recipe)
    check_ds_config(student_ds_config(recipe, 1, device_type()), recipe.deepspeed.student)
    if recipe.teacher:
        check_ds_config(teacher_ds_config(recipe), recipe.deepspeed.teacher)
    for role in _roles(recipe):
        if role == "student" or (recipe.teacher and needs_weights(recipe.teacher)):
            _check_weights(getattr(recipe, role), role)


def _choose_attention(recipe: Recipe) -> dict[str, str]:
    found: dict[str, str] = {}
    for role in _roles(recipe):
        section = getattr(recipe, role)
        config = load_config(section, role=role)
        found[role] = choose_attention(section, config, read_ds_config(recipe, role), role=role)
    return found


def _roles(recipe: Recipe) -> tuple[Role, ...]:
    return ("teacher", "student") if recipe.teacher else ("student",)


def _check_weights(section: ModelSection, role: str) -> None:
    """Raise UserError unless this host has a model's weights: local, or in its hub cache."""
    if isinstance(section, StudentSection) and section.init == "random":
        return
    weights_folder(section, role=role)


def _gpu() -> dict[str, Any] | None:
    if device_type() != "cuda":
        return None
    index = device_of_rank(int(os.environ["LOCAL_RANK"])).index
    free, total = torch.cuda.mem_get_info(index)
    return {
        "name": torch.cuda.get_device_name(index),
        "free_gib": free / GIB,
        "total_gib": total / GIB,
    }


def _available_gib() -> float:
    found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    assert found is not None
    return int(found[1]) * 1024 / GIB


def _judge_inputs(everyone: list[Facts]) -> Check:
    problems = [(rank, facts) for rank, facts in enumerate(everyone) if facts["inputs"]]
    if not problems:
        return ok("models and data", f"found by {describe(everyone)}")
    rank, facts = problems[0]
    others = f" (and {len(problems) - 1} more)" if problems[1:] else ""
    return fail(
        "models and data",
        f"rank {rank} on {facts['host']}{others}: {facts['inputs']}. Correct this, or copy it to "
        "every host",
    )


def _judge_attention(everyone: list[Facts]) -> Check:
    first = everyone[0]["attention"]
    for rank, facts in enumerate(everyone):
        if facts["attention"] != first:
            return fail(
                "attention",
                f"{facts['attention']} on rank {rank} ({facts['host']}), {first} on rank 0: "
                "install the same packages and use one kind of GPU, or set teacher.attention and "
                "student.attention in the recipe",
            )
    if isinstance(first, str):
        return fail("attention", first)
    return ok("attention", ", ".join(f"{role} {name}" for role, name in first.items()))


def _judge_gpu_memory(plan: MemoryPlan, everyone: list[Facts]) -> Check:
    gpus = [
        (facts["gpu"], rank, facts["host"]) for rank, facts in enumerate(everyone) if facts["gpu"]
    ]
    needs = f"{size(plan.total_gib)} planned, with the peak in {plan.moment}"
    if not gpus:
        return skipped("GPU memory", f"no GPU; {needs}")
    gpu, rank, host = min(gpus, key=lambda found: found[0]["free_gib"])
    free = f"{gpu['free_gib']:.1f} of {gpu['total_gib']:.1f} GiB are free"
    where = f"{free} on {gpu['name']} of rank {rank} ({host})"
    problem = plan.verdict(gpu["free_gib"])
    return (
        fail("GPU memory", f"{where}: {problem}")
        if problem
        else ok("GPU memory", f"{needs}; {where}")
    )


def _judge_host_memory(plan: MemoryPlan, everyone: list[Facts]) -> Check:
    # Without GPUs, ranks hold on the host what they would on them.
    gib = plan.host_gib + (0 if everyone[0]["gpu"] else plan.gpus_per_node * plan.total_gib)
    least = min(everyone, key=lambda facts: facts["host_gib"])
    available = f"{least['host_gib']:.1f} GiB available on {least['host']}"
    text = f"{size(gib)} needed at most per node, {available}"
    if gib <= least["host_gib"]:
        return ok("host memory", text)
    return fail(
        "host memory",
        f"{text}: start fewer ranks per node, or use a student JSON without offload_optimizer",
    )
