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


def test_turns_of_one_side_in_a_row_stay_as_they_are() -> None:
    turns = [USER, {"role": "user", "content": "Well?"}]
    trace = read_row(SOURCES["local"], {"messages": [*turns, {"role": "gpt", "content": R1_VALUE}]})
    assert trace is not None
    assert trace.messages == tuple(turns)


def test_all_turns_before_the_last_assistant_turn_are_prompt() -> None:
    turns = [USER, {"role": "assistant", "content": "2"}, {"role": "user", "content": "Sure?"}]
    row = {"messages": [*turns, {"role": "assistant", "content": R1_VALUE}]}
    trace = read_row(SOURCES["local"], row)
    assert trace is not None
    assert trace.messages == tuple(turns)


THOUGHT = {"role": "assistant", "content": R1_VALUE}
ANSWER = {"role": "assistant", "content": "It is 2."}
FORMS = {
    "other names of roles": {"messages": [{"role": "human", "content": "1+1?"}, THOUGHT]},
    "ShareGPT": {
        "conversations": [{"from": "human", "value": "1+1?"}, {"from": "gpt", "value": R1_VALUE}]
    },
    "ShareGPT in messages": {
        "messages": [{"from": "human", "value": "1+1?"}, {"from": "gpt", "value": R1_VALUE}]
    },
    "role and content in conversations": {"conversations": [USER, THOUGHT]},
    "both columns": {"conversations": [USER, THOUGHT], "messages": [USER, THOUGHT]},
    "Stratos": stratos_row(),
    "no opening marker": {
        "messages": [USER, {**THOUGHT, "content": R1_VALUE.removeprefix("<think>")}]
    },
    "reasoning_content": {"messages": [USER, {**ANSWER, "reasoning_content": "One and one."}]},
    "reasoning": {"messages": [USER, {**ANSWER, "reasoning": "One and one.", "thinking": None}]},
    "thinking": {"messages": [USER, {**ANSWER, "thinking": "One and one."}]},
    "parts": {"messages": [USER, {**ANSWER, "content": [{"type": "text", "text": R1_VALUE}]}]},
    "the thought in a column": {"messages": [USER, ANSWER], "reasoning": "One and one."},
    "columns that agree": {
        "messages": [USER, THOUGHT],
        "prompt": "1+1?",
        "reasoning": " One and one.",
        "answer": "It is 2.",
    },
    "columns of nulls": {
        "messages": [USER, THOUGHT],
        "prompt": None,
        "reasoning": None,
        "answer": None,
        "tools": None,
        "conversations": None,
    },
    "a prompt of messages": {"prompt": [USER], "reasoning": "One and one.", "answer": "It is 2."},
}


@pytest.mark.parametrize("row", FORMS.values(), ids=FORMS)
def test_a_local_row_of_any_usual_form_gives_the_same_trace(row: dict) -> None:
    trace = read_row(SOURCES["local"], row)
    assert trace is not None
    assert Trace(trace.messages, trace.reasoning.strip(), trace.answer.strip()) == Trace(
        (USER,), "One and one.", "It is 2."
    )


@pytest.mark.parametrize("source", ["bespoke_stratos", "openthoughts", "sky_t1"])
@pytest.mark.parametrize("name", ["ShareGPT", "role and content in conversations", "Stratos"])
def test_a_conversation_of_a_hub_source_may_have_either_form(source: str, name: str) -> None:
    trace = read_row(SOURCES[source], FORMS[name])
    assert trace == read_row(SOURCES["local"], FORMS[name])


def test_tools_and_calls_stay_with_the_conversation() -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "calc"}}]}
    heard = {"role": "tool", "content": "2"}
    tools = [{"type": "function", "function": {"name": "calc"}}]
    row = {"messages": [USER, call, heard, THOUGHT], "tools": tools}
    for source, column in (("local", "messages"), ("sky_t1", "conversations")):
        trace = read_row(SOURCES[source], {column: row["messages"], "tools": tools})
        assert trace is not None
        assert (trace.messages, trace.tools) == ((USER, call, heard), tuple(tools))


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
    "an unknown role": ("local", {"messages": [{**USER, "role": "critic"}]}, "role 'critic'"),
    "a call to learn": (
        "local",
        {"messages": [USER, {**THOUGHT, "tool_calls": [{"function": {"name": "calc"}}]}]},
        "the last turn calls a tool",
    ),
    "a call alone": (
        "local",
        {"messages": [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}]},
        "the last turn calls a tool",
    ),
    "two places for a thought": (
        "local",
        {"messages": [USER, {**THOUGHT, "reasoning_content": "One and one."}]},
        "two thoughts",
    ),
    "no thought": ("local", {"messages": [USER, ANSWER]}, "no <think> ... </think>"),
    "another thought in a column": (
        "local",
        {"messages": [USER, THOUGHT], "reasoning": "Two and two."},
        "the column reasoning and the last assistant turn disagree",
    ),
    "another answer in a column": (
        "local",
        {"messages": [USER, THOUGHT], "answer": "2"},
        "the column answer and the last assistant turn disagree",
    ),
    "another answer beside a thought": (
        "local",
        {"messages": [USER, ANSWER], "reasoning": "One and one.", "answer": "It is 3."},
        "the column answer and the last assistant turn disagree",
    ),
    "another prompt": (
        "local",
        {"messages": [USER, THOUGHT], "prompt": "2+2?"},
        "the column prompt is not in the messages",
    ),
    "two conversations": (
        "local",
        {"messages": [USER, THOUGHT], "conversations": [{**USER, "content": "2?"}, THOUGHT]},
        "messages and conversations disagree",
    ),
    "tools of text": (
        "local",
        {"messages": [USER, THOUGHT], "tools": "calc"},
        "tools: not valid JSON",
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
