from itertools import combinations

import numpy as np
import pytest

from kd.constants import IGNORE_INDEX
from kd.data.truncate import (
    SECTIONS,
    count_in_sections,
    count_supervised,
    make_labels,
    plan_windows,
)
from kd.recipe import TruncationSection

SUBSETS = [subset for size in (1, 2, 3) for subset in combinations(SECTIONS, size)]
FRACTIONS = [0.01, 0.25, 1 / 3, 0.5, 0.75, 0.999, 1.0]


def random_counts(seed: int, num_examples: int = 200) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(1, [20, 200, 30], size=(num_examples, 3))


def windows_of(counts: np.ndarray, **truncation: object) -> list[tuple[int, int, int]]:
    windows = plan_windows(counts, TruncationSection(**truncation))
    return [
        tuple(map(int, w))
        for w in zip(windows.read_start_N, windows.start_N, windows.stop_N, strict=True)
    ]


@pytest.mark.parametrize("fraction", FRACTIONS)
@pytest.mark.parametrize("window", ["head", "middle", "tail"])
def test_a_window_keeps_the_integer_part_of_the_fraction_of_the_whole_sequence(
    window: str, fraction: float
) -> None:
    counts = random_counts(seed=0)
    for length, (read_start, start, stop) in zip(
        counts.sum(axis=1), windows_of(counts, keep_fraction=fraction, window=window), strict=True
    ):
        assert stop - start == max(1, int(fraction * length))
        assert 0 <= read_start == start < stop <= length


def test_head_starts_at_the_start_tail_ends_at_the_end_and_middle_is_centred() -> None:
    counts = random_counts(seed=1)
    for window, holds in {
        "head": lambda start, stop, length: start == 0,
        "tail": lambda start, stop, length: stop == length,
        "middle": lambda start, stop, length: 0 <= (length - stop) - start <= 1,
    }.items():
        for length, (_, start, stop) in zip(
            counts.sum(axis=1), windows_of(counts, keep_fraction=0.4, window=window), strict=True
        ):
            assert holds(start, stop, length), (window, start, stop, length)


def test_head_and_tail_halves_part_an_even_sequence() -> None:
    counts = 2 * random_counts(seed=2)
    heads, tails = (
        windows_of(counts, keep_fraction=0.5, window=window) for window in ("head", "tail")
    )
    assert all(head[2] == tail[1] for head, tail in zip(heads, tails, strict=True))


def test_a_shorter_head_is_the_start_of_a_longer_one() -> None:
    counts = random_counts(seed=3)
    stops = [[stop for _, _, stop in windows_of(counts, keep_fraction=f)] for f in FRACTIONS]
    assert all(np.all(np.diff(column) >= 0) for column in zip(*stops, strict=True))


def test_max_tokens_applies_after_the_fraction() -> None:
    counts = np.array([[10, 80, 10], [1, 2, 1]])
    assert windows_of(counts, keep_fraction=0.5, max_tokens=30) == [(0, 0, 30), (0, 0, 2)]
    assert windows_of(counts, keep_fraction=0.5, max_tokens=30, window="tail") == [
        (70, 70, 100),
        (2, 2, 4),
    ]


def test_kept_context_is_read_and_not_supervised() -> None:
    counts = np.array([[10, 80, 10]])
    assert windows_of(counts, keep_fraction=0.5, window="tail", window_context="keep") == [
        (0, 50, 100)
    ]
    assert windows_of(counts, keep_fraction=0.5, window="middle", window_context="keep") == [
        (0, 25, 75)
    ]


def test_cut_after_think_ends_the_sequence_to_which_the_fraction_applies() -> None:
    counts = np.array([[10, 80, 10]])
    assert windows_of(counts, cut_after_think=True) == [(0, 0, 90)]
    assert windows_of(counts, cut_after_think=True, keep_fraction=0.5) == [(0, 0, 45)]
    assert windows_of(counts, cut_after_think=True, keep_fraction=0.5, window="tail") == [
        (45, 45, 90)
    ]


def test_tokens_of_a_window_are_counted_per_section() -> None:
    counts = np.array([[10, 80, 10]] * 3)
    inside = count_in_sections(counts, np.array([0, 5, 95]), np.array([50, 95, 100]))
    assert inside.tolist() == [[10, 40, 0], [5, 80, 5], [0, 0, 5]]


@pytest.mark.parametrize("loss_sections", SUBSETS, ids="+".join)
@pytest.mark.parametrize("context", ["drop", "keep"])
@pytest.mark.parametrize("window", ["head", "middle", "tail"])
@pytest.mark.parametrize("mask", [0.0, 0.3])
def test_labels_are_the_wanted_sections_of_the_window_and_as_many_as_counted(
    window: str, context: str, loss_sections: tuple, mask: float
) -> None:
    counts = random_counts(seed=4, num_examples=30)
    truncation = TruncationSection(keep_fraction=0.45, window=window, window_context=context)
    windows = plan_windows(counts, truncation)
    expected = count_supervised(counts, windows, loss_sections, mask)
    for i, num_tokens in enumerate(counts):
        read_start, start, stop = (
            int(a[i]) for a in (windows.read_start_N, windows.start_N, windows.stop_N)
        )
        input_ids = np.arange(1000, 1000 + num_tokens.sum())  # the id tells the position
        labels = make_labels(
            input_ids, num_tokens, (read_start, start, stop), loss_sections, mask, (0, i)
        )
        assert len(labels) == stop - read_start
        supervised = labels[labels != IGNORE_INDEX] - 1000
        section = np.repeat(SECTIONS, num_tokens)
        allowed = [
            p for p in range(max(start, read_start + 1), stop) if section[p] in loss_sections
        ]
        assert len(supervised) == expected[i] == len(allowed) - int(mask * len(allowed))
        assert set(supervised) <= set(allowed)
        assert np.array_equal(np.flatnonzero(labels != IGNORE_INDEX) + read_start, supervised)


def test_the_random_mask_depends_on_seed_and_row_alone() -> None:
    counts = np.array([10, 80, 10])

    def masked(seed: int, row: int) -> list[int]:
        labels = make_labels(np.arange(100), counts, (0, 0, 100), SECTIONS, 0.5, (seed, row))
        return labels.tolist()

    assert masked(0, 7) == masked(0, 7)
    assert masked(0, 7) != masked(1, 7)
    assert masked(0, 7) != masked(0, 8)


def test_the_first_token_read_is_never_supervised_since_nothing_predicts_it() -> None:
    assert make_labels(
        np.arange(4), np.array([2, 1, 1]), (0, 0, 1), SECTIONS, 0.0, (0, 0)
    ).tolist() == [IGNORE_INDEX]
    labels = make_labels(np.arange(4), np.array([2, 1, 1]), (0, 2, 4), SECTIONS, 0.0, (0, 0))
    assert labels.tolist() == [IGNORE_INDEX, IGNORE_INDEX, 2, 3]
