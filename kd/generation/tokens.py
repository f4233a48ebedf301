"""Token ids from a model: each sequence is drawn by its own seed, whatever is in its batch.

Shapes: B sequences, L tokens, V vocabulary.
"""

import contextlib
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    TopPLogitsWarper,
)

from kd.data.truncate import IntArray
from kd.generation.sampling import Sampling, generation_config, padded_prompts


class SeededDraws(LogitsProcessor):
    """Makes the largest score of each sequence a draw from softmax(logits / temperature), limited
    to the nucleus of top_p, by Gumbel noise of the sequence's own generator (Gumbel-max: arXiv
    1411.0030). Sampling from all of them at once would give other draws in another batch.
    """

    def __init__(self, seeds: Sequence[int], sampling: Sampling, device: torch.device) -> None:
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self._temperature = sampling.temperature
        self._nucleus = TopPLogitsWarper(sampling.top_p) if sampling.top_p < 1.0 else None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """input_ids (B, L), scores (B, V): float32 (B, V)."""
        scores_BV = scores.float() / self._temperature
        if self._nucleus is not None:
            scores_BV = self._nucleus(input_ids, scores_BV)
        draws_BV = torch.empty_like(scores_BV)
        for draws_V, generator in zip(draws_BV, self._generators, strict=True):
            draws_V.exponential_(generator=generator)
        return scores_BV - draws_BV.log()


class Writer(Protocol):
    """A student or a teacher: what writes on every rank."""

    model: PreTrainedModel

    def generating(
        self, *, whole: bool
    ) -> contextlib.AbstractContextManager[tuple[PreTrainedModel, bool]]:
        """The model, ready to generate, and whether ranks must do so in step. Collective."""


def generate_share(
    writer: Writer,
    batches: Sequence[IntArray],
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    sampling: Sampling,
    *,
    end_ids: Sequence[int],
    pad_id: int,
    whole: bool,
) -> dict[int, list[int]]:
    """{number: response} of this rank's batches, which hold numbers of prompts, as many batches as
    other ranks have. whole: a partitioned model is gathered for as long as it writes.

    Collective: every rank must call this.
    """
    share: dict[int, list[int]] = {}
    with writer.generating(whole=whole) as (model, in_step):
        for batch in batches:
            if not len(batch) and not in_step:
                continue
            numbers = [int(i) for i in batch]
            found = generate_tokens(
                model,
                # A rank without a prompt of its own takes part in every gather
                [prompts[i] for i in numbers] or [prompts[0]],
                [seeds[i] for i in numbers] or [0],
                sampling,
                end_ids=end_ids,
                pad_id=pad_id,
                in_step=in_step,
            )
            share |= dict(zip(numbers, found, strict=False))
    return share


def generate_tokens(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    sampling: Sampling,
    *,
    end_ids: Sequence[int],
    pad_id: int,
    in_step: bool = False,
) -> list[list[int]]:
    """The response to each prompt, its end token, if it came to one, included.

    sampling: its seed is not used. in_step: ranks go on until the last one has ended, as layers
    that are gathered for each token need it. Nothing is drawn from torch's own generator.
    """
    inputs = padded_prompts(prompts, pad_id, model.device)
    config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=False,
        eos_token_id=list(end_ids),
        pad_token_id=pad_id,
    )
    draws = [SeededDraws(seeds, sampling, model.device)] if sampling.temperature else []
    with generation_config(model, config):
        output: Any = model.generate(  # type: ignore[operator]
            **inputs, logits_processor=LogitsProcessorList(draws), synced_gpus=in_step
        )
    new = output[:, inputs["input_ids"].shape[1] :]
    return [_until_end(ids, set(end_ids)) for ids in new.tolist()]


def _until_end(token_ids: list[int], end_ids: set[int]) -> list[int]:
    stop = next((i for i, token_id in enumerate(token_ids) if token_id in end_ids), None)
    return token_ids if stop is None else token_ids[: stop + 1]
