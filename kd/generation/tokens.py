"""Token ids from a model: each sequence drawn by a seed of its own, whatever stands beside it.

Shapes: B sequences, L tokens, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    TopPLogitsWarper,
)


class SeededDraws(LogitsProcessor):
    """Makes the largest score of each sequence a draw from softmax(logits / temperature), limited
    to the nucleus of top_p, by Gumbel noise of the sequence's own generator (Gumbel-max: arXiv
    1411.0030). Sampling from all of them at once would give other draws in another batch.
    """

    def __init__(
        self, seeds: Sequence[int], temperature: float, top_p: float, device: torch.device
    ) -> None:
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self._temperature = temperature
        self._nucleus = TopPLogitsWarper(top_p) if top_p < 1.0 else None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """input_ids (B, L), scores (B, V): float32 (B, V)."""
        scores_BV = scores.float() / self._temperature
        if self._nucleus is not None:
            scores_BV = self._nucleus(input_ids, scores_BV)
        draws_BV = torch.empty_like(scores_BV)
        for draws_V, generator in zip(draws_BV, self._generators, strict=True):
            draws_V.exponential_(generator=generator)
        return scores_BV - draws_BV.log()


def generate_tokens(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    end_ids: Sequence[int],
    pad_id: int,
    in_step: bool = False,
) -> list[list[int]]:
    """The response to each prompt, its end token, if it came to one, included.

    temperature 0 is greedy. in_step: ranks go on until the last one has ended, as layers that are
    gathered for each token need it. Nothing is drawn from torch's own generator.
    """
    longest = max(map(len, prompts))
    padded = [[pad_id] * (longest - len(ids)) + list(ids) for ids in prompts]
    masks = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts]
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=list(end_ids),
        pad_token_id=pad_id,
    )
    draws = [SeededDraws(seeds, temperature, top_p, model.device)] if temperature else []
    shipped, model.generation_config = model.generation_config, config
    try:
        output: Any = model.generate(  # type: ignore[operator]
            input_ids=torch.tensor(padded, device=model.device),
            attention_mask=torch.tensor(masks, device=model.device),
            logits_processor=LogitsProcessorList(draws),
            synced_gpus=in_step,
        )
    finally:
        model.generation_config = shipped
    return [_until_end(ids, set(end_ids)) for ids in output[:, longest:].tolist()]


def _until_end(token_ids: list[int], end_ids: set[int]) -> list[int]:
    stop = next((i for i, token_id in enumerate(token_ids) if token_id in end_ids), None)
    return token_ids if stop is None else token_ids[: stop + 1]
