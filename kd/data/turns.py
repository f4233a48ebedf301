"""The turns of a row's conversation, in the one form that a chat template reads.

Roles, field names and forms of content differ between data sets. They are mapped to one form, or
the row is bad, since a role that a template does not know would vanish from the prompt.
"""

import json
from collections.abc import Mapping
from typing import Any

from kd.errors import UserError
from kd.files import parse_json

Message = dict[str, Any]

ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(
        ("assistant", "gpt", "chatgpt", "model", "bot", "chatbot", "ai", "llm"), "assistant"
    ),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(
        (
            "tool",
            "tool_response",
            "tool_result",
            "tool_output",
            "function",
            "function_response",
            "observation",
            "ipython",
        ),
        "tool",
    ),
}
_THOUGHT_FIELDS = ("reasoning_content", "reasoning", "thinking", "thought")


class BadRow(ValueError):
    """A row that cannot be trained on; the message is the reason, the same for rows of a kind."""


def read_turns(value: Any) -> tuple[Message, ...]:
    """[{role, content}] or [{from, value}] as messages: role and content, and what of name,
    tool_call_id, tool_calls and reasoning_content they have.

    Parquet fills what a message lacks with null, which is taken for absent. Raises BadRow.
    """
    if not isinstance(value, list) or not value:
        raise BadRow("no messages")
    return tuple(_read_turn(turn) for turn in value)


def read_tools(value: Any) -> tuple[dict[str, Any], ...]:
    """The functions that the model may call: a list of JSON schemas, or the JSON of one."""
    if isinstance(value, str) and value.strip():
        try:
            value = parse_json(value, "tools")
        except UserError as error:
            raise BadRow(str(error)) from None
    if value is None or value == "":
        return ()
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise BadRow("tools is not a list of objects")
    return tuple(_plain("tools", tool) for tool in value)


def text_of(value: Any) -> str:
    """The value, if it is text that a tokenizer takes. Raises BadRow."""
    if not isinstance(value, str):
        raise BadRow(f"{type(value).__name__} where text is needed")
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a pair, as "\ud800" in JSON
        raise BadRow("text that is not valid Unicode") from None
    return value


def _read_turn(turn: Any) -> Message:
    if not isinstance(turn, Mapping):
        raise BadRow("a message is not {role: text, content: text}")
    given = {key: value for key, value in turn.items() if value is not None}
    role, content = _one_of(given, "role", "from"), _one_of(given, "content", "value")
    if not isinstance(role, str):
        raise BadRow("a message is not {role: text, content: text}")
    if role.strip().casefold() not in ROLES:
        raise BadRow(f"unknown role {role[:40]!r}: known are {', '.join(ROLES)}")
    message: Message = {"role": ROLES[role.strip().casefold()]}
    if message["role"] == "system" and content is None:  # data.system_prompt replaces it
        content = ""
    if given.get("function_call"):
        raise BadRow("a message has function_call: write it as tool_calls")
    calls = _plain("tool_calls", given.get("tool_calls") or [])
    if content is None and not calls:
        raise BadRow(f"a message of role {role!r} has no content")
    message["content"] = _content_of("" if content is None else content)
    if thought := _thought_of(given):
        message["reasoning_content"] = thought
    if calls:
        if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
            raise BadRow("tool_calls is not a list of objects")
        message["tool_calls"] = calls
    return message | {key: text_of(given[key]) for key in ("name", "tool_call_id") if key in given}


def _one_of(given: Mapping[str, Any], key: str, other: str) -> Any:
    """The value of one of two keys that mean the same."""
    if key in given and other in given and given[key] != given[other]:
        raise BadRow(f"{key} and {other} of a message disagree")
    return given.get(key, given.get(other))


def _thought_of(given: Mapping[str, Any]) -> str:
    """What the message keeps of its thought next to content, blank when it has none."""
    found = {_content_of(given[key]).strip() for key in _THOUGHT_FIELDS if key in given} - {""}
    if len(found) > 1:
        raise BadRow(f"{', '.join(key for key in _THOUGHT_FIELDS if key in given)} disagree")
    return found.pop() if found else ""


def _content_of(value: Any) -> str:
    """A text, or the texts of a list of parts, {"type": "text", "text": ...}, joined."""
    if not isinstance(value, list):
        return text_of(value)
    for part in value:
        if not isinstance(part, Mapping) or part.get("type", "text") != "text":
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise BadRow(f"a part of a message's content is not text but {kind}")
    return "".join(text_of(part.get("text")) for part in value)


def _plain(name: str, value: Any) -> Any:
    """A copy that JSON can hold, which is what a template may be given."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()
        return json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise BadRow(f"{name} is not plain JSON: {error}") from None
