"""What a whole run costs at its truncation length: memory, FLOPs, tokens, steps, hours."""

from dataclasses import asdict, dataclass
from typing import Any

from kd.plan.flops import StepFlops, pair_of
from kd.plan.gpus import Gpu
from kd.plan.lengths import Lengths
from kd.plan.memory import MemoryPlan, memory_plan
from kd.recipe import Recipe


@dataclass(frozen=True)
class RunPlan:
    """Of a run under the recipe in `memory`; per step: the mean over an epoch, all ranks."""

    memory: MemoryPlan
    flops_per_step: StepFlops
    num_input_tokens_per_step: float  # that the models read, padding left out
    num_steps: int | None  # None: the number of rows is not known

    @property
    def world_size(self) -> int:
        return self.memory.num_nodes * self.memory.gpus_per_node

    def seconds_per_step(self, gpu: Gpu, mfu: float) -> float:
        """At this share of the GPUs' peak. Validation and checkpoints come on top."""
        return self.flops_per_step.model / (self.world_size * gpu.tflops * 1e12 * mfu)

    def hours(self, gpu: Gpu, mfu: float) -> float | None:
        return (
            None
            if self.num_steps is None
            else self.num_steps * self.seconds_per_step(gpu, mfu) / 3600
        )

    def as_dict(self, gpu: Gpu | None, mfu: float) -> dict[str, Any]:
        """The plan as JSON; null is not known, as times and verdict without a GPU."""
        memory, flops = self.memory, self.flops_per_step
        verdict = memory.verdict(gpu.gib) if gpu else None
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
            "num_input_tokens_per_step": self.num_input_tokens_per_step,
            "num_steps": self.num_steps,
            "num_input_tokens": None
            if self.num_steps is None
            else self.num_steps * self.num_input_tokens_per_step,
            "flops": None if self.num_steps is None else self.num_steps * flops.model,
            "seconds_per_step": self.seconds_per_step(gpu, mfu) if gpu else None,
            "hours": self.hours(gpu, mfu) if gpu else None,
            "fits": (verdict is None) if gpu else None,
            "verdict": verdict or (f"fits in {gpu.gib} GiB" if gpu else None),
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
    num_steps = training.max_steps or (steps_per_epoch and training.epochs * steps_per_epoch)
    return RunPlan(
        memory_plan(
            recipe.with_values({"truncation.max_full_tokens": longest}), num_nodes, gpus_per_node
        ),
        pair_of(recipe).step_flops(
            lengths.padded_N, lengths.supervised_N, training.global_batch_size
        ),
        float(lengths.read_N.mean()) * training.global_batch_size,
        num_steps,
    )
