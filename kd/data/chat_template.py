"""Run a chat template, which is a program that others wrote: in a sandbox, with limits on steps,
time and size, and with the recipe's date as today's.

The result is that of tokenizer.apply_chat_template, which inference engines call, but which has no
limits and cannot be given a date.
"""

import json
import re
import time
from collections.abc import Callable, Mapping
from datetime import date, datetime
from functools import lru_cache, wraps
from types import BuiltinMethodType
from typing import Any

from jinja2 import Template, TemplateError, TemplateRuntimeError, meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import MAX_RANGE, ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from kd.data.turns import BadRow

# Far above what a prompt needs: one step for each turn of a loop and each call of a macro.
MAX_STEPS = 200_000
MAX_SECONDS = 10.0  # of this thread's processor time, so that a busy machine changes nothing
MAX_LENGTH = 2**24  # of a text or a list that the template makes, and of the prompt

# Their numbers are widths and counts
_SIZED_FILTERS = {"batch", "center", "indent", "slice", "tojson", "truncate", "wordwrap"}
# "%9999999d" or "%*d"; "{:9999999}" or "{:{width}}"
_PERCENT_WIDTH = re.compile(r"%[^%a-zA-Z]*(\d{6}|\*)")
_BRACE_WIDTH = re.compile(r"\{[^{}]*:[^{}]*(\d{6}|\{)")


def run_template(template: str, variables: Mapping[str, Any], today: str) -> str:
    """What `template` writes. today: an ISO date, which strftime_now formats, at midnight.

    variables: plain JSON values. Raises BadRow when the template refuses them, fails, or does not
    keep within the bounds.
    """
    try:
        compiled, environment = _compile(template, today)
        environment.start_counting()
        written = []
        for part in compiled.generate(variables):
            written.append(part)
            environment.count_length(len(part))
        return "".join(written)
    except TemplateError as error:
        raise BadRow(f"the chat template refuses the messages: {str(error)[:500]}") from None
    except _OutOfBoundsError as error:
        raise BadRow(f"the chat template fails: {error}") from None
    except Exception as error:  # whatever a program of others may raise
        what = f"{type(error).__name__}: {str(error)[:500]}"
        raise BadRow(f"the chat template fails: {what}") from None


def names_read(template: str) -> set[str]:
    """The variables that `template` reads and does not set itself. Raises BadRow when it is not
    valid.
    """
    try:
        return meta.find_undeclared_variables(_ChatEnvironment("2000-01-01").parse(template))
    except Exception as error:  # of the parser: syntax, recursion
        raise BadRow(f"the chat template is not valid: {error}") from None


class _OutOfBoundsError(Exception):
    pass


class _ChatEnvironment(ImmutableSandboxedEnvironment):
    """With the tags, filters and functions that chat templates may use, and bounds."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, today: str) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
        )
        midnight = datetime.combine(date.fromisoformat(today), datetime.min.time())
        self.filters["tojson"] = _to_json
        self.filters = {name: _bounded(name, function) for name, function in self.filters.items()}
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": midnight.strftime,
            "dict": lambda *args, **kwargs: dict(*args, **kwargs),  # the class itself is a way out
            "namespace": _PlainNamespace,
        }
        self.start_counting()

    def start_counting(self) -> None:
        self._num_steps, self._num_written = 0, 0
        self._deadline = time.thread_time() + MAX_SECONDS

    def count_step(self) -> None:
        self._num_steps += 1
        if self._num_steps > MAX_STEPS or time.thread_time() > self._deadline:
            raise _OutOfBoundsError(
                f"it does not end within {MAX_STEPS} loop iterations and {MAX_SECONDS:g} s"
            )

    def count_length(self, length: int) -> None:
        self._num_written += length
        _check_length(self._num_written)

    def concatenate(self, *parts: Any) -> str:
        texts = [str(part) for part in parts]
        _check_length(sum(map(len, texts)))
        return "".join(texts)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            _check_widths(_PERCENT_WIDTH, left)
        elif operator == "**" and (abs(left) > MAX_RANGE or abs(right) > 100):
            raise _OutOfBoundsError(f"{left} ** {right} is too large")
        elif operator == "*":
            for some, times in ((left, right), (right, left)):
                if hasattr(some, "__len__") and isinstance(times, int):
                    _check_length(len(some) * times)
        return _checked(super().call_binop(context, operator, left, right))

    # Named as in Jinja, so that a template may give its own functions an argument of any name
    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        # Methods of texts and lists, and Jinja's own dummy text, take widths and counts; macros and
        # what the template itself made may be given any number.
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if isinstance(__obj, BuiltinMethodType) or __obj is __self.globals["lipsum"]:
            _check_numbers((*args, *kwargs.values()))
            if isinstance(owner, str):
                _check_product(name, owner, *args)
        elif name in ("format", "format_map"):
            method = getattr(__obj, "__wrapped__", __obj)
            _check_widths(_BRACE_WIDTH, str(getattr(method, "__self__", "")))
        return _checked(super().call(__context, __obj, *args, **kwargs))


def _bounded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter with the bounds of what it is given and of what it makes."""

    @wraps(function)  # with the attributes that say whether it takes the context first
    def call(*args: Any, **kwargs: Any) -> Any:
        if name in _SIZED_FILTERS:
            _check_numbers((*args[1:], *kwargs.values()))
        elif name == "format":
            _check_widths(_PERCENT_WIDTH, str(args[0]))
        elif name == "replace":  # of the context, the text and the two of the method
            _check_product(name, str(args[1]), *args[2:])
        elif name == "join":  # of the context, the items and the text between them
            _check_product(name, str((*args, "")[2]), args[1])
        return _checked(function(*args, **kwargs))

    return call


@lru_cache(maxsize=8)
def _compile(template: str, today: str) -> tuple[Template, _ChatEnvironment]:
    environment = _ChatEnvironment(today)
    tree = _CountSteps().visit(environment.parse(template))
    code = environment.compile(tree)
    return Template.from_code(environment, code, environment.make_globals(None)), environment


class _CountSteps(NodeTransformer):
    """Each turn of a loop and each call of a macro counts; `~` goes through the bounds."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        return self._count(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        return self._count(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:
        return self._count(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _call_environment("concatenate", node.nodes, node.lineno)

    def _count(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        step = nodes.ExprStmt(_call_environment("count_step", [], node.lineno), lineno=node.lineno)
        node.body.insert(0, step)
        return node  # type: ignore[no-any-return]


def _call_environment(name: str, args: list[nodes.Expr], lineno: int) -> nodes.Call:
    function = nodes.EnvironmentAttribute(name, lineno=lineno)
    return nodes.Call(function, args, [], None, None, lineno=lineno)


class _GenerationTag(Extension):
    """{% generation %} marks what an assistant wrote, and writes nothing itself."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=lineno)


class _PlainNamespace(Namespace):
    """Without names that Python itself gives a meaning to."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        names = dict(*args[1:], **kwargs)
        for name in names:
            _check_plain(name)
        Namespace.__init__(args[0], names)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_plain(name)
        super().__setitem__(name, value)


def _check_plain(name: Any) -> None:
    if str(name).startswith("_"):
        raise TemplateRuntimeError(f"a namespace must not have the attribute {name!r}")


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Not Jinja's own, which escapes for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _checked(value: Any) -> Any:
    if isinstance(value, str | list | tuple | dict):
        _check_length(len(value))
    elif isinstance(value, int) and value.bit_length() > 1000:
        raise _OutOfBoundsError("a number has more than 1000 bits")
    return value


def _check_length(length: int) -> None:
    if length > MAX_LENGTH:
        raise _OutOfBoundsError(f"it produces more than {MAX_LENGTH} characters or items")


def _check_product(method: str, text: str, *args: Any) -> None:
    """Of replace and join, whose result may be as long as the product of what they are given."""
    if method == "replace" and len(args) > 1:
        _check_length(len(text) + text.count(str(args[0])) * len(str(args[1])))
    elif method == "join" and args:
        num_items = len(args[0]) if hasattr(args[0], "__len__") else MAX_RANGE
        _check_length(len(text) * num_items)


def _check_numbers(arguments: tuple[Any, ...]) -> None:
    """Widths, counts: what makes a text or a loop out of a number."""
    for argument in arguments:
        if isinstance(argument, int) and abs(argument) > MAX_RANGE:
            raise _OutOfBoundsError(f"an argument is {argument}, but may be at most {MAX_RANGE}")


def _check_widths(pattern: re.Pattern[str], format_text: str) -> None:
    if pattern.search(format_text):
        raise _OutOfBoundsError(
            "a format has a width of six digits or more, or takes its width from an argument"
        )
