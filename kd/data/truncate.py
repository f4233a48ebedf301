"""Which tokens of a sequence are read, and which supervised, from its sections' token counts.

Vectorised over examples, so that a large dataset is planned without reading a token.

Shapes: N examples, 3 sections (prompt, chain of thought, answer), L tokens of one full sequence, W
    tokens read of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kd.constants import IGNORE_INDEX
from kd.recipe import SectionName, TruncationSection

IntArray = npt.NDArray[np.int64]

SECTIONS: tuple[SectionName, ...] = ("prompt", "cot", "answer")


@dataclass(frozen=True)
class Windows:
    """Tokens [read_start, stop) are the model's input; those in [start, stop) may be supervised.
    Each int64 (N,).
    """

    read_start_N: IntArray
    start_N: IntArray
    stop_N: IntArray

    @property
    def num_read_N(self) -> IntArray:
        return self.stop_N - self.read_start_N


def plan_windows(num_tokens_N3: IntArray, truncation: TruncationSection) -> Windows:
    """The window that a truncation leaves of each sequence.

    cut_after_think makes the sequence end where the chain of thought ends, before anything else.
    Then keep = max(1, int(keep_fraction * length)) tokens of the whole sequence, prompt included,
    and at most max_tokens.
    """
    length_N = (
        num_tokens_N3[:, :2].sum(axis=1)
        if truncation.cut_after_think
        else num_tokens_N3.sum(axis=1)
    )
    keep_N = np.maximum((truncation.keep_fraction * length_N).astype(np.int64), 1)
    if truncation.max_tokens is not None:
        keep_N = np.minimum(keep_N, truncation.max_tokens)
    spare_N = length_N - keep_N
    start_N = {"head": np.zeros_like(spare_N), "middle": spare_N // 2, "tail": spare_N}[
        truncation.window
    ]
    read_start_N = np.zeros_like(start_N) if truncation.window_context == "keep" else start_N
    return Windows(read_start_N, start_N, start_N + keep_N)


def count_in_sections(num_tokens_N3: IntArray, start_N: IntArray, stop_N: IntArray) -> IntArray:
    """Tokens of each section inside [start, stop): int64 (N, 3)."""
    section_stop_N3 = num_tokens_N3.cumsum(axis=1)
    section_start_N3 = section_stop_N3 - num_tokens_N3
    first_N3 = np.maximum(section_start_N3, start_N[:, None])
    overlap_N3: IntArray = np.minimum(section_stop_N3, stop_N[:, None]) - first_N3
    return overlap_N3.clip(min=0)


def count_supervised(
    num_tokens_N3: IntArray,
    windows: Windows,
    loss_sections: Sequence[SectionName],
    random_mask_fraction: float,
) -> IntArray:
    """How many labels `make_labels` sets for each example: int64 (N,)."""
    count_N: IntArray = count_candidates(num_tokens_N3, windows, loss_sections).sum(axis=1)
    num_masked_N: IntArray = (random_mask_fraction * count_N).astype(np.int64)
    return count_N - num_masked_N


def count_candidates(
    num_tokens_N3: IntArray, windows: Windows, loss_sections: Sequence[SectionName]
) -> IntArray:
    """Labels of each section before the random mask, which may take any of them: int64 (N, 3)."""
    first_N = np.maximum(windows.start_N, windows.read_start_N + 1)
    return count_in_sections(num_tokens_N3, first_N, windows.stop_N) * np.isin(
        SECTIONS, loss_sections
    )


def make_labels(
    input_ids_L: IntArray,
    num_tokens_3: IntArray,
    window: tuple[int, int, int],
    loss_sections: Sequence[SectionName],
    random_mask_fraction: float,
    mask_seed: tuple[int, int],
) -> IntArray:
    """Labels of the tokens read, int64 (W,), not shifted; IGNORE_INDEX where unsupervised.

    `window` is (read_start, start, stop). The first token read has no predecessor to predict it and
    is never supervised. int(random_mask_fraction * supervised) labels, drawn by `mask_seed`, are
    ignored.
    """
    read_start, start, stop = window
    wanted_3 = np.isin(SECTIONS, loss_sections)
    supervised_L = np.repeat(wanted_3, num_tokens_3)
    supervised_L[: max(start, read_start + 1)] = False
    supervised_L[stop:] = False
    candidates = np.flatnonzero(supervised_L)
    num_masked = int(random_mask_fraction * len(candidates))
    supervised_L[np.random.default_rng(mask_seed).choice(candidates, num_masked, replace=False)] = (
        False
    )
    return np.where(supervised_L, input_ids_L, IGNORE_INDEX)[read_start:stop]
