"""What the text of each trace loses: the marker that closes the thought, and the answer.

The answer is read as evaluation reads it: the last \\boxed{...} behind the close marker, else all
that stands there. It is searched for as it is written, in the chain of thought and the answer: 1/2
does not state \\frac{1}{2}, and a short answer may be stated by chance, as an intermediate result.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerFast

from kd.data.dataset import Examples
from kd.evaluate.boxes import last_boxed
from kd.generation.journal import split_response
from kd.generation.sampling import Response
from kd.recipe import DataSection

BATCH_SIZE = 1000
NUM_FIRST_ROWS = 5


class Findings(NamedTuple):
    """Of one trace; where no answer is found, nothing else is said of it."""

    close_marker_dropped: bool  # the kept text does not hold think_close
    answer_dropped: bool  # the kept text does not state the answer
    answer_not_in_cot: bool  # the whole chain of thought does not state it
    answer_not_boxed: bool
    # By its markers: data.think_close is blank, or decoded tokens are not the text
    answer_not_found: bool


@dataclass(frozen=True)
class Found:
    num_examples: int
    first_rows: tuple[int, ...]  # the lowest, counted from 1


def find_in_traces(examples: Examples, tokenizer: PreTrainedTokenizerFast) -> dict[str, Found]:
    """By each of Findings: how many examples, and which rows. Decodes every trace once, and what is
    kept of it.
    """
    texts = _decode(examples, tokenizer)
    found = np.array(
        [_findings(response, kept, examples.recipe.data) for response, kept in texts], dtype=bool
    )
    return {name: _found(examples.row_N[found[:, k]]) for k, name in enumerate(Findings._fields)}


def states(text: str, answer: str) -> bool:
    """Whether `text` holds `answer`, and not only inside of a longer word or number: 17 and 1.7 do
    not state 7.
    """
    if answer not in text:
        return False
    before = r"(?<!\w)(?<!\d[.,])" if re.match(r"\w", answer) else ""
    after = r"(?!\w)(?![.,]\d)" if re.search(r"\w\Z", answer) else ""
    return re.search(before + re.escape(answer) + after, text) is not None


def _decode(examples: Examples, tokenizer: PreTrainedTokenizerFast) -> Iterator[tuple[str, str]]:
    """(thought and answer, what is kept of them) of every example, without the end token."""
    num_prompt_N, windows = examples.num_tokens_N3[:, 0], examples.windows
    start_N, stop_N = np.maximum(windows.read_start_N, num_prompt_N), windows.stop_N
    # Of many sequences at once, on all cores
    decode_batch = tokenizer.backend_tokenizer.decode_batch
    for first in range(0, len(examples), BATCH_SIZE):
        batch = range(first, min(first + BATCH_SIZE, len(examples)))
        ids = examples.table[examples.row_N[batch.start : batch.stop]]["input_ids"]
        whole = [row_ids[num_prompt_N[i] :].tolist() for i, row_ids in zip(batch, ids, strict=True)]
        kept = [
            row_ids[start_N[i] : stop_N[i]].tolist() for i, row_ids in zip(batch, ids, strict=True)
        ]
        for texts in zip(
            *(decode_batch(of, skip_special_tokens=False) for of in (whole, kept)), strict=True
        ):
            response, kept_text = (text.removesuffix(tokenizer.eos_token) for text in texts)
            yield response, kept_text


def _findings(response: str, kept: str, data: DataSection) -> Findings:
    marker = data.think_close.strip()
    close_marker_dropped = marker not in kept
    parts = (
        split_response(Response(response, num_tokens=0, ended=True), data, keep="ended")
        if marker
        else "unmarked"
    )
    if isinstance(parts, str):
        return Findings(close_marker_dropped, False, False, False, answer_not_found=True)
    cot, answer = parts
    boxed = last_boxed(answer)
    text = boxed or answer
    return Findings(
        close_marker_dropped, not states(kept, text), not states(cot, text), not boxed, False
    )


def _found(rows: np.ndarray) -> Found:
    return Found(len(rows), tuple((1 + np.sort(rows)[:NUM_FIRST_ROWS]).tolist()))
