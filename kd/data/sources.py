"""One dataset row -> one Trace: messages before the last assistant turn, reasoning, answer.

Rows are written by others: what a row says wrongly is a BadRow, to be counted; a column that is not
there at all is the user's error. The system message of a row is not read: data.system_prompt
replaces it (see sections.py).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from kd.errors import UserError

Row = Mapping[str, Any]
Message = dict[str, str]


class BadRow(ValueError):
    """A row that cannot be trained on; the message is the reason, the same for rows of a kind."""


@dataclass(frozen=True)
class Trace:
    # All before the last assistant turn: {"role": ..., "content": ...}
    messages: tuple[Message, ...]
    reasoning: str
    answer: str


@dataclass(frozen=True)
class Source:
    """Where rows come from and how one is read. `to_trace` gives None for an unwanted task."""

    to_trace: Callable[[Row], Trace | None]
    columns: tuple[str, ...]
    hub_id: str | None = None
    config: str | None = None
    split: str = "train"


def read_row(source: Source, row: Row) -> Trace | None:
    """The Trace of a row, or None where the row is of another task.

    Raises UserError (columns found and needed) when a column is missing, BadRow when its content is
    unusable.
    """
    try:
        return source.to_trace(row)
    except KeyError as missing:
        raise UserError(
            f"no column {missing}; the row has {', '.join(row)}; needed: "
            f"{'; '.join(source.columns)}. Say in [data.columns] which columns have other names"
        ) from None


def _local(row: Row) -> Trace:
    if row.get("messages") is None:
        return Trace(_question(row["prompt"]), _text(row["reasoning"]), _text(row["answer"]))
    *before, last = _messages(row["messages"])
    if last["role"] != "assistant":
        return Trace((*before, last), _text(row["reasoning"]), _text(row["answer"]))
    if row.get("reasoning") is None and row.get("answer") is None:
        return Trace(tuple(before), *_split_think(last["content"]))
    return Trace(tuple(before), _text(row["reasoning"]), _text(row["answer"]))


def _stratos(row: Row) -> Trace:
    """Rows of Bespoke-Stratos, OpenThoughts and Sky-T1: a list of {from, value}."""
    turns = row["conversations"]
    names = {"from": "role", "value": "content"}
    if not isinstance(turns, list) or not all(
        isinstance(t, dict) and names.keys() <= t.keys() for t in turns
    ):
        raise BadRow("conversations is not a list of {from, value}")
    *before, last = _messages([{names[key]: turn[key] for key in names} for turn in turns])
    if last["role"] != "assistant":
        raise BadRow("the last turn is not the assistant's")
    reasoning, rest = _split(last["content"], "<|begin_of_thought|>", "<|end_of_thought|>")
    answer, after = _split(rest, "<|begin_of_solution|>", "<|end_of_solution|>")
    if after.strip():
        raise BadRow("text after <|end_of_solution|>")
    return Trace(tuple(before), reasoning, answer)


def _synthetic_1(row: Row) -> Trace | None:
    if row["task_type"] != "verifiable_math":
        return None
    return Trace(_question(_only(row["prompt"])), *_split_think(_text(_only(row["llm_response"]))))


def _nemotron_math(row: Row) -> Trace:
    return Trace(_messages(row["input"]), *_split_think(_text(row["output"])))


_STRATOS_COLUMNS = ("conversations: list of {from, value}",)
SOURCES: dict[str, Source] = {
    "local": Source(
        _local,
        columns=(
            "prompt, reasoning, answer",
            "or messages, reasoning, answer",
            "or messages ending with <think>",
        ),
    ),
    "bespoke_stratos": Source(_stratos, _STRATOS_COLUMNS, hub_id="bespokelabs/Bespoke-Stratos-17k"),
    "openthoughts": Source(_stratos, _STRATOS_COLUMNS, hub_id="open-thoughts/OpenThoughts-114k"),
    "sky_t1": Source(_stratos, _STRATOS_COLUMNS, hub_id="NovaSky-AI/Sky-T1_data_17k"),
    "synthetic_1": Source(
        _synthetic_1,
        ("task_type", "prompt", "llm_response with <think>"),
        hub_id="PrimeIntellect/SYNTHETIC-1",
    ),
    "nemotron_math": Source(
        _nemotron_math,
        ("input: list of {role, content}", "output with <think>"),
        hub_id="nvidia/Llama-Nemotron-Post-Training-Dataset",
        config="SFT",
        split="math",
    ),
}


def _split_think(text: str) -> tuple[str, str]:
    return _split(text, "<think>", "</think>")


def _split(text: str, opening: str, closing: str) -> tuple[str, str]:
    """Text between two markers, and after them. Each occurs once, the first at the start."""
    before, opened, rest = text.partition(opening)
    inside, closed, after = rest.partition(closing)
    if not (opened and closed):
        raise BadRow(f"no {opening} ... {closing}")
    if opening in rest or closing in before + after:
        raise BadRow(f"{opening} or {closing} more than once")
    if before.strip():
        raise BadRow(f"text before {opening}")
    return inside, after


def _question(value: Any) -> tuple[Message, ...]:
    return ({"role": "user", "content": _text(value)},)


def _messages(value: Any) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise BadRow("no messages")
    for message in value:
        if not isinstance(message, dict) or not all(
            isinstance(message.get(key), str) for key in ("role", "content")
        ):
            raise BadRow("a message is not {role: text, content: text}")
    return tuple({key: _text(message[key]) for key in ("role", "content")} for message in value)


def _only(value: Any) -> Any:
    """The element of a one-element list, or the value itself."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise BadRow(f"{type(value).__name__} where text is needed")
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a pair, as "\ud800" in JSON, which no tokenizer takes
        raise BadRow("text that is not valid Unicode") from None
    return value
