"""A sampled response as an example: its thought and its answer by the marker that closes a thought.

Shapes: L tokens of prompt and response.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from kd.data.dataset import Example
from kd.data.truncate import IntArray, make_labels
from kd.recipe import SectionName


@dataclass(frozen=True)
class SampledResponse:
    """token_ids: with the end token, if it came to one. num_thought_tokens: up to the end of the
    marker that closes the thought; all of them where none does.
    """

    prompt_ids: IntArray
    token_ids: list[int]
    num_thought_tokens: int
    ended: bool
    closed: bool


def sampled_response(
    prompt_ids: IntArray,
    token_ids: list[int],
    decode: Callable[[list[int]], str],
    closing: str,
    end_ids: set[int],
) -> SampledResponse:
    """closing: what closes a thought, without spaces around it."""
    num_thought = _num_tokens_until(closing, token_ids, decode)
    ended = bool(token_ids) and token_ids[-1] in end_ids
    closed = num_thought is not None
    count = len(token_ids) if num_thought is None else num_thought
    return SampledResponse(prompt_ids, token_ids, count, ended, closed)


def as_example(
    response: SampledResponse, loss_sections: Sequence[SectionName], row: int, source: int
) -> Example:
    """Its prompt is only read, and its response is supervised where loss_sections say so."""
    num_response = len(response.token_ids)
    num_thought = response.num_thought_tokens
    num_tokens_3 = np.array([len(response.prompt_ids), num_thought, num_response - num_thought])
    input_ids_L = np.concatenate([response.prompt_ids, np.array(response.token_ids, np.int64)])
    sections = [name for name in loss_sections if name != "prompt"]
    whole = 0, 0, len(input_ids_L)
    labels = make_labels(input_ids_L, num_tokens_3, whole, sections, 0.0, mask_seed=(0, 0))
    return Example(input_ids_L, labels, row, num_tokens_3, 0, source)


def _num_tokens_until(
    text: str, token_ids: list[int], decode: Callable[[list[int]], str]
) -> int | None:
    """The fewest first tokens whose text has this in it; None where all of them have not."""
    if text not in decode(token_ids):
        return None
    low, high = 0, len(token_ids)
    while low + 1 < high:  # low tokens have it not, high tokens have it
        middle = (low + high) // 2
        low, high = (low, middle) if text in decode(token_ids[:middle]) else (middle, high)
    return high
