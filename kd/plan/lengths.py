"""Lengths of the sequences that a run reads: from its data if these are here, else as stated.

Shapes: N sequences, R of them sampled.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from kd.data.dataset import Examples, load_data
from kd.data.loader import Loader
from kd.data.step_plan import BatchShape, SequenceLayout, StepPlan, Work, deal
from kd.data.tokenizers import load_tokenizers
from kd.data.truncate import IntArray, count_supervised, plan_windows
from kd.errors import UserError
from kd.plan.flops import pair_of
from kd.plan.shapes import model_shapes
from kd.recipe import Recipe

NO_TOKENS: IntArray = np.zeros(0, dtype=np.int64)
STATED_PROMPT = 256  # tokens of a prompt, where no data are read


class Lengths(NamedTuple):
    """Tokens of each of the N sequences of some steps after truncation, each int64 (N,), and how
    evenly ranks share them.
    """

    read_N: IntArray
    padded_N: IntArray  # as it stands in its micro-batch
    supervised_N: IntArray
    num_steps: int
    num_micro_batches: int  # of a rank, in all steps
    # Work of all ranks, padding included, over that of as many as do most, micro-batch by
    # micro-batch: those that have less to do wait for them
    busy_share: float
    # Of responses that are sampled, of each its prompt and how long it is, or may become
    prompt_R: IntArray = NO_TOKENS
    response_R: IntArray = NO_TOKENS
    num_sampling_batches: int = 0  # in which a rank samples them, in all steps

    @property
    def per_step(self) -> float:
        """Sequences of a step."""
        return len(self.read_N) / self.num_steps

    @property
    def micro_batches_per_step(self) -> float:
        return self.num_micro_batches / self.num_steps


@dataclass(frozen=True)
class DataTraces:
    """The training examples of a recipe's own data, those that only a truncation leaves without a
    label among them.
    """

    examples: Examples

    @property
    def longest(self) -> int:
        """Tokens of the longest full sequence."""
        return int(self.examples.num_tokens_N3.sum(axis=1).max())

    def __str__(self) -> str:
        mean = self.examples.num_tokens_N3.sum(axis=1).mean()
        rows = f"{len(self.examples)} training rows"
        return f"from the data: {rows}, {mean:.0f} tokens on average, at most {self.longest}"

    def read(self, recipe: Recipe, num_ranks: int) -> tuple[Lengths, int]:
        """The sequences of the first epoch under the recipe's truncation, and the optimizer steps
        of an epoch.
        """
        examples = replace(self.examples, recipe=recipe)
        examples = examples.select(examples.num_supervised_tokens > 0)
        loader = Loader(examples, batch_shape(recipe), recipe.run.seed, pad_token_id=0)
        return epoch_lengths(loader, num_ranks), loader.steps_per_epoch


@dataclass(frozen=True)
class StatedTraces:
    """A sequence of average length that represents all, and the longest one."""

    mean: int
    longest: int
    num_rows: int | None
    words: str

    def __str__(self) -> str:
        return self.words

    def read(self, recipe: Recipe, num_ranks: int) -> tuple[Lengths, int | None]:
        """That sequence under the recipe's truncation, and the optimizer steps of an epoch where
        they are known.
        """
        batch_size = recipe.training.global_batch_size
        if self.num_rows is not None and self.num_rows < batch_size:
            raise UserError(
                f"--rows {self.num_rows} is less than training.global_batch_size = {batch_size}: "
                "raise --rows or lower the batch"
            )
        num_kept = batch_size - recipe.num_rollouts
        num_tokens_N3 = np.repeat(np.array([[0, self.mean, 0]]), num_kept, axis=0)
        windows = plan_windows(num_tokens_N3, recipe.truncation)
        supervised_N = count_supervised(
            num_tokens_N3, windows, ["cot"], recipe.data.random_mask_fraction
        )
        shape = batch_shape(recipe)
        dealt = StepPlan(deal(windows.num_read_N, shape, num_ranks))
        steps_per_epoch = self.num_rows // batch_size if self.num_rows else None
        of_data = windows.num_read_N, supervised_N
        if recipe.rollout is None:
            return lengths_of([dealt], *of_data, shape), steps_per_epoch
        prompt_R = np.full(recipe.num_rollouts, STATED_PROMPT)
        sampled = prompt_R, np.full(recipe.num_rollouts, recipe.rollout.max_new_tokens)
        return with_rollouts([dealt], *of_data, shape, [sampled]), steps_per_epoch


# Tokens of each prompt, and of the response that is sampled to it
Sampled = tuple[IntArray, IntArray]
Traces = DataTraces | StatedTraces


def batch_shape(recipe: Recipe, layout: SequenceLayout = "padded") -> BatchShape:
    """How the recipe's global batch is cut up. layout: what "auto" is taken for."""
    training = recipe.training
    try:
        work = pair_of(recipe).work
    except UserError:  # of a model whose shapes are not known, tokens say enough
        work = Work()
    return BatchShape(
        training.global_batch_size,
        training.micro_batch_size,
        training.max_tokens_per_micro_batch,
        layout if training.sequence_layout == "auto" else training.sequence_layout,
        work,
        recipe.num_rollouts,
    )


def find_traces(recipe: Recipe) -> Traces:
    """Those of the data where they can be read here, else what the recipe says of them, and why
    they cannot.
    """
    whole = recipe.with_values({"truncation.keep_fraction": 1.0})
    try:
        return DataTraces(load_data(whole, load_tokenizers(recipe)).train)
    except UserError as error:
        stated = state_traces(recipe)
        reason = str(error).partition("\n")[0]
        return replace(stated, words=f"{stated.words}\nthe data could not be read: {reason}")


def state_traces(
    recipe: Recipe, mean: int | None = None, longest: int | None = None, num_rows: int | None = None
) -> StatedTraces:
    """Full sequences of `mean` and at most `longest` tokens; what is None is as large as the recipe
    lets it be.

    num_rows: for training; None: data.num_train, or not known. Raises UserError when the mean is
        above the longest.
    """
    origin = "as stated"
    if longest is None:
        longest, origin = recipe.truncation.max_full_tokens, "truncation.max_full_tokens"
    if longest is None:
        longest, origin = (
            model_shapes(recipe.student, role="student").max_position_embeddings,
            "max_position_embeddings of the student",
        )
    if mean is not None and mean > longest:
        raise UserError(
            f"--mean-tokens {mean} is more than the longest sequence, {longest} ({origin}): "
            "correct one of the two"
        )
    num_rows = num_rows or recipe.data.num_train
    parts = [
        f"{num_rows or 'an unknown number of'} training rows",
        f"{mean} tokens on average, as stated"
        if mean
        else "all of the longest length, an upper bound",
        f"at most {longest} ({origin})",
        "every token supervised",
    ]
    return StatedTraces(mean or longest, longest, num_rows, f"assumed: {', '.join(parts)}")


def epoch_lengths(loader: Loader, num_ranks: int) -> Lengths:
    """Of the first epoch; its last, partial global batch is dropped, as in training."""
    return _of_steps(loader, range(loader.steps_per_epoch), num_ranks)


def step_lengths(
    loader: Loader, step: int, num_ranks: int, sampled: Sampled | None = None
) -> Lengths:
    """Of one optimizer step over all ranks: those of `Loader.micro_batches`, without reading a
    token. sampled: responses as they were, in the place of the longest that they may be.
    """
    return _of_steps(loader, [step], num_ranks, sampled)


def _of_steps(
    loader: Loader, steps: Sequence[int], num_ranks: int, sampled: Sampled | None = None
) -> Lengths:
    examples, rollout = loader.examples, loader.examples.recipe.rollout
    plans = [loader.plan_step(step, num_ranks) for step in steps]
    of_data = examples.num_input_tokens, examples.num_supervised_tokens
    if rollout is None:
        return lengths_of(plans, *of_data, loader.shape)
    of_steps = [sampled] if sampled else []
    for step in () if sampled else steps:
        prompt_R = examples.num_tokens_N3[loader.rollouts(step), 0]
        of_steps.append((prompt_R, np.full(len(prompt_R), rollout.max_new_tokens)))
    return with_rollouts(plans, *of_data, loader.shape, of_steps)


def with_rollouts(
    plans: Sequence[StepPlan],
    length_N: IntArray,
    supervised_N: IntArray,
    shape: BatchShape,
    sampled: Sequence[Sampled],
) -> Lengths:
    """Of steps of the data's own responses, and of the sampled ones of each."""
    together, first, num_batches = [], len(length_N), 0
    for plan, (prompt_R, response_R) in zip(plans, sampled, strict=True):
        dealt = deal(prompt_R + response_R, shape, len(plan.micro_batches))
        together.append(
            StepPlan(
                tuple(
                    (*own, *(first + micro for micro in more))
                    for own, more in zip(plan.micro_batches, dealt, strict=True)
                )
            )
        )
        first += len(prompt_R)
        num_batches += len(dealt[0])
    prompts_R, responses_R = (np.concatenate(part) for part in zip(*sampled, strict=True))
    lengths = lengths_of(
        together,
        np.concatenate([length_N, prompts_R + responses_R]),
        np.concatenate([supervised_N, responses_R]),
        shape,
    )
    return lengths._replace(
        prompt_R=prompts_R, response_R=responses_R, num_sampling_batches=num_batches
    )


def lengths_of(
    plans: Sequence[StepPlan], length_N: IntArray, supervised_N: IntArray, shape: BatchShape
) -> Lengths:
    """Of these steps; length_N and supervised_N are of the examples that the plans point to."""
    chosen, padded, work, lockstep, num_rows = [], [], 0.0, 0.0, 0
    for plan in plans:
        num_ranks = len(plan.micro_batches)
        for row in zip(*plan.micro_batches, strict=True):  # side by side
            loads = []
            for micro in row:
                tokens = length_N[micro]
                if shape.layout == "padded" and len(micro):
                    tokens = np.full(len(micro), tokens.max())
                chosen.append(micro)
                padded.append(tokens)
                loads.append(float(shape.work.of(tokens).sum()))
            work += sum(loads)
            lockstep += num_ranks * max(loads)
            num_rows += 1
    chosen_N, padded_N = np.concatenate(chosen), np.concatenate(padded)
    return Lengths(
        length_N[chosen_N],
        padded_N,
        supervised_N[chosen_N],
        len(plans),
        num_rows,
        work / lockstep,
    )
