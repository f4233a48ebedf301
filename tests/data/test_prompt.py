"""A prompt holds the whole conversation, and is open for exactly one thought."""

import copy
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from kd.data.prompt import render_prompt
from kd.data.sections import render
from kd.data.sources import Trace
from kd.data.turns import BadRow
from kd.recipe import DataSection

DATA = DataSection(path="rows.jsonl")
USER = {"role": "user", "content": " 1+1? "}
SAID = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nTwo. "}
CALL = {"type": "function", "function": {"name": "calc", "arguments": '{"x": 1}'}}
CALLS = {"role": "assistant", "content": "", "tool_calls": [CALL]}
HEARD = {"role": "tool", "content": 'It "is"\n2 \u00e9'}
TOOL = {"type": "function", "function": {"name": "calc", "parameters": {}}}
ALL = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}[{{ m.role }}]"
    "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}{{ m.content | trim }}{% endfor %}"
    "[assistant]"
)


def written(text: str) -> str:
    """Jinja that writes it, with the line break that ends a template and is not written itself."""
    return "{{ '" + text.replace("\n", "\\n") + "' }}"


@pytest.fixture
def with_template(tiny: PreTrainedTokenizerFast) -> Any:
    def build(template: str) -> PreTrainedTokenizerFast:
        tokenizer = copy.deepcopy(tiny)
        tokenizer.chat_template = template
        return tokenizer

    return build


def test_tools_calls_and_results_are_in_the_prompt(qwen3: PreTrainedTokenizerFast) -> None:
    prompt = render_prompt(qwen3, [USER, CALLS, HEARD, SAID, USER], DATA, [TOOL])
    assert '{"name": "calc", "parameters": {}}' in prompt
    assert '<tool_call>\n{"name": "calc", "arguments": {"x": 1}}\n</tool_call>' in prompt
    assert f"<tool_response>\n{HEARD['content']}\n</tool_response>" in prompt
    assert prompt.count("1+1?") == 2
    assert prompt.endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize(
    ("removed", "turns", "tools", "reason"),
    [
        ("{{ m.content | trim }}", [USER], [], "the text of role user"),
        ("{{ tools | tojson }}", [USER], [TOOL], "tools"),
        ("{{ m.tool_calls | tojson }}", [USER, CALLS, HEARD], [TOOL], "tool_calls"),
    ],
)
def test_what_a_template_does_not_print_is_a_bad_row(
    with_template: Any, removed: str, turns: list[Any], tools: list[Any], reason: str
) -> None:
    assert render_prompt(with_template(ALL), turns, DATA, tools)
    with pytest.raises(BadRow, match=f"does not print {reason}: set data.chat_template"):
        render_prompt(with_template(ALL.replace(removed, "")), turns, DATA, tools)


@pytest.mark.parametrize("content", ["", "I call."])
def test_calls_are_looked_for_with_and_without_a_text_beside_them(
    with_template: Any, content: str
) -> None:
    other = "{% if m.tool_calls and " + ("not " if content else "") + "m.content %}"
    tokenizer = with_template(ALL.replace("{% if m.tool_calls %}", other))
    turns = [USER, {**CALLS, "content": "" if content else "I call."}, HEARD]
    assert render_prompt(tokenizer, turns, DATA)
    with pytest.raises(BadRow, match="does not print tool_calls"):
        render_prompt(tokenizer, [*turns, USER, {**CALLS, "content": content}, HEARD], DATA)


@pytest.mark.parametrize("role", ["user", "assistant", "tool"])
def test_a_role_that_the_template_leaves_out_is_named(with_template: Any, role: str) -> None:
    tokenizer = with_template(
        ALL.replace(
            "{% for m in messages %}", ("{% for m in messages if m.role != '" + role + "' %}")
        )
    )
    with pytest.raises(BadRow, match=f"does not print the text of role {role}"):
        render_prompt(tokenizer, [USER, SAID, HEARD, {"role": "user", "content": "Why?"}], DATA)


def test_each_of_several_turns_is_looked_for(with_template: Any) -> None:
    last_alone = with_template("{{ messages[-1].content }}")
    assert render_prompt(last_alone, [USER], DATA) == " 1+1? "
    with pytest.raises(BadRow, match="does not print the text of role user"):
        render_prompt(last_alone, [USER, {**USER, "content": "Why?"}], DATA)
    with pytest.raises(BadRow, match="does not print the text of role user"):
        render_prompt(last_alone, [USER, USER], DATA)  # the same text, once


def test_a_system_prompt_that_is_not_printed_names_its_key(with_template: Any) -> None:
    data = DataSection(path="rows.jsonl", system_prompt="Be brief.")
    assert "Be brief." in render_prompt(with_template(ALL), [USER], data)
    with pytest.raises(BadRow, match="does not print data.system_prompt"):
        render_prompt(with_template("{{ messages[-1].content }}"), [USER], data)


def test_a_template_may_write_results_as_json_and_the_system_prompt_later(
    with_template: Any,
) -> None:
    template = (
        "{% for m in messages if m.role != 'system' %}{{ m.content | tojson if m.role == 'tool' "
        "else m.content }}{% endfor %}{{ messages[0].content }}"
    )
    data = DataSection(path="rows.jsonl", system_prompt="Be brief.")
    prompt = render_prompt(with_template(template), [USER, HEARD], data)
    assert prompt == ' 1+1? "It \\"is\\"\\n2 \u00e9"Be brief.'


@pytest.mark.parametrize(
    "end",
    [
        "<think>\n\n</think>\n\n",
        "<think></think>",
        "</think>",
        "</think>\n",
        "<think>\nOk.\n</think>\n\n",
        "<think>\n</think>\nThe answer: ",
        "<thought>\n\n</thought>",
        "<|begin_of_thought|>\n\n<|end_of_thought|>",
        "[THINK]\n[/THINK]",
        "<seed:think>\n</seed:think>",
        "<|START_THINKING|><|END_THINKING|>",
        "<|begin_of_thought|>",  # opened, and not by the recipe's marker
    ],
)
def test_a_prompt_that_leaves_no_place_for_the_thought_is_refused(
    with_template: Any, end: str
) -> None:
    with pytest.raises(BadRow, match=r"data\.template_kwargs, such as enable_thinking = true"):
        render_prompt(with_template(ALL + written(end)), [USER], DATA)


@pytest.mark.parametrize(
    "end", ["", "<think>", "<think>\n", "Reason in <think> </think> tags.\nAssistant:", "[user]"]
)
def test_a_prompt_may_open_the_thought_and_speak_of_it(with_template: Any, end: str) -> None:
    assert render_prompt(with_template(ALL + written(end)), [USER], DATA).endswith(end)


@pytest.mark.parametrize(
    "text", ["<think>\n\n</think>", "Why </think>", "What is <think>", "k", "<", "think"]
)
@pytest.mark.parametrize(
    ("end", "cot"),
    [("", "<think>\na\n</think>\n\n"), ("[assistant]<think>\n", "a\n</think>\n\n")],
)
def test_markers_in_the_question_open_and_close_nothing(
    with_template: Any, text: str, end: str, cot: str
) -> None:
    tokenizer = with_template("{{ messages[-1].content }}" + written(end))
    trace = Trace(({"role": "user", "content": text},), "a", "b")
    assert render(tokenizer, trace, DATA)[:2] == (text + end, cot)


def test_the_recipes_variables_reach_the_template(qwen3: PreTrainedTokenizerFast) -> None:
    off = DataSection(path="rows.jsonl", template_kwargs={"enable_thinking": False})
    with pytest.raises(BadRow, match="data.template_kwargs"):
        render_prompt(qwen3, [USER], off)
    on = DataSection(path="rows.jsonl", template_kwargs={"enable_thinking": True})
    assert render_prompt(qwen3, [USER], on) == render_prompt(qwen3, [USER], DATA)


@pytest.mark.parametrize("name", ["args", "context", "environment", "eos_token"])
def test_a_variable_may_have_any_name(with_template: Any, name: str) -> None:
    data = DataSection(path="rows.jsonl", template_kwargs={name: "other"})
    assert "other" in render_prompt(with_template(ALL + "{{ " + name + " }}"), [USER], data)


def test_a_template_that_prints_the_date_prints_the_recipes(with_template: Any) -> None:
    tokenizer = with_template("Today is {{ strftime_now('%d %b %Y') }}. " + ALL)
    assert render_prompt(tokenizer, [USER], DATA).startswith("Today is 26 Jul 2024. ")
    data = DataSection(path="rows.jsonl", date="2031-01-02")
    assert render_prompt(tokenizer, [USER], data).startswith("Today is 02 Jan 2031. ")


def test_of_several_templates_the_one_for_tools_is_taken(with_template: Any) -> None:
    tokenizer = with_template({"default": "D" + ALL, "tool_use": "T" + ALL})
    assert render_prompt(tokenizer, [USER], DATA).startswith("D")
    assert render_prompt(tokenizer, [USER], DATA, [TOOL]).startswith("T[{")
