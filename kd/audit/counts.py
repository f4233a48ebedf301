"""How many tokens of each section an Examples keeps and supervises, and its lengths, exactly.

Shapes: N examples, 3 sections (prompt, chain of thought, answer), E edges of a histogram.
"""

from dataclasses import dataclass

import numpy as np

from kd.constants import IGNORE_INDEX
from kd.data.dataset import Examples
from kd.data.regions import NUM_POSITIONS, regions_of
from kd.data.truncate import SECTIONS, IntArray, count_candidates, count_in_sections

MAX_BINS = 12


@dataclass(frozen=True)
class TokenCounts:
    """Tokens of one section, or of all, in whole traces; a share of no tokens is 0."""

    num_full_tokens: int  # of whole traces
    num_input_tokens: int  # kept: read by the models
    num_dropped_tokens: int
    num_supervised_tokens: int  # labels: kept, and of the loss
    kept_fraction: float  # of num_full_tokens
    supervised_fraction: float  # of num_input_tokens


@dataclass(frozen=True)
class LengthSummary:
    """Tokens per trace."""

    mean: float
    median: float
    p95: float
    max: int


@dataclass(frozen=True)
class TraceLengths:
    """Bin i of a histogram counts the lengths in [edges[i], edges[i + 1]), all of one width."""

    whole: LengthSummary
    kept: LengthSummary
    edges: tuple[int, ...]
    whole_histogram: tuple[int, ...]
    kept_histogram: tuple[int, ...]


def count_tokens(examples: Examples) -> dict[str, TokenCounts]:
    """By section, and "total"."""
    windows = examples.windows
    whole_3 = examples.num_tokens_N3.sum(axis=0)
    kept_3 = count_in_sections(examples.num_tokens_N3, windows.read_start_N, windows.stop_N).sum(
        axis=0
    )
    supervised_3 = _count_supervised(examples)
    counts = [
        _token_counts(*map(int, of)) for of in zip(whole_3, kept_3, supervised_3, strict=True)
    ]
    total = _token_counts(int(whole_3.sum()), int(kept_3.sum()), int(supervised_3.sum()))
    return dict(zip((*SECTIONS, "total"), (*counts, total), strict=True))


def measure_lengths(examples: Examples) -> TraceLengths:
    whole_N, kept_N = examples.num_tokens_N3.sum(axis=1), examples.num_input_tokens
    edges_E = _edges(int(whole_N.max()))
    return TraceLengths(
        whole=_summarise(whole_N),
        kept=_summarise(kept_N),
        edges=tuple(edges_E.tolist()),
        whole_histogram=tuple(np.histogram(whole_N, edges_E)[0].tolist()),
        kept_histogram=tuple(np.histogram(kept_N, edges_E)[0].tolist()),
    )


def _count_supervised(examples: Examples) -> IntArray:
    """Labels of each section: int64 (3,). The random mask has to be drawn, example by example."""
    data = examples.recipe.data
    if not data.random_mask_fraction:
        count_N3 = count_candidates(examples.num_tokens_N3, examples.windows, data.loss_sections)
        total_3: IntArray = count_N3.sum(axis=0)
        return total_3
    count_3 = np.zeros(len(SECTIONS), dtype=np.int64)
    for i in range(len(examples)):
        example = examples[i]
        supervised = example.read_start + np.flatnonzero(example.labels != IGNORE_INDEX)
        count_3 += np.bincount(
            regions_of(supervised, example.num_tokens_3) // NUM_POSITIONS, minlength=len(SECTIONS)
        )
    return count_3


def _token_counts(num_full: int, num_kept: int, num_supervised: int) -> TokenCounts:
    return TokenCounts(
        num_full_tokens=num_full,
        num_input_tokens=num_kept,
        num_dropped_tokens=num_full - num_kept,
        num_supervised_tokens=num_supervised,
        kept_fraction=num_kept / max(num_full, 1),
        supervised_fraction=num_supervised / max(num_kept, 1),
    )


def _summarise(length_N: IntArray) -> LengthSummary:
    median, p95 = np.percentile(length_N, [50, 95])
    return LengthSummary(float(length_N.mean()), float(median), float(p95), int(length_N.max()))


def _edges(longest: int) -> IntArray:
    """Edges from 0 to beyond `longest`, for at most MAX_BINS bins whose width is 1, 2 or 5 times a
    power of ten.
    """
    widths = (factor * 10**power for power in range(19) for factor in (1, 2, 5))
    width = next(width for width in widths if longest < MAX_BINS * width)
    return np.arange(0, longest + width + 1, width)
