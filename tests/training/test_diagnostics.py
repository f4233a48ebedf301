"""Sums over cells and the means that are logged of them, against a plain loop over tokens."""

import json
import math
from typing import Any

import pytest
import torch

from kd.data.regions import NUM_POSITIONS, NUM_REGIONS
from kd.data.truncate import SECTIONS
from kd.training.diagnostics import MEASURES, NUM_SUMS, flatten, region_sums, summarise


def random_rows(
    num_rows: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows_MN, region_index_N): values grow with the position, of which the cot has 2 to 5; there
    is no answer.
    """
    random = torch.Generator().manual_seed(num_rows)
    position = torch.randint(0, 6, (num_rows,), generator=random)
    rows = torch.rand(len(MEASURES), num_rows, generator=random, dtype=dtype) + position
    return rows, (position >= 2) * NUM_POSITIONS + position


def mean_of(rows: torch.Tensor, chosen: list[int]) -> dict[str, Any]:
    means = {
        name: sum(rows[m, i].item() for i in chosen) / len(chosen)
        for m, name in enumerate(MEASURES)
    }
    return {**means, "num_supervised_tokens": len(chosen)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_means_are_those_of_a_loop_over_tokens(dtype: torch.dtype) -> None:
    rows, cells = random_rows(300, dtype)
    sections = [SECTIONS[cell // NUM_POSITIONS] for cell in cells.tolist()]
    positions = [cell % NUM_POSITIONS for cell in cells.tolist()]
    summary = summarise(region_sums(rows, cells).tolist())
    parts = summary.pop("by_section"), summary.pop("by_position")
    assert summary == pytest.approx(mean_of(rows, list(range(300))))
    assert list(parts[0]) == ["prompt", "cot"]
    for name, means in parts[0].items():
        assert means == pytest.approx(
            mean_of(rows, [i for i in range(300) if sections[i] == name])
        ), name
    assert len(parts[1]) == NUM_POSITIONS
    for position, means in enumerate(parts[1][:6]):
        assert means == pytest.approx(
            mean_of(rows, [i for i in range(300) if positions[i] == position])
        ), position
    assert parts[1][6:] == [None, None]


def test_the_whole_is_the_mean_of_its_sections_and_of_its_positions_weighted_by_tokens() -> None:
    rows, cells = random_rows(100)
    summary = summarise(region_sums(rows, cells).tolist())
    for parts in (
        list(summary["by_section"].values()),
        [part for part in summary["by_position"] if part],
    ):
        assert (
            sum(part["num_supervised_tokens"] for part in parts)
            == summary["num_supervised_tokens"]
            == 100
        )
        for name in MEASURES:
            weighted = sum(part[name] * part["num_supervised_tokens"] for part in parts) / 100
            assert weighted == pytest.approx(summary[name]), name
            assert abs(sum(part[name] for part in parts) / len(parts) - weighted) > 0.01, (
                "weights make no difference"
            )


def test_sums_add_up_over_batches_empty_ones_among_them() -> None:
    rows, cells = random_rows(100)
    parts = [slice(0, 30), slice(30, 30), slice(30, 100)]
    added = sum(region_sums(rows[:, part], cells[part]) for part in parts)
    torch.testing.assert_close(added, region_sums(rows, cells), rtol=1e-12, atol=0.0)


@pytest.mark.parametrize(
    ("rows", "num_tokens"),
    [(None, NUM_REGIONS), (torch.empty(len(MEASURES), 0), 0)],
    ids=["no teacher", "no token"],
)
def test_without_a_teacher_or_a_token_there_is_nothing_to_report(
    rows: torch.Tensor | None, num_tokens: int
) -> None:
    sums = region_sums(rows, torch.arange(num_tokens))
    assert torch.equal(sums, torch.zeros(NUM_SUMS, dtype=torch.float64))
    assert summarise(sums.tolist()) is None


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_value_that_is_not_finite_spoils_only_the_means_that_contain_it(value: float) -> None:
    rows, cells = random_rows(100)
    clean = summarise(region_sums(rows, cells).tolist())
    spoilt = int((cells == NUM_POSITIONS + 3).nonzero()[0])
    rows[0, spoilt] = value
    summary = summarise(region_sums(rows, cells).tolist())
    changed = {name for name, number in flatten("", summary) if not math.isfinite(number)}
    assert changed == {"/forward_kl", "/by_section/cot/forward_kl", "/by_position/3/forward_kl"}
    kept = {name: number for name, number in flatten("", summary) if name not in changed}
    assert kept == {name: number for name, number in flatten("", clean) if name not in changed}


def test_flattened_names_are_the_paths_of_the_numbers() -> None:
    record = {
        "by_section": {"cot": {"forward_kl": 0.5, "num_supervised_tokens": 3}},
        "by_position": [None, {"forward_kl": 0.25}],
    }
    assert dict(flatten("kd", record)) == {
        "kd/by_section/cot/forward_kl": 0.5,
        "kd/by_section/cot/num_supervised_tokens": 3.0,
        "kd/by_position/1/forward_kl": 0.25,
    }


def test_a_summary_is_json() -> None:
    rows, cells = random_rows(100)
    summary = summarise(region_sums(rows, cells).tolist())
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
