"""How both models may be divided over ranks, and the fastest placement that fits: the value of
"auto" in a recipe, and what a plan compares.

A placement changes nothing about what is learned, except the order in which gradients are added.
"""

import itertools
import json
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from kd.engine.ds_config import AUTO_STUDENTS
from kd.errors import UserError
from kd.plan.cost import RunPlan, plan_run
from kd.plan.gpus import Site
from kd.plan.lengths import Traces, state_traces
from kd.plan.memory import RESERVED_GIB, memory_plan
from kd.recipe import Recipe

Choice = dict[str, Any]  # {"section.key": value}
BUDGETS = (8192, 16384)  # of tokens in a micro-batch, that a plan tries
# Each from what costs the least time to what takes the least memory
CHOICES: dict[str, tuple[Any, ...]] = {
    "teacher.shard": ("gpu", "node", "world"),
    "deepspeed.student": AUTO_STUDENTS,
    "student.gradient_checkpointing": (False, True),
}


class Placement(NamedTuple):
    """One choice, and what it is planned to take; changes: of the recipe's own values."""

    changes: Choice
    plan: RunPlan
    fits: bool

    @property
    def settings(self) -> str:
        """As launchers take them."""
        return " ".join(f"--set {key}={_text(value)}" for key, value in self.changes.items())


def choices(recipe: Recipe, names: Iterable[str], num_nodes: int) -> Iterator[Choice]:
    """All combinations of the values that these keys may have, those that divide least first."""
    values = {
        name: CHOICES[name] for name in names if recipe.teacher or not name.startswith("teacher")
    }
    for combined in itertools.product(*values.values()):
        choice = dict(zip(values, combined, strict=True))
        if choice.get("teacher.shard") != "node" or num_nodes > 1:  # else it is the world
            yield choice


def settle(
    recipe: Recipe, num_nodes: int, gpus_per_node: int, gib: float, site: Site | None
) -> tuple[Recipe, str]:
    """The recipe with a value in the place of each "auto", and why it is this one: the fastest by
    the plan that fits in gib of each rank's device, or, where no site is known, the least divided.

    Sequences are taken to be as long as the recipe lets pass. Raises UserError when nothing fits.
    """
    if not recipe.autos:
        return recipe, ""
    fitting = []
    for choice in choices(recipe, recipe.autos, num_nodes):
        candidate = recipe.with_values(choice)
        memory = memory_plan(candidate, num_nodes, gpus_per_node)
        if memory.total_gib + RESERVED_GIB <= gib:
            seconds = _seconds_per_step(candidate, site) if site else 0.0
            fitting.append((seconds, memory.total_gib, candidate, choice))
    named = " and ".join(recipe.autos)
    if not fitting:
        smallest = {name: CHOICES[name][-1] for name in recipe.autos}
        plan = memory_plan(recipe.with_values(smallest), num_nodes, gpus_per_node)
        raise UserError(f'{named} = "auto": nothing fits: {plan.verdict(gib)}')
    seconds, total_gib, settled, choice = min(fitting, key=lambda found: found[0])
    words = ", ".join(f"{key} = {_text(value)}" for key, value in choice.items())
    reason = f"{total_gib:.1f} of {gib:.1f} GiB on each rank" + (
        f", {seconds:.3f} s per step planned, the fastest that fits"
        if site
        else ", the least divided"
    )
    return settled, f"auto is {words}: {reason}"


def compare(recipe: Recipe, traces: Traces, site: Site) -> list[Placement]:
    """Every placement that fits, with the recipe's micro-batches and with budgets of tokens, the
    fastest first, and those that differ least from the recipe first among equals. The recipe's own
    is among them in any case.
    """
    found = []
    for micro_batches in _micro_batches(recipe, site.num_gpus):
        lengths, steps = traces.read(recipe.with_values(micro_batches), site.num_gpus)
        own: list[Choice] = [{}]  # its engine's JSON may be none of those below
        placed = [_changes(recipe, one) for one in choices(recipe, CHOICES, site.num_nodes)]
        for choice in own + [changes for changes in placed if changes]:
            changes = {**choice, **micro_batches}
            candidate = recipe.with_values(changes)
            sizes = {"num_nodes": site.num_nodes, "gpus_per_node": site.gpus_per_node}
            plan = plan_run(candidate, lengths, steps, traces.longest, **sizes)
            fits = plan.memory.total_gib + RESERVED_GIB <= site.gpu.gib
            if fits or not changes:
                found.append(Placement(changes, plan, fits))
    seconds = {id(one): round(one.plan.step_time(site).seconds, 4) for one in found}
    return sorted(found, key=lambda one: (not one.fits, seconds[id(one)], len(one.changes)))


def _micro_batches(recipe: Recipe, num_ranks: int) -> list[Choice]:
    """As the recipe has them, and larger ones where a rank has more than one in a step."""
    own = recipe.training.max_tokens_per_micro_batch
    has_more = recipe.max_micro_batches(num_ranks) > 1
    larger = [budget for budget in BUDGETS if has_more and (own is None or budget > own)]
    return [{}, *({"training.max_tokens_per_micro_batch": budget} for budget in larger)]


def _changes(recipe: Recipe, choice: Choice) -> Choice:
    own = recipe.model_dump()
    return {
        name: value
        for name, value in choice.items()
        if own[name.partition(".")[0]][name.partition(".")[2]] != value
    }


def _seconds_per_step(recipe: Recipe, site: Site) -> float:
    traces = state_traces(recipe)
    lengths, steps = traces.read(recipe, site.num_gpus)
    sizes = {"num_nodes": site.num_nodes, "gpus_per_node": site.gpus_per_node}
    return plan_run(recipe, lengths, steps, traces.longest, **sizes).step_time(site).seconds


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
