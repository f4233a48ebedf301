"""A sampled response as an example: where its thought ends, and which tokens are supervised."""

import numpy as np
import pytest

from kd.rollouts.sampled import as_example, sampled_response

END = 0
PROMPT = np.array([90, 91, 92])
# The closing marker is three tokens, of which the last reaches into the answer
WORDS = {1: "a ", 2: "b ", 3: "</th", 4: "ink", 5: ">answer ", 6: "</think>", END: "<eos>"}


def response(token_ids: list[int]):
    def decode(ids: list[int]) -> str:
        return "".join(WORDS[i] for i in ids)

    return sampled_response(PROMPT, token_ids, decode, "</think>", {END})


@pytest.mark.parametrize(
    ("token_ids", "num_thought", "ended", "closed"),
    [
        ([1, 2, 6, 1, END], 3, True, True),
        ([1, 3, 4, 5, 2, END], 4, True, True),
        ([6, END], 1, True, True),
        ([1, 2, 6], 3, False, True),
        ([1, 2, 1], 3, False, False),
        ([1, END], 2, True, False),
        ([END], 1, True, False),
        ([1, 6, 2, 6, END], 2, True, True),
    ],
)
def test_the_thought_ends_with_the_first_marker(token_ids, num_thought, ended, closed):
    found = response(token_ids)
    assert (found.num_thought_tokens, found.ended, found.closed) == (num_thought, ended, closed)


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        (["prompt", "cot", "answer"], [-100] * 3 + [1, 6, 2, END]),
        (["cot"], [-100] * 3 + [1, 6, -100, -100]),
        (["answer"], [-100] * 5 + [2, END]),
    ],
)
def test_its_prompt_is_read_alone_and_sections_are_those_of_the_recipe(sections, expected):
    example = as_example(response([1, 6, 2, END]), sections, row=7, source=2)
    assert example.labels.tolist() == expected
    assert example.input_ids.tolist() == [*PROMPT, 1, 6, 2, END]
    assert example.num_tokens_3.tolist() == [3, 2, 2]
    assert (example.row, example.source, example.read_start) == (7, 2, 0)


def test_a_thought_that_never_closes_is_learned_from_as_it_is():
    assert as_example(response([1, 2, 1]), ["cot"], 0, 0).labels.tolist() == [-100] * 3 + [1, 2, 1]
    example = as_example(response([1, 2, 1]), ["answer"], 0, 0)
    assert set(example.labels) == {-100}, "nothing to learn from, and no error"
