"""The batches of optimizer step s as a pure function of (seed, s), so that a checkpoint need not
store any state of the data.

An epoch is a permutation drawn from (seed, epoch); its last, partial global batch is dropped. A
global batch is the same set of examples for every number of ranks and every micro-batch size.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from kd.data.collate import Batch, collate
from kd.data.dataset import Examples
from kd.data.step_plan import BatchShape, StepPlan, deal, plan_step, rollouts_of_step
from kd.data.truncate import IntArray
from kd.distributed.layout import Layout
from kd.errors import UserError


def check_fills_a_batch(examples: Examples, global_batch_size: int) -> None:
    """Raise UserError unless there are examples for one optimizer step."""
    if len(examples) < global_batch_size:
        raise UserError(
            f"training.global_batch_size = {global_batch_size} needs at least as many training "
            f"examples, but there are {len(examples)}: lower it, add rows, or keep more tokens "
            "with [truncation]"
        )


@dataclass(frozen=True)
class Loader:
    examples: Examples
    shape: BatchShape
    seed: int
    pad_token_id: int

    def __post_init__(self) -> None:
        check_fills_a_batch(self.examples, self.shape.global_batch_size)

    @property
    def steps_per_epoch(self) -> int:
        return len(self.examples) // self.shape.global_batch_size

    def plan_step(self, step: int, data_parallel_size: int) -> StepPlan:
        return plan_step(
            step,
            self.examples.num_input_tokens,
            self.shape,
            seed=self.seed,
            data_parallel_size=data_parallel_size,
        )

    def rollouts(self, step: int) -> IntArray:
        """The examples whose prompts get sampled responses in this step, int64 (num_rollouts,)."""
        rollout = self.examples.recipe.rollout
        per_prompt = rollout.samples_per_prompt if rollout else 1
        return rollouts_of_step(step, len(self.examples), self.shape, per_prompt, seed=self.seed)

    def micro_batches(self, step: int, layout: Layout) -> list[Batch]:
        """What this rank runs in one optimizer step, of the data's own responses."""
        plan = self.plan_step(step, layout.data_parallel_size)
        return [
            collate(
                [self.examples[i] for i in micro],
                self.pad_token_id,
                self.shape.layout,
                self.num_sources,
            )
            for micro in plan.micro_batches[layout.data_parallel_rank]
        ]

    @property
    def num_sources(self) -> int:
        """Those of the data, and sampled responses as the last one."""
        return self.examples.num_sources + (self.shape.num_rollouts > 0)


def validation_batches(
    examples: Examples, shape: BatchShape, layout: Layout, pad_token_id: int
) -> Iterator[Batch]:
    """All examples once, dealt over the ranks as one global batch of training is; every rank gets
    as many batches, some perhaps empty.
    """
    whole = replace(shape, global_batch_size=len(examples))
    dealt = deal(examples.num_input_tokens, whole, layout.data_parallel_size)
    for micro in dealt[layout.data_parallel_rank]:
        chosen = [examples[i] for i in micro]
        yield collate(chosen, pad_token_id, shape.layout, examples.num_sources)
