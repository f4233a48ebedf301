"""Lengths of the sequences that a run reads: of its data where they are here, else as stated.

Shapes: N sequences.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from kd.data.dataset import Examples, load_data
from kd.data.loader import Loader
from kd.data.step_plan import BatchShape, SequenceLayout, Work
from kd.data.tokenizers import load_tokenizers
from kd.data.truncate import IntArray, count_supervised, plan_windows
from kd.errors import UserError
from kd.plan.flops import pair_of
from kd.plan.shapes import model_shapes
from kd.recipe import Recipe


class Lengths(NamedTuple):
    """Tokens of each sequence after truncation, each int64 (N,)."""

    read_N: IntArray
    padded_N: IntArray  # as it stands in its micro-batch
    supervised_N: IntArray


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
        return f"of the data: {rows}, {mean:.0f} tokens on average, at most {self.longest}"

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
    """A sequence of average length that stands for all, and the longest one."""

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
                f"--rows {self.num_rows} is less than training.global_batch_size = {batch_size}"
            )
        num_tokens_N3 = np.array([[0, self.mean, 0]])
        windows = plan_windows(num_tokens_N3, recipe.truncation)
        supervised_N = count_supervised(
            num_tokens_N3, windows, ["cot"], recipe.data.random_mask_fraction
        )
        steps_per_epoch = self.num_rows // batch_size if self.num_rows else None
        return Lengths(windows.num_read_N, windows.num_read_N, supervised_N), steps_per_epoch


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
    )


def find_traces(recipe: Recipe) -> DataTraces | StatedTraces:
    """Those of the data where they can be read here, else what the recipe says of them, and why
    they cannot.
    """
    whole = recipe.with_values({"truncation.keep_fraction": 1.0})
    try:
        return DataTraces(load_data(whole, load_tokenizers(recipe)).train)
    except UserError as error:
        stated = state_traces(recipe)
        reason = str(error).partition("\n")[0]
        return replace(stated, words=f"{stated.words}\nthe data were not read: {reason}")


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
            "the student's positions",
        )
    if mean is not None and mean > longest:
        raise UserError(
            f"--mean-tokens {mean} is more than the longest sequence, {longest} ({origin}): "
            "correct one"
        )
    num_rows = num_rows or recipe.data.num_train
    parts = [
        f"{num_rows or 'an unknown number of'} training rows",
        f"{mean} tokens on average, as stated"
        if mean
        else "all as long as the longest, an upper bound",
        f"at most {longest} ({origin})",
        "every token supervised",
    ]
    return StatedTraces(mean or longest, longest, num_rows, f"not of the data: {', '.join(parts)}")


def epoch_lengths(loader: Loader, num_ranks: int) -> Lengths:
    """Of the first epoch; its last, partial global batch is dropped, as in training."""
    steps = (step_lengths(loader, step, num_ranks) for step in range(loader.steps_per_epoch))
    return Lengths(*map(np.concatenate, zip(*steps, strict=True)))


def step_lengths(loader: Loader, step: int, num_ranks: int) -> Lengths:
    """Of one optimizer step over all ranks: those of `Loader.micro_batches`, without reading a
    token.
    """
    plan = loader.plan_step(step, num_ranks)
    micro_batches = [micro for rank in plan.micro_batches for micro in rank if len(micro)]
    examples, chosen_N = loader.examples, np.concatenate(micro_batches)
    length_N = examples.num_input_tokens
    if loader.shape.layout == "packed":
        padded_N = length_N[chosen_N]
    else:
        padded = [np.full(len(micro), length_N[micro].max()) for micro in micro_batches]
        padded_N = np.concatenate(padded)
    return Lengths(length_N[chosen_N], padded_N, examples.num_supervised_tokens[chosen_N])
