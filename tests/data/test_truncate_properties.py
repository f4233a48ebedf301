"""What holds for every truncation of every sequence, not only for the examples of
test_truncate.py.
"""

import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kd.constants import IGNORE_INDEX
from kd.data.truncate import SECTIONS, count_supervised, make_labels, plan_windows
from kd.recipe import TruncationSection

# Deterministic and without a deadline: CI machines are slow, and a failure must come back.
properties = settings(max_examples=150, deadline=None, derandomize=True, database=None)

section_counts = st.tuples(st.integers(1, 40), st.integers(0, 200), st.integers(0, 40))
datasets = st.lists(section_counts, min_size=1, max_size=6).map(np.array)
fractions = st.one_of(
    st.sampled_from([0.25, 1 / 3, 0.5, 0.75, 1.0]), st.floats(0.001, 1.0, exclude_min=True)
)
truncations = st.builds(
    TruncationSection,
    keep_fraction=fractions,
    max_tokens=st.none() | st.integers(1, 250),
    window=st.sampled_from(["head", "middle", "tail"]),
    window_context=st.sampled_from(["drop", "keep"]),
    cut_after_think=st.booleans(),
)
loss_sections = st.sets(st.sampled_from(SECTIONS), min_size=1).map(tuple)
masks = st.one_of(st.just(0.0), st.floats(0.0, 1.0, exclude_max=True))
seeds = st.tuples(st.integers(0, 2**31), st.integers(0, 2**31))


def positions_of(num_tokens: np.ndarray, window: tuple, *how: object) -> np.ndarray:
    """Where in the whole sequence a label is set; each label is the token of its own place."""
    ids = np.arange(1000, 1000 + num_tokens.sum())
    labels = make_labels(ids, num_tokens, window, *how)
    assert len(labels) == window[2] - window[0]
    places = np.flatnonzero(labels != IGNORE_INDEX)
    assert np.array_equal(labels[places], ids[window[0] + places])
    return window[0] + places


def windows_of(counts: np.ndarray, truncation: TruncationSection) -> list[tuple[int, int, int]]:
    windows = plan_windows(counts, truncation)
    columns = (windows.read_start_N, windows.start_N, windows.stop_N)
    return [tuple(map(int, window)) for window in zip(*columns, strict=True)]


@properties
@given(datasets, truncations)
def test_a_window_is_inside_its_sequence_and_as_long_as_the_recipe_says(counts, truncation):
    parts = counts[:, :2] if truncation.cut_after_think else counts
    for length, (read_start, start, stop) in zip(
        parts.sum(axis=1).tolist(), windows_of(counts, truncation), strict=True
    ):
        assert 0 <= read_start <= start < stop <= length
        assert read_start == (0 if truncation.window_context == "keep" else start)
        keep = max(1, int(truncation.keep_fraction * length))
        assert stop - start == min(keep, truncation.max_tokens or keep)


@properties
@given(datasets, truncations, loss_sections, masks, seeds)
def test_labels_are_in_wanted_sections_after_the_first_token_and_as_many_as_counted(
    counts, truncation, sections, mask, seed
):
    windows = plan_windows(counts, truncation)
    expected = count_supervised(counts, windows, sections, mask)
    for num_tokens, window, count in zip(
        counts, windows_of(counts, truncation), expected, strict=True
    ):
        places = positions_of(num_tokens, window, sections, mask, seed)
        assert len(places) == count
        assert set(np.repeat(SECTIONS, num_tokens)[places]) <= set(sections)
        assert all(max(window[1], window[0] + 1) <= place < window[2] for place in places)


@properties
@given(datasets, fractions, fractions, st.none() | st.integers(1, 250), loss_sections)
def test_a_shorter_head_is_a_prefix_of_a_longer_one_in_tokens_and_labels(
    counts, one, other, max_tokens, sections
):
    short, long = (
        windows_of(counts, TruncationSection(keep_fraction=keep, max_tokens=max_tokens))
        for keep in sorted([one, other])
    )
    for num_tokens, of_short, of_long in zip(counts, short, long, strict=True):
        assert of_short[:2] == of_long[:2] == (0, 0)
        assert of_short[2] <= of_long[2]
        few, many = (
            positions_of(num_tokens, window, sections, 0.0, (0, 0))
            for window in (of_short, of_long)
        )
        assert np.array_equal(few, many[many < of_short[2]])


@properties
@given(section_counts, truncations, loss_sections, masks, seeds)
def test_the_random_mask_takes_the_same_labels_each_time_and_only_takes(
    counts, truncation, sections, mask, seed
):
    (window,) = windows_of(np.array([counts]), truncation)
    masked = positions_of(np.array(counts), window, sections, mask, seed)
    assert np.array_equal(masked, positions_of(np.array(counts), window, sections, mask, seed))
    assert set(masked) <= set(positions_of(np.array(counts), window, sections, 0.0, seed))


@properties
@given(section_counts, seeds, seeds)
def test_the_random_mask_of_long_sequences_differs_between_seeds(counts, seed, other):
    assume(seed != other)
    num_tokens = np.array(counts) + 200
    window = (0, 0, int(num_tokens.sum()))
    one, two = (positions_of(num_tokens, window, SECTIONS, 0.5, s) for s in (seed, other))
    assert not np.array_equal(one, two)
