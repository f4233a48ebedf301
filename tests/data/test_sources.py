import pytest
from data_samples import R1_VALUE, ROWS, STRATOS_VALUE, USER, stratos_row

from kd.data.sources import SOURCES, Trace, read_row
from kd.data.turns import BadRow
from kd.errors import UserError


@pytest.mark.parametrize(("source", "row"), ROWS.values(), ids=ROWS)
def test_a_row_of_every_source_gives_the_same_trace(source: str, row: dict) -> None:
    trace = read_row(SOURCES[source], row)
    assert trace is not None
    assert Trace(trace.messages, trace.reasoning.strip(), trace.answer.strip()) == Trace(
        ({"role": "user", "content": "1+1?"},), "One and one.", "It is 2."
    )


def test_all_turns_before_the_last_assistant_turn_are_prompt() -> None:
    turns = [USER, {"role": "assistant", "content": "2"}, {"role": "user", "content": "Sure?"}]
    row = {"messages": [*turns, {"role": "assistant", "content": R1_VALUE}]}
    trace = read_row(SOURCES["local"], row)
    assert trace is not None
    assert trace.messages == tuple(turns)


def test_rows_of_other_tasks_are_no_traces() -> None:
    row = {"task_type": "code", "prompt": "1+1?", "llm_response": R1_VALUE}
    assert read_row(SOURCES["synthetic_1"], row) is None


BAD = {
    "no markers": ("nemotron_math", {"input": [USER], "output": "2"}, "no <think> ... </think>"),
    "an open thought": (
        "nemotron_math",
        {"input": [USER], "output": "<think>1"},
        "no <think> ... </think>",
    ),
    "two thoughts": (
        "nemotron_math",
        {"input": [USER], "output": R1_VALUE + R1_VALUE},
        "more than once",
    ),
    "two ends": (
        "nemotron_math",
        {"input": [USER], "output": R1_VALUE + "</think>"},
        "more than once",
    ),
    "text before": (
        "nemotron_math",
        {"input": [USER], "output": "Hm. " + R1_VALUE},
        "text before <think>",
    ),
    "no messages": ("nemotron_math", {"input": [], "output": R1_VALUE}, "no messages"),
    "a null output": (
        "nemotron_math",
        {"input": [USER], "output": None},
        "NoneType where text is needed",
    ),
    "messages of text": (
        "nemotron_math",
        {"input": ["1+1?"], "output": R1_VALUE},
        "a message is not",
    ),
    "two responses": (
        "synthetic_1",
        {"task_type": "verifiable_math", "prompt": "1+1?", "llm_response": [R1_VALUE, R1_VALUE]},
        "list where text is needed",
    ),
    "no solution": (
        "sky_t1",
        stratos_row(STRATOS_VALUE.partition("<|begin_of_solution|>")[0]),
        "no <|begin_of_sol",
    ),
    "text after": (
        "sky_t1",
        stratos_row(STRATOS_VALUE + "And so."),
        "text after <|end_of_solution|>",
    ),
    "no conversation": ("sky_t1", {"conversations": None}, "conversations is not a list"),
    "half of a surrogate pair": (
        "nemotron_math",
        {"input": [USER], "output": R1_VALUE + "\ud800"},
        "valid Unicode",
    ),
    "half of one in a message": (
        "nemotron_math",
        {"input": [{"role": "user", "content": "1\udc00"}], "output": R1_VALUE},
        "text that is not valid Unicode",
    ),
    "user last": (
        "sky_t1",
        {"conversations": [{"from": "user", "value": "1+1?"}]},
        "not the assistant's",
    ),
}


@pytest.mark.parametrize(("source", "row", "reason"), BAD.values(), ids=BAD)
def test_a_bad_row_says_what_is_wrong(source: str, row: dict, reason: str) -> None:
    with pytest.raises(BadRow) as caught:
        read_row(SOURCES[source], row)
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("source", "row", "missing"),
    [
        ("local", {"prompt": "1+1?", "reasoning": "One."}, "answer"),
        ("local", {"question": "1+1?"}, "prompt"),
        ("local", {"messages": [USER]}, "reasoning"),
        ("bespoke_stratos", {"system": "", "messages": []}, "conversations"),
        ("synthetic_1", {"prompt": "1+1?", "llm_response": R1_VALUE}, "task_type"),
        ("nemotron_math", {"input": [USER]}, "output"),
    ],
)
def test_a_missing_column_is_the_users_error(source: str, row: dict, missing: str) -> None:
    with pytest.raises(UserError) as caught:
        read_row(SOURCES[source], row)
    message = str(caught.value)
    assert f"no column '{missing}'" in message
    assert f"the row has {', '.join(row)}" in message
    assert "; ".join(SOURCES[source].columns) in message
