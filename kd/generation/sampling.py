"""Generation with transformers: left-padded prompts in, responses out, alike for a seed."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from kd.errors import UserError
from kd.recipe import EvaluationSection


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy, and then top_p is not used. No top-k, no repetition penalty,
    whatever a model ships.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Response:
    """text: without the end token; num_tokens counts it; ended: it was produced."""

    text: str
    num_tokens: int
    ended: bool


def sampling_of(evaluation: EvaluationSection, seed: int) -> Sampling:
    # Greedy responses do not depend on it
    top_p = evaluation.top_p if evaluation.temperature else 1.0
    return Sampling(evaluation.max_new_tokens, evaluation.temperature, top_p, seed)


def check_num_samples(num_samples: int, temperature: float) -> None:
    """Raises UserError for what cannot be sampled."""
    if num_samples < 1:
        raise UserError(f"--num-samples = {num_samples}: write at least 1")
    if num_samples > 1 and temperature == 0:
        raise UserError(
            f"--num-samples = {num_samples} with evaluation.temperature = 0: greedy responses are "
            "all the same; use --num-samples 1, or --set evaluation.temperature=0.6"
        )


@torch.inference_mode()
def generate_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    sampling: Sampling,
    batch_index: int,
) -> list[Response]:
    """Responses of one batch; samples depend on the prompts, sampling.seed and batch_index, on
    nothing drawn before.

    prompts: rendered, tokenised without added special tokens. A response ends at the eos token of
        the tokenizer or at one of those of the model's generation config.
    """
    end_ids = end_token_ids(model, tokenizer)
    pad_id = tokenizer.pad_token_id
    token_ids = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    inputs = padded_prompts(token_ids, pad_id, model.device)
    torch.manual_seed(random.Random(f"{sampling.seed}/{batch_index}").getrandbits(63))
    with generation_config(
        model, GenerationConfig(**_settings(sampling), eos_token_id=end_ids, pad_token_id=pad_id)
    ):
        output = model.generate(**inputs)  # type: ignore[operator]
    new = output[:, inputs["input_ids"].shape[1] :]
    return [as_response(tokenizer, ids, set(end_ids)) for ids in new.tolist()]


def padded_prompts(
    prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device
) -> dict[str, torch.Tensor]:
    """{"input_ids", "attention_mask"}, int64 (prompts, tokens of the longest), padded on the
    left.
    """
    longest = max(map(len, prompts))
    input_ids = [[pad_id] * (longest - len(ids)) + list(ids) for ids in prompts]
    mask = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts]
    return {
        "input_ids": torch.tensor(input_ids, device=device),
        "attention_mask": torch.tensor(mask, device=device),
    }


def end_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What ends a response: the tokenizer's eos token, and those of the model's configuration."""
    configured = model.generation_config.eos_token_id
    configured = configured if isinstance(configured, list) else [configured]
    return sorted(
        {token_id for token_id in (*configured, tokenizer.eos_token_id) if token_id is not None}
    )


def _settings(sampling: Sampling) -> dict[str, Any]:
    if sampling.temperature == 0:
        return {"max_new_tokens": sampling.max_new_tokens, "do_sample": False}
    return {
        "max_new_tokens": sampling.max_new_tokens,
        "do_sample": True,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": 0,  # the library's default is 50
    }


@contextmanager
def generation_config(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Replace the model's own config, which would fill in whatever config leaves open."""
    shipped, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = shipped


def decode(tokenizer: PreTrainedTokenizerBase, token_ids: list[int]) -> str:
    """Special tokens stay in the text: think markers are special in some tokenizers."""
    return str(
        tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    )


def as_response(
    tokenizer: PreTrainedTokenizerBase, token_ids: list[int], end_ids: set[int]
) -> Response:
    """Cut after the first end token."""
    stop = next((index for index, token_id in enumerate(token_ids) if token_id in end_ids), None)
    ended = stop is not None
    text = decode(tokenizer, token_ids[:stop])
    return Response(text, num_tokens=len(token_ids) if stop is None else stop + 1, ended=ended)
