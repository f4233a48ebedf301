"""Where in its whole trace each predicted token stands, through truncation and collation."""

from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from kd.data.collate import collate
from kd.data.dataset import Example, Examples
from kd.data.regions import NUM_POSITIONS, regions_of
from kd.data.sections import tokenise
from kd.data.truncate import SECTIONS
from kd.recipe import Recipe

PROMPT, COT, ANSWER = range(0, 3 * NUM_POSITIONS, NUM_POSITIONS)


def expected_cell(index: int, num_tokens: list[int]) -> int:
    section, stop = 0, num_tokens[0]
    while index >= stop:
        section += 1
        stop += num_tokens[section]
    return section * 8 + int(8 * index / sum(num_tokens))


def test_a_cell_is_a_section_and_an_eighth_of_the_whole_sequence() -> None:
    expected = [
        PROMPT,
        PROMPT,
        PROMPT + 1,
        COT + 2,
        COT + 3,
        COT + 4,
        COT + 4,
        ANSWER + 5,
        ANSWER + 6,
        ANSWER + 7,
    ]
    assert regions_of(np.arange(10), np.array([3, 4, 3])).tolist() == expected


@pytest.mark.parametrize(
    "num_tokens", [[1, 1, 1], [5, 0, 3], [0, 7, 1], [0, 0, 16], [9, 200, 31], [1000, 31000, 768]]
)
def test_sections_may_be_empty_and_sequences_of_any_length(num_tokens: list[int]) -> None:
    cells = regions_of(np.arange(sum(num_tokens)), np.array(num_tokens))
    assert cells.tolist() == [expected_cell(index, num_tokens) for index in range(sum(num_tokens))]
    assert np.bincount(cells // NUM_POSITIONS, minlength=3).tolist() == num_tokens


TRUNCATIONS = [
    {"window": window, "window_context": context, "cut_after_think": cut}
    for window, context, cut in product(["head", "middle", "tail"], ["drop", "keep"], [False, True])
]


@pytest.mark.parametrize(
    "truncation", TRUNCATIONS, ids=lambda truncation: "-".join(map(str, truncation.values()))
)
@pytest.mark.parametrize("loss_sections", [SECTIONS, ("cot",), ("prompt", "answer")], ids="+".join)
@pytest.mark.parametrize("mask", [0.0, 0.3])
def test_every_predicted_token_has_the_cell_of_its_place_in_the_whole_sequence(
    recipe: Callable[..., Recipe],
    truncation: dict[str, Any],
    loss_sections: tuple[str, ...],
    mask: float,
) -> None:
    counts = np.random.default_rng(0).integers(1, [20, 80, 30], size=(12, 3))
    # The id tells the position
    table = [{"input_ids": np.arange(num_tokens.sum())} for num_tokens in counts]
    data = {"loss_sections": loss_sections, "random_mask_fraction": mask}
    made = recipe(truncation={"keep_fraction": 0.6, **truncation}, data=data)
    examples = Examples(made, table, np.arange(12), counts)
    batch = collate([examples[i] for i in range(12)], pad_token_id=0)
    assert batch.region_index.shape == batch.row_index.shape
    predicted = batch.labels.flatten()[batch.row_index].tolist()
    sequences = (batch.row_index // batch.labels.shape[1]).tolist()
    assert batch.region_index.tolist() == [
        expected_cell(index, counts[b].tolist())
        for b, index in zip(sequences, predicted, strict=True)
    ]
    seen = {SECTIONS[cell // NUM_POSITIONS] for cell in batch.region_index.tolist()}
    reached = {("head", "prompt"), ("head", "cot"), ("middle", "cot"), ("tail", "cot")}
    assert seen <= set(loss_sections)
    assert {section for window, section in reached if window == truncation["window"]} & set(
        loss_sections
    ) <= seen


def test_the_first_token_read_has_no_cell_since_nothing_predicts_it() -> None:
    ids = np.arange(4)
    batch = collate(
        [Example(ids, labels=ids, row=0, num_tokens_3=np.array([4, 3, 1]), read_start=3)],
        pad_token_id=0,
    )
    assert batch.region_index.tolist() == [COT + 4, COT + 5, COT + 6]


def test_after_cut_after_think_positions_still_refer_to_the_answer_too(
    recipe: Callable[..., Recipe],
) -> None:
    cut = recipe(truncation={"cut_after_think": True})
    (example,) = Examples(cut, [{"input_ids": np.arange(16)}], np.array([0]), np.array([[2, 6, 8]]))
    assert len(example.input_ids) == 8
    assert collate([example], pad_token_id=0).region_index.max() == COT + 3


def test_a_token_that_straddles_a_border_counts_for_the_earlier_section(
    qwen3: PreTrainedTokenizerFast,
) -> None:
    tokens = tokenise(qwen3, ("1+1?\n", "\n[think]One.", "2"))
    ids, num_tokens = (
        np.array(tokens.input_ids),
        np.array([tokens.num_prompt, tokens.num_cot, tokens.num_answer]),
    )
    batch = collate([Example(ids, ids, 0, num_tokens, read_start=0)], pad_token_id=0)
    sections = batch.region_index // NUM_POSITIONS
    texts = [
        qwen3.decode(batch.labels.flatten()[batch.row_index][sections == section])
        for section in range(3)
    ]
    assert texts == ["+1?\n\n", "[think]One.", "2"]
