"""One example as spans of its whole trace: dropped, read as context, or supervised. Nothing of it
is left out.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from transformers import PreTrainedTokenizerFast

from kd.constants import IGNORE_INDEX
from kd.data.dataset import Examples
from kd.data.truncate import SECTIONS
from kd.recipe import SectionName

Fate = Literal["dropped", "context", "supervised"]
FATES: tuple[Fate, ...] = ("dropped", "context", "supervised")


@dataclass(frozen=True)
class Span:
    """Successive tokens of one section and one fate. A character that a border cuts is U+FFFD."""

    section: SectionName
    fate: Fate
    num_tokens: int
    text: str


@dataclass(frozen=True)
class Preview:
    row: int  # counted from 1
    spans: tuple[Span, ...]  # of the whole trace, in its order


def preview(examples: Examples, i: int, tokenizer: PreTrainedTokenizerFast) -> Preview:
    example = examples[i]
    input_ids = examples.table[example.row]["input_ids"]
    fates = np.full(len(input_ids), FATES.index("dropped"))
    read = slice(example.read_start, example.read_start + len(example.input_ids))
    fates[read] = np.where(
        example.labels == IGNORE_INDEX, FATES.index("context"), FATES.index("supervised")
    )
    sections = np.repeat(np.arange(len(SECTIONS)), example.num_tokens_3)
    changes = 1 + np.flatnonzero((np.diff(fates) != 0) | (np.diff(sections) != 0))
    spans = []
    for start, stop in zip([0, *changes], [*changes, len(input_ids)], strict=True):
        text = tokenizer.backend_tokenizer.decode(
            input_ids[start:stop].tolist(), skip_special_tokens=False
        )
        spans.append(Span(SECTIONS[sections[start]], FATES[fates[start]], int(stop - start), text))
    return Preview(example.row + 1, tuple(spans))
