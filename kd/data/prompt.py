"""Messages -> the text of the prompt, through the chat template.

Each prompt is checked for two faults of templates: text that is not printed would be lost
silently, and after an empty thought the model would learn to think twice.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerFast

from kd.data.chat_template import names_read, run_template
from kd.data.turns import BadRow, Message
from kd.errors import UserError
from kd.recipe import DataSection

# <think>, </think>, [THINK], <|begin_of_thought|>, <|START_THINKING|>, <seed:think>
_MARK = r"[<\[]\|?/?[\w:]*(?:think|thought|reason)\w*\|?[>\]]"
_MARK_AT_END = re.compile(rf"{_MARK}\Z", re.IGNORECASE)
# With a line break between its markers, as no sentence about them has
_EMPTY_THOUGHT = re.compile(rf"{_MARK}[ \t]*\n\s*{_MARK}", re.IGNORECASE)


def render_prompt(
    tokenizer: PreTrainedTokenizerFast,
    messages: Sequence[Message],
    data: DataSection,
    tools: Sequence[dict[str, Any]] = (),
) -> str:
    """The prompt of training, generation and evaluation; needs add_special_tokens=False.

    data.system_prompt replaces any system message; none is sent when it is None. Raises UserError
    without a chat template, BadRow when the template refuses these messages, does not print all of
    them, or leaves no place for a thought.
    """
    return open_prompt(tokenizer, messages, data, tools)[0]


def open_prompt(
    tokenizer: PreTrainedTokenizerFast,
    messages: Sequence[Message],
    data: DataSection,
    tools: Sequence[dict[str, Any]] = (),
) -> tuple[str, str]:
    """As render_prompt, and what of data.think_open is still to be written behind the prompt."""
    turns = [message for message in messages if message["role"] != "system"]
    if not any(turn["content"].strip() for turn in turns):
        raise BadRow("empty prompt")
    if data.system_prompt is not None:
        turns.insert(0, {"role": "system", "content": data.system_prompt})
    prompt = apply_template(tokenizer, turns, data, tools)
    behind = prompt[_end_of_messages(prompt, turns) :]
    for has_text in (True, False):  # next to a text, templates may treat calls in another way
        others = [_without_calls(turn, has_text) for turn in turns]
        if others != turns:
            _check_printed("tool_calls", prompt, tokenizer, others, data, tools)
    if tools:
        _check_printed("tools", prompt, tokenizer, turns, data, ())
    _check_one_thought(behind, data)
    return prompt, _still_to_open(behind, data.think_open)


def apply_template(
    tokenizer: PreTrainedTokenizerFast,
    turns: Sequence[Message],
    data: DataSection,
    tools: Sequence[dict[str, Any]] = (),
    *,
    add_generation_prompt: bool = True,
) -> str:
    """What the chat template writes for these turns, unchecked."""
    if tokenizer.chat_template is None:
        raise UserError(
            "neither the teacher's nor the student's tokenizer has a chat template: set "
            "data.chat_template to a Jinja file"
        )
    try:
        template = tokenizer.get_chat_template(tools=list(tools) or None)
    except ValueError as error:  # several templates, and none of them the default
        raise UserError(f"set data.chat_template to a Jinja file: {error}") from None
    variables = tokenizer.special_tokens_map | data.template_kwargs
    variables |= {
        "messages": [_with_thinking(turn) for turn in turns],
        "tools": list(tools) or None,
        "documents": None,
        "add_generation_prompt": add_generation_prompt,
    }
    return run_template(template, variables, data.date)


def variables_of(tokenizer: PreTrainedTokenizerFast) -> set[str]:
    """What data.template_kwargs may set: what the chat template reads, and no row, tokenizer or
    data.date gives it.
    """
    templates = tokenizer.chat_template
    texts = templates.values() if isinstance(templates, dict) else [templates]
    given = {"messages", "tools", "documents", "add_generation_prompt", "range", "lipsum"}
    given |= {"raise_exception", "strftime_now", "dict", "namespace", "cycler", "joiner"}
    given |= set(tokenizer.SPECIAL_TOKENS_ATTRIBUTES)
    return {name for text in texts for name in names_read(text)} - given


def _with_thinking(turn: Message) -> Message:
    """Templates read a turn's thought under one name or the other."""
    thought = turn.get("reasoning_content")
    return turn if thought is None else {"thinking": thought, **turn}


def _end_of_messages(prompt: str, turns: Sequence[Message]) -> int:
    """Where in the prompt the last message's text ends. Raises BadRow when one is not there.

    Templates may trim texts, delete the thoughts of earlier turns, put the system message elsewhere
    and write what a tool says as JSON; all else must be printed, and in order.
    """
    place = 0
    for turn in turns:
        text = turn["content"].strip()
        if turn["role"] == "assistant":
            text = text.rpartition("</think>")[2].strip()
        if turn["role"] == "system":
            if text not in prompt:
                raise BadRow(_not_printed("data.system_prompt"))
            continue
        forms = [text]
        if turn["role"] == "tool":
            forms += [json.dumps(text, ensure_ascii=escape)[1:-1] for escape in (False, True)]
        found = next((form for form in forms if prompt.find(form, place) >= 0), None)
        if found is None:
            raise BadRow(_not_printed(f"the text of role {turn['role']}"))
        place = prompt.index(found, place) + len(found)
    return place


def _without_calls(turn: Message, has_text: bool) -> Message:
    if bool(turn["content"].strip()) != has_text:
        return turn
    return {key: value for key, value in turn.items() if key != "tool_calls"}


def _check_printed(
    what: str,
    prompt: str,
    tokenizer: PreTrainedTokenizerFast,
    turns: Sequence[Message],
    data: DataSection,
    tools: Sequence[dict[str, Any]],
) -> None:
    """Raise BadRow if the prompt is the same without it."""
    try:
        without = apply_template(tokenizer, turns, data, tools)
    except BadRow:  # so the template looks at it
        return
    if without == prompt:
        raise BadRow(_not_printed(what))


def _not_printed(what: str) -> str:
    return f"the chat template does not print {what}: set data.chat_template to one that does"


def _check_one_thought(behind: str, data: DataSection) -> None:
    """Behind the messages the prompt may open the thought with data.think_open, and no other
    marker may be the last thing that the model reads.
    """
    opening, closing = data.think_open.strip(), data.think_close.strip()
    end = behind.rstrip()
    mark = _MARK_AT_END.search(end)
    last = mark[0] if mark else closing if closing and end.endswith(closing) else opening
    if _EMPTY_THOUGHT.search(end):
        last = "an empty thought"
    if last != opening:
        raise BadRow(
            f"the chat template ends the prompt with {last}, so the trace's own thought would be "
            "a second one: set data.template_kwargs, such as enable_thinking = true, or, if this "
            f"text opens the thought, set data.think_open to it (now {data.think_open!r})"
        )


def _still_to_open(behind: str, think_open: str) -> str:
    """What of think_open the prompt does not yet end with; the template's own blanks after the
    marker are kept.
    """
    marker = think_open.strip()
    if not marker or not behind.rstrip().endswith(marker):
        return think_open
    return think_open.partition(marker)[2] if behind.endswith(marker) else ""
