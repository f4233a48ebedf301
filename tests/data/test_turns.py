"""Turns of every form become messages of one form, or the row is bad and says why."""

import pytest

from kd.data.turns import ROLES, BadRow, read_tools, read_turns

USER = {"role": "user", "content": "1+1?"}
CALL = {"type": "function", "function": {"name": "calc", "arguments": '{"x": 1}'}}


@pytest.mark.parametrize(
    ("role", "known"),
    [
        ("human", "user"),
        ("User", "user"),
        (" USER ", "user"),
        ("prompter", "user"),
        ("gpt", "assistant"),
        ("Model", "assistant"),
        ("bot", "assistant"),
        ("developer", "system"),
        ("System", "system"),
        ("function", "tool"),
        ("observation", "tool"),
        ("ipython", "tool"),
    ],
)
@pytest.mark.parametrize(("key", "text"), [("role", "content"), ("from", "value")])
def test_roles_of_all_data_sets_are_mapped_to_four(
    role: str, known: str, key: str, text: str
) -> None:
    assert read_turns([{key: role, text: "x"}]) == ({"role": known, "content": "x"},)
    assert set(ROLES.values()) == {"user", "assistant", "system", "tool"}


@pytest.mark.parametrize("role", ["critic", "", "function_call", "user\u200b", "0"])
def test_an_unknown_role_is_named(role: str) -> None:
    with pytest.raises(BadRow) as caught:
        read_turns([USER, {"role": role, "content": "x"}])
    assert f"unknown role {role!r}" in str(caught.value)


def test_what_belongs_to_a_turn_is_kept_and_nulls_of_parquet_are_not() -> None:
    filled = {"tool_calls": None, "name": None, "from": None, "weight": 1.0, "thinking": None}
    turns = [
        {**USER, **filled},
        {"role": "assistant", "content": None, "tool_calls": [CALL], "thinking": " I call. "},
        {"role": "tool", "content": "2", "name": "calc", "tool_call_id": "c1", "tool_calls": []},
        {"from": "gpt", "value": "2", "reasoning": "So.", "reasoning_content": "So."},
    ]
    assert read_turns(turns) == (
        USER,
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "I call.",
            "tool_calls": [CALL],
        },
        {"role": "tool", "content": "2", "name": "calc", "tool_call_id": "c1"},
        {"role": "assistant", "content": "2", "reasoning_content": "So."},
    )


def test_a_system_message_may_be_empty() -> None:
    turns = [{"role": "system", "content": None}, USER]
    assert read_turns(turns) == ({"role": "system", "content": ""}, USER)


def test_parts_of_text_are_joined() -> None:
    parts = [{"type": "text", "text": "1+"}, {"text": "1?"}]
    assert read_turns([{"role": "user", "content": parts}]) == (USER,)


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        ("1+1?", "a message is not {role"),
        ({"content": "x"}, "a message is not {role"),
        ({"role": 1, "content": "x"}, "a message is not {role"),
        ({"role": "user"}, "role 'user' has no content"),
        ({"role": "user", "content": None}, "role 'user' has no content"),
        ({"role": "user", "content": {"text": "x"}}, "dict where text is needed"),
        ({"role": "user", "content": 4}, "int where text is needed"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "not text but image_url"),
        ({"role": "user", "content": ["x"]}, "not text but str"),
        ({"role": "user", "content": [{"type": "text", "text": 1}]}, "int where text is needed"),
        ({"role": "user", "content": "\ud800"}, "not valid Unicode"),
        ({"role": "user", "from": "gpt", "content": "x"}, "role and from of a message disagree"),
        ({"role": "user", "content": "x", "value": "y"}, "content and value of a message disagree"),
        (
            {"role": "assistant", "content": "x", "reasoning": "a", "thinking": "b"},
            "reasoning, thinking disagree",
        ),
        ({"role": "assistant", "content": "", "tool_calls": "calc"}, "not a list of objects"),
        ({"role": "assistant", "content": "", "tool_calls": [float("nan")]}, "not plain JSON"),
        ({"role": "assistant", "content": "", "tool_calls": [{"a": "\ud800"}]}, "not plain JSON"),
        ({"role": "assistant", "content": "", "function_call": {"name": "f"}}, "function_call"),
    ],
)
def test_a_turn_that_cannot_be_read_says_why(turn: object, reason: str) -> None:
    with pytest.raises(BadRow) as caught:
        read_turns([USER, turn])
    assert reason in str(caught.value)


@pytest.mark.parametrize("value", [None, "", []])
def test_a_row_may_have_no_tools(value: object) -> None:
    assert read_tools(value) == ()


def test_tools_are_objects_or_their_json() -> None:
    assert (
        read_tools([CALL])
        == read_tools(
            '[{"type": "function", "function": '
            + ('{"name": "calc", "arguments": "{\\"x\\": 1}"}}]')
        )
        == (CALL,)
    )


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("[", "tools: not valid JSON"),
        ("[" * 100_000, "nested too deeply"),
        ({"a": 1}, "not a list"),
        (["f"], "not a list of objects"),
        ([{"f": float("inf")}], "not plain JSON"),
    ],
)
def test_tools_of_another_form_are_a_bad_row(value: object, reason: str) -> None:
    with pytest.raises(BadRow, match=reason):
        read_tools(value)
