"""One dataset row -> one Trace: messages before the last assistant turn, reasoning, answer.

A row with unusable content is a BadRow, which is counted; a missing column is the user's error. The
system message of a row is not read: data.system_prompt replaces it (see sections.py).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from kd.data.thought import Fault, split_thought
from kd.data.turns import BadRow, Message, read_tools, read_turns, text_of
from kd.errors import UserError

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Trace:
    # All before the last assistant turn: {"role": ..., "content": ...}, and what of tool_calls,
    # tool_call_id, name and reasoning_content the row has
    messages: tuple[Message, ...]
    reasoning: str
    answer: str
    tools: tuple[dict[str, Any], ...] = ()


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
            f"{'; '.join(source.columns)}. If a column has another name, write it into "
            "[data.columns]"
        ) from None


def _local(row: Row) -> Trace:
    turns, tools = _conversation(row), read_tools(row.get("tools"))
    if turns is None:
        question = _question(row["prompt"])
        return Trace(question, text_of(row["reasoning"]), text_of(row["answer"]), tools)
    *before, last = turns
    if last["role"] != "assistant":
        return Trace(turns, text_of(row["reasoning"]), text_of(row["answer"]), tools)
    thought, answer = _thought_and_answer(last)
    thought = _agreed("reasoning", row, thought)
    if not thought:
        raise BadRow("no <think> ... </think>")
    return Trace(tuple(before), thought, _agreed("answer", row, answer), tools)


def _conversation(row: Row) -> tuple[Message, ...] | None:
    """The turns of a row that has any; its other columns must not say otherwise."""
    given = [row[name] for name in ("messages", "conversations") if row.get(name) is not None]
    if not given:
        return None
    turns = read_turns(given[0])
    if any(read_turns(other) != turns for other in given[1:]):
        raise BadRow("messages and conversations disagree")
    texts = {(turn["role"], turn["content"].strip()) for turn in turns}
    if row.get("prompt") is not None and not texts.issuperset(
        (turn["role"], turn["content"].strip()) for turn in _question(row["prompt"])
    ):
        raise BadRow("the column prompt is not in the messages")
    return turns


def _agreed(column: str, row: Row, in_turn: str) -> str:
    """What the column says, or else the turn; both must say the same."""
    value = row.get(column)
    in_column = "" if value is None else text_of(value)
    if in_column.strip() and in_turn.strip() and in_column.strip() != in_turn.strip():
        raise BadRow(f"the column {column} and the last assistant turn disagree")
    return in_turn if in_turn.strip() else in_column


def _stratos(row: Row) -> Trace:
    """Rows of Bespoke-Stratos, OpenThoughts and Sky-T1: a list of {from, value}."""
    if not isinstance(row["conversations"], list):
        raise BadRow("conversations is not a list of {from, value}")
    *before, last = read_turns(row["conversations"])
    if last["role"] != "assistant":
        raise BadRow("the last turn is not the assistant's")
    thought, answer = _thought_and_answer(last)
    if not thought:
        raise BadRow("no <|begin_of_thought|> ... <|end_of_thought|>")
    return Trace(tuple(before), thought, answer, read_tools(row.get("tools")))


def _synthetic_1(row: Row) -> Trace | None:
    if row["task_type"] != "verifiable_math":
        return None
    response = text_of(_only(row["llm_response"]))
    return Trace(_question(_only(row["prompt"])), *_split_think(response))


def _nemotron_math(row: Row) -> Trace:
    return Trace(read_turns(row["input"]), *_split_think(text_of(row["output"])))


_STRATOS_COLUMNS = ("conversations: list of {from, value} or {role, content}",)
SOURCES: dict[str, Source] = {
    "local": Source(
        _local,
        columns=(
            "prompt, reasoning, answer",
            "or messages, reasoning, answer",
            "or messages (or conversations) whose last turn has <think> or reasoning_content",
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


_FAULTS: dict[Fault, str] = {
    "unclosed": "no {0} ... {1}",
    "reopened": "{0} or {1} appears more than once",
    "text before": "text before {0}",
}


def _thought_and_answer(turn: Message) -> tuple[str, str]:
    """Of the turn to be learned; the thought is empty where the turn has none."""
    if "tool_calls" in turn:
        raise BadRow("the last turn calls a tool, but only text can be learned")
    content, thought = turn["content"], turn.get("reasoning_content", "")
    split = next((split for marker, split in _SPLITS.items() if marker in content), None)
    if split is None:
        return thought, content
    if thought:
        raise BadRow("the last turn has two thoughts, one inside its content and one outside")
    return split(content)


def _split_think(text: str) -> tuple[str, str]:
    # The opening marker may stand in the prompt instead
    return _split(text, "<think>", "</think>", may_be_open=True)


def _split_stratos(text: str) -> tuple[str, str]:
    thought, rest = _split(text, "<|begin_of_thought|>", "<|end_of_thought|>")
    answer, after = _split(rest, "<|begin_of_solution|>", "<|end_of_solution|>")
    if after.strip():
        raise BadRow("text after <|end_of_solution|>")
    return thought, answer


# A marker that only a turn with a thought has, and how such a turn is divided
_SPLITS = {
    "<|begin_of_thought|>": _split_stratos,
    "<|end_of_thought|>": _split_stratos,
    "<think>": _split_think,
    "</think>": _split_think,
}


def _split(text: str, opening: str, closing: str, *, may_be_open: bool = False) -> tuple[str, str]:
    parts = split_thought(text, opening, closing)
    if opening not in text and not may_be_open:
        parts = "unclosed"
    if isinstance(parts, str):
        raise BadRow(_FAULTS[parts].format(opening, closing))
    return parts


def _question(value: Any) -> tuple[Message, ...]:
    """A question, or the messages up to it."""
    if isinstance(value, list):
        return read_turns(value)
    return ({"role": "user", "content": text_of(value)},)


def _only(value: Any) -> Any:
    """The element of a one-element list, or the value itself."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value
