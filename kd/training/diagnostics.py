"""Diagnostics: where in its traces the student still disagrees with the teacher, as means over
regions of tokens.

A region is a section and an eighth of the whole trace (kd.data.regions). Each batch gives the sums
of its regions, which add up over micro-batches and ranks; means are taken once, of the totals.
Tokens count alike, whatever their section.

Shapes: N supervised tokens, M measures, K regions, D sources of data.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kd.data.regions import NUM_POSITIONS, NUM_REGIONS
from kd.data.truncate import SECTIONS
from kd.losses import RowDiagnostics

MEASURES = RowDiagnostics._fields
NUM_SUMS = NUM_REGIONS * (len(MEASURES) + 1)  # of each source of data


def region_sums(
    rows_MN: torch.Tensor | None, region_index_N: torch.Tensor, num_sources: int = 1
) -> torch.Tensor:
    """Of each region of each source the sum of every measure and the number of tokens: float64
    (num_sources * NUM_SUMS,), zeros without rows.

    The host does not wait for the device. Sums are the same in every run, as scattered atomic
    additions would not be, and a row that is not finite spoils only its own region, as a product
    with a one-hot matrix would not have it.
    """
    if rows_MN is None:
        size = num_sources * NUM_SUMS
        return torch.zeros(size, dtype=torch.float64, device=region_index_N.device)
    regions = torch.arange(num_sources * NUM_REGIONS, device=region_index_N.device)
    is_in_region_KN = region_index_N == regions[:, None]
    sums = [
        torch.where(is_in_region_KN, row_N, 0.0).sum(-1, dtype=torch.float64) for row_N in rows_MN
    ]
    return torch.stack([*sums, is_in_region_KN.sum(-1).double()], dim=1).flatten()


def summarise(sums: Sequence[float]) -> dict[str, Any] | None:
    """What metrics.jsonl holds, from added-up `region_sums`: means over all tokens, by section and
    by position.

    {MEASURE: mean, ..., "num_supervised_tokens": n, "by_section": {SECTION: {...}},
    "by_position": [{...} or None, ...]}, where {...} are the means and the number of a part; a
    section without a token is left out. Of several sources of data also "by_source": [{...} or
    None, ...]. None when there is no token.
    """
    num_sources = len(sums) // NUM_SUMS
    sums_DSPM = np.reshape(sums, (num_sources, len(SECTIONS), NUM_POSITIONS, -1))
    sums_SPM = sums_DSPM.sum(axis=0)
    overall = _means(sums_SPM.sum(axis=(0, 1)))
    if overall is None:
        return None
    sections = {
        name: _means(sums_M) for name, sums_M in zip(SECTIONS, sums_SPM.sum(axis=1), strict=True)
    }
    return {
        **overall,
        "by_section": {name: means for name, means in sections.items() if means is not None},
        "by_position": [_means(sums_M) for sums_M in sums_SPM.sum(axis=0)],
        **(
            {"by_source": [_means(m) for m in sums_DSPM.sum(axis=(1, 2))]}
            if num_sources > 1
            else {}
        ),
    }


def flatten(name: str, value: Any) -> Iterator[tuple[str, float]]:
    """The numbers inside a nested record, as ("diagnostics/by_section/cot/forward_kl", 0.1)."""
    if isinstance(value, int | float):
        yield name, float(value)
    elif isinstance(value, dict | list):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from flatten(f"{name}/{key}", part)


def _means(sums_M: npt.NDArray[np.float64]) -> dict[str, float | int] | None:
    *totals, num_tokens = sums_M.tolist()
    if not num_tokens:
        return None
    means = {name: total / num_tokens for name, total in zip(MEASURES, totals, strict=True)}
    return {**means, "num_supervised_tokens": int(num_tokens)}
