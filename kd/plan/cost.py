"""What a whole run costs at its truncation length: memory, FLOPs, tokens, steps, time."""

from dataclasses import asdict, dataclass, replace
from typing import Any

from kd.plan.flops import StepFlops, pair_of, sampling_flops
from kd.plan.gpus import Site
from kd.plan.lengths import Lengths
from kd.plan.memory import MemoryPlan, engines_of, memory_plan
from kd.plan.rank_memory import GIB
from kd.plan.shapes import sampler_shapes
from kd.plan.step_time import StepTime, step_time, validation_seconds
from kd.recipe import Recipe


@dataclass(frozen=True)
class RunTime:
    """Seconds of a run, and where they go."""

    step: StepTime
    steps: float
    validation: float
    checkpoints: float

    @property
    def seconds(self) -> float:
        return self.steps + self.validation + self.checkpoints

    @property
    def shares(self) -> dict[str, float]:
        """{"steps_share", "validation_share", "checkpoints_share"} of their sum."""
        parts = {name: getattr(self, name) for name in ("steps", "validation", "checkpoints")}
        return {f"{name}_share": part / self.seconds for name, part in parts.items()}


@dataclass(frozen=True)
class RunPlan:
    """Of a run under the recipe in `memory`; per step: the mean over an epoch, all ranks."""

    memory: MemoryPlan
    flops_per_step: StepFlops
    lengths: Lengths
    num_steps: int | None  # None: the number of rows is not known

    @property
    def world_size(self) -> int:
        return self.memory.num_nodes * self.memory.gpus_per_node

    @property
    def num_input_tokens_per_step(self) -> float:
        """That the models read, padding left out."""
        return float(self.lengths.read_N.sum()) / self.lengths.num_steps

    def step_time(self, site: Site) -> StepTime:
        engines = engines_of(self.memory.recipe, site.num_nodes, site.gpus_per_node)
        return step_time(self.memory.recipe, engines, self.flops_per_step, self.lengths, site)

    def mfu(self, site: Site) -> float:
        """Share of the GPUs' peak that a step reaches."""
        peak = self.world_size * site.gpu.tflops * 1e12
        return self.flops_per_step.model / (peak * self.step_time(site).seconds)

    def run_time(self, site: Site) -> RunTime | None:
        """None where the number of steps is not known."""
        if self.num_steps is None:
            return None
        recipe, total, step = self.memory.recipe, self.num_steps, self.step_time(site)
        steps, training = range(1, total + 1), recipe.training
        engines = engines_of(recipe, site.num_nodes, site.gpus_per_node)
        each = validation_seconds(
            engines, self.flops_per_step, self.lengths, site, recipe.data.num_validation
        )
        checkpoint = self.memory.checkpoint_gib * GIB / (site.disk_gb_s * 1e9)
        return RunTime(
            step,
            total * step.seconds,
            each * sum(training.validates_after(number, total) for number in steps),
            checkpoint * sum(training.saves_after(number, total) for number in steps),
        )

    def as_dict(self, site: Site | None) -> dict[str, Any]:
        """The plan as JSON; null is not known, as times and verdict without a GPU."""
        memory, flops = self.memory, self.flops_per_step
        verdict = memory.verdict(site.gpu.gib) if site else None
        tokens = self.num_input_tokens_per_step
        return {
            "keep_fraction": memory.recipe.truncation.keep_fraction,
            "longest_sequence_tokens": memory.num_tokens,
            "gib_per_rank": {
                **asdict(memory.gib_per_rank),
                "total": memory.total_gib,
                "moment": memory.moment,
                "gather_peak": memory.gather_peak_gib,
                "activations_checkpointed": memory.activations_checkpointed_gib,
                "activations_not_checkpointed": memory.activations_whole_gib,
            },
            "flops_per_step": {**asdict(flops), "model": flops.model},
            "num_input_tokens_per_step": tokens,
            "num_steps": self.num_steps,
            "num_input_tokens": self.num_steps and self.num_steps * tokens,
            "flops": self.num_steps and self.num_steps * flops.model,
            "idle_share": 1 - self.lengths.busy_share,
            **self._times(site),
            "fits": (verdict is None) if site else None,
            "verdict": verdict or (f"fits in {site.gpu.gib} GiB" if site else None),
        }

    def _times(self, site: Site | None) -> dict[str, Any]:
        if site is None:
            names = ("seconds_per_step", "seconds", "bound", "mfu", "hours", "shares")
            return dict.fromkeys(names)
        step, run = self.step_time(site), self.run_time(site)
        return {
            "seconds_per_step": step.seconds,
            "seconds": asdict(step),
            "bound": step.bound,
            "mfu": self.mfu(site),
            "hours": run and run.seconds / 3600,
            "shares": run and run.shares,
        }


def plan_run(
    recipe: Recipe,
    lengths: Lengths,
    steps_per_epoch: int | None,
    longest: int,
    *,
    num_nodes: int = 1,
    gpus_per_node: int = 1,
) -> RunPlan:
    """The plan of a recipe with sequences of these lengths; longest: of the full ones.

    Raises UserError as `memory_plan` does.
    """
    training = recipe.training
    flops = pair_of(recipe).step_flops(lengths.padded_N, lengths.supervised_N, lengths.num_steps)
    if recipe.rollout is not None:
        sampling = sampling_flops(sampler_shapes(recipe), lengths.prompt_R, lengths.response_R)
        flops = replace(flops, sampling=sampling / lengths.num_steps)
    num_steps = training.max_steps or (steps_per_epoch and training.epochs * steps_per_epoch)
    return RunPlan(
        memory_plan(
            recipe.with_values({"truncation.max_full_tokens": longest}), num_nodes, gpus_per_node
        ),
        flops,
        lengths,
        num_steps,
    )
