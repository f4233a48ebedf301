"""A template writes what apply_chat_template has it write, with a given date; and always ends."""

import copy
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

import kd.data.chat_template
from kd.data.chat_template import names_read, run_template
from kd.data.prompt import apply_template
from kd.data.turns import BadRow
from kd.recipe import DataSection

USER = {"role": "user", "content": " 1+1? <b> \u00e9 "}
CALC = {
    "type": "function",
    "function": {
        "name": "calc",
        "description": "adds <b>",
        "parameters": {"type": "object", "properties": {"x": {"type": "number"}}},
    },
}
CALL = {"id": "c1", "type": "function", "function": {"name": "calc", "arguments": {"x": 1.5}}}
CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]] | None]] = {
    "one question": ([USER], None),
    "a system prompt": ([{"role": "system", "content": "Be brief."}, USER], None),
    "two questions": (
        [USER, {"role": "assistant", "content": "<think>\nhm\n</think>\n\n2"}, USER],
        None,
    ),
    "a tool": (
        [
            USER,
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [CALL],
                "reasoning_content": "I need it.",
            },
            {"role": "tool", "content": "3", "name": "calc", "tool_call_id": "c1"},
        ],
        [CALC],
    ),
}


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("kwargs", [{}, {"enable_thinking": False}], ids=str)
@pytest.mark.parametrize(("turns", "tools"), CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("name", ["qwen3", "deepseek"])
def test_a_template_writes_what_transformers_has_it_write(
    name: str,
    turns: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None,
    kwargs: dict[str, Any],
    add_generation_prompt: bool,
    request: pytest.FixtureRequest,
) -> None:
    tokenizer = request.getfixturevalue(name)
    data = DataSection(path="rows.jsonl", template_kwargs=kwargs)
    ours = apply_template(
        tokenizer, turns, data, tools or (), add_generation_prompt=add_generation_prompt
    )
    assert ours == tokenizer.apply_chat_template(
        turns,
        tools=tools,
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
        **kwargs,
    )
    assert len(ours) > 5


# What the templates of gpt-oss, Llama 3, Phi, SmolLM3 and others make use of
FEATURES = """\
{%- macro show(m, end='') -%}
  {{ m.role | upper ~ ': ' ~ m['content'] | trim }}{{ end }}
{%- endmacro -%}
{%- macro twice() -%}{{ caller(1) }}{{ caller(2) }}{%- endmacro -%}
{%- set ns = namespace(n=0, last=none) -%}
{%- for m in messages recursive %}
  {%- if m.role == 'tool' %}{% continue %}{% endif %}
  {%- set ns.n = ns.n + 1 %}{% set ns.last = m %}
  {{- show(m, end='|') }}
  {% generation %}{{ m.content.replace('1', '\u00e9') }}{% endgeneration %}
  {%- if loop.index0 > 3 %}{% break %}{% endif %}
{%- endfor %}
{{ {'a<': ['\u00e9', ns.n * 2 % 7, 2 ** 3]} | tojson(indent=1) }}{{ '%s-%03d' % ('x', 7) }}
{{ 'n' ~ 1700000000 }}{{ show({'role': 'x', 'content': '1'}, end=1700000000) }}
{{ '{} {:d} %'.format(1700000000, 2) }}{{ no | default(1700000000) }}{{ '1234567 %s' % 1234567 }}
{{ dict(a=1700000000)['a'] }}{{ 'ab' * 2 }}{{ '{:>4}'.format('x') }}
{{ messages[::-1] | map(attribute='role') | join(',') }}
{{ ', '.join(messages | map(attribute='role')) }}
{{ messages | map(attribute='role') | join }}{{ 'abab' | replace('a', 'xx', 1) }}
{% call(x) twice() %}{{ x ~ '.' }}{% endcall %}{{ eos_token }}{{ thing }}
{%- filter upper %}up{% endfilter %}{% set block %}text{{ ns.last.content }}{% endset %}{{ block }}
"""


def test_the_whole_language_of_templates_is_there(tiny: PreTrainedTokenizerFast) -> None:
    tokenizer = copy.deepcopy(tiny)
    tokenizer.chat_template = FEATURES
    turns = [USER, {"role": "tool", "content": "3"}, {"role": "assistant", "content": "x1"}]
    data = DataSection(path="rows.jsonl", template_kwargs={"thing": [1, {"a": None}]})
    theirs = tokenizer.apply_chat_template(
        turns, tokenize=False, add_generation_prompt=True, thing=[1, {"a": None}]
    )
    assert apply_template(tokenizer, turns, data) == theirs
    assert "USER: 1+1?" in theirs


@pytest.mark.parametrize(
    ("today", "written"),
    [("2024-07-26", "26 Jul 2024 00:00"), ("1999-12-31", "31 Dec 1999 00:00")],
)
def test_todays_date_is_the_one_that_is_given(today: str, written: str) -> None:
    assert run_template("{{ strftime_now('%d %b %Y %H:%M') }}", {}, today) == written


ENDLESS = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "macros": (
        "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}"
    ),
    "a recursive loop": "{% for i in range(99) recursive %}{{ loop(range(99)) }}{% endfor %}",
    "a slow turn": (
        "{% for i in range(999) %}{% set x = range(99999) | map('string') | join | length %}"
        "{% endfor %}"
    ),
    "a filtered loop": (
        "{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}"
    ),
    "calls": (
        "{% macro f(n) %}{% if n %}{% call f(n-1) %}{% endcall %}{% call f(n-1) %}{% endcall %}"
        "{% endif %}{{ caller() }}{% endmacro %}{% call f(60) %}{% endcall %}"
    ),
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a generator": "{{ [1] | slice(10**12) | list }}",
    "dummy text": "{{ lipsum(10**9) }}",
}


@pytest.mark.parametrize("template", ENDLESS.values(), ids=ENDLESS)
def test_a_template_that_never_ends_is_ended(
    template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kd.data.chat_template, "MAX_STEPS", 20_000)
    monkeypatch.setattr(kd.data.chat_template, "MAX_SECONDS", 0.2)
    with pytest.raises(
        BadRow, match="the chat template fails: (it does not end|Recursion|an argument)"
    ):
        run_template(template, {}, "2024-07-26")


HUGE = {
    "times": "{{ 'a' * 10**10 }}",
    "times a list": "{{ 10**10 * [1] }}",
    "power": "{{ 10**10**10 }}",
    "squares": (
        "{% set ns = namespace(n=3) %}{% for i in range(99) %}{% set ns.n = ns.n * ns.n %}"
        "{% endfor %}"
    ),
    "plus": (
        "{% set ns = namespace(s='a') %}{% for i in range(99) %}{% set ns.s = ns.s + ns.s %}"
        "{% endfor %}"
    ),
    "lists": (
        "{% set ns = namespace(s=[1]) %}{% for i in range(99) %}{% set ns.s = ns.s + ns.s %}"
        "{% endfor %}"
    ),
    "joined": (
        "{% set ns = namespace(s='a') %}{% for i in range(99) %}{% set ns.s = ns.s ~ ns.s ~ 1 %}"
        "{% endfor %}"
    ),
    "a width": "{{ '%999999999d' % 1 }}",
    "a filter's width": "{{ '%999999999d' | format(1) }}",
    "a width given": "{{ '%*d' % (999999999, 1) }}",
    "a method's width": "{{ '{:>999999999}'.format(1) }}",
    "a method's width given": "{{ '{:{w}}'.format(1, w=999999999) }}",
    "indented": "{{ [1, [2]] | tojson(indent=10**9) }}",
    "padding": "{{ 'a'.ljust(10**10) }}",
    "centred": "{{ 'a' | center(10**10) }}",
    "replaced": "{{ ('a' * 99999).replace('a', 'b' * 99999) }}",
    "replaced by a filter": "{{ ('a' * 99999) | replace('a', 'b' * 99999) }}",
    "joined by a method": "{{ ('a' * 99999).join(['b'] * 99999) }}",
    "joined by a filter": "{{ range(99999) | map('string') | join('a' * 99999) }}",
    "written": "{% for i in range(9999) %}{{ 'a' * 9999 }}{% endfor %}",
}


@pytest.mark.parametrize("template", HUGE.values(), ids=HUGE)
def test_a_template_that_fills_the_memory_is_ended(
    template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kd.data.chat_template, "MAX_LENGTH", 2**20)
    with pytest.raises(BadRow, match="the chat template fails: "):
        run_template(template, {}, "2024-07-26")


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ 'x' + messages | length }}", "TypeError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages[0].x.y.z }}", "has no attribute"),
        ("{% include '/etc/passwd' %}", "loader"),
        ("{% extends 'a' %}", "loader"),
        ("{% import 'a' as b %}", "loader"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% set ns = namespace() %}{% set ns.__class__ = 1 %}", "__class__"),
        ("{{ namespace(_x=1) }}", "_x"),
        ("{% if %}", "Expected an expression"),
        ("{% nosuchtag %}", "unknown tag"),
        ("{{ " + "(" * 9999 + "1" + ")" * 9999 + " }}", "RecursionError"),
        ("{% for a in [1] %}" * 30 + "{% endfor %}" * 30, "SyntaxError"),
        ("{{ strftime_now(1) }}", "TypeError"),
        ("{{ raise_exception('a' * 5000) }}", "a{500}$"),
    ],
)
def test_whatever_a_template_raises_is_one_reason(template: str, reason: str) -> None:
    with pytest.raises(
        BadRow, match=f"(?s)the chat template (fails|refuses the messages): .*{reason}"
    ):
        run_template(template, {"messages": [{"role": "user", "content": "1"}]}, "2024-07-26")


def test_one_run_counts_nothing_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kd.data.chat_template, "MAX_STEPS", 60)
    template = "{% for i in range(40) %}{{ i }}{% endfor %}"
    assert len({run_template(template, {}, "2024-07-26") for _ in range(5)}) == 1


def test_the_names_that_a_template_reads_are_those_that_it_does_not_set() -> None:
    template = (
        "{% if not date_string is defined %}{% set date_string = strftime_now('%d') %}{% endif %}"
        "{% set x = 1 %}{{ x ~ date_string }}{% if enable_thinking %}{% endif %}"
    )
    assert names_read(template) - {"strftime_now"} == {"date_string", "enable_thinking"}
    with pytest.raises(BadRow, match="not valid"):
        names_read("{% if")
