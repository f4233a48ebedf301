"""Answers of several parts: lists, tuples, sets, intervals and inequalities.

All texts are tidied (`kd.evaluate.notation`).
"""

import re
from dataclasses import dataclass
from fractions import Fraction

from kd.evaluate.quantities import read_quantity

_LHS = re.compile(
    r"(\([A-Za-z](?:\s*,\s*[A-Za-z])+\)|[A-Za-z](?:_\{?\w+\}?)?(?:\s*\([a-z]\))?)\s*=\s*(?!.*=)(.+)",
    re.S,
)
_MEMBER = re.compile(r"[A-Za-z]\s*\\in(?![a-zA-Z])\s*(.+)", re.S)
_RELATION = re.compile(r"(<|>|\\le |\\ge )")
_GREATER, _LESS, _CLOSED = {">", "\\ge"}, {"<", "\\le"}, {"\\ge", "\\le"}
_VARIABLE = re.compile(r"[a-zA-Z]|\\(?:theta|alpha|lambda|phi)")
_AND = re.compile(r"\s*(?:,\s*)?(?:\band\b|\bor\b|\\text\{\s*,?\s*(?:and|or)\s*\})\s*|\s*;\s*")
_UNION = re.compile(r"\s*\\cup(?![a-zA-Z])\s*|\s*(?:\bor\b|\\text\{\s*or\s*\})\s*")
_OPENING, _CLOSING = "([{", ")]}"


@dataclass(frozen=True)
class Sequence:
    """Several items. brackets: "" where none are written, "{}" for a set, else both brackets."""

    items: list[str]
    brackets: str


@dataclass(frozen=True)
class Range:
    """An interval, or an inequality of one variable."""

    low: str
    high: str
    low_closed: bool
    high_closed: bool
    variable: str = ""


def has_left_side(text: str) -> bool:
    """Whether `text` is an assignment, as `x = 5`."""
    return _LHS.fullmatch(text) is not None


def value_of(text: str, other: str) -> str:
    """`text` without `x =` or `x \\in`, where the other answer has none."""
    for pattern in (_LHS, _MEMBER):
        match = pattern.fullmatch(text)
        if match and not pattern.fullmatch(other):
            return match.group(match.lastindex or 1).strip()
    return text


def read_sequence(text: str) -> Sequence | None:
    """The items of a list, a tuple or a set; None for a text of one item."""
    member = _MEMBER.fullmatch(text)
    text = member[1] if member else text
    brackets, inner = "", text
    if (text[:2], text[-2:]) == ("\\{", "\\}") and _matches(text.replace("\\", " ")):
        brackets, inner = "{}", text[2:-2]
    elif text[:1] in ("(", "[") and text[-1:] in (")", "]") and _matches(text):
        brackets, inner = text[0] + text[-1], text[1:-1]
    elif (text[:1], text[-1:]) == ("{", "}") and _matches(text):
        brackets, inner = "{}", text[1:-1]
    if not brackets:
        inner = _AND.sub(",", text) if not _RELATION.search(text) else text
    items = [item.strip() for item in _split(inner, ",")]
    if len(items) == 1 and inner.count("\\pm") == 1 and brackets in ("", "{}"):
        left, right = inner.split("\\pm")
        label = re.match(r"[A-Za-z]\s*=", left)
        start = label[0] if label else ""
        left = left.removeprefix(start).strip()
        items = [f"{left}+{right.strip()}" if left else right.strip(), f"{left}-{right.strip()}"]
    if len(items) < 2 or not all(items):
        return None
    return Sequence(items, brackets)


def read_ranges(text: str, other: str) -> list[Range] | None:
    """Intervals, in the order of their union; a pair in parentheses is one where the other answer
    is an inequality, or an interval with another bracket.
    """
    text = value_of(text, other)
    parts = re.split(r"\s*\\cup(?![a-zA-Z])\s*|\s*(?:\bor\b|\\text\{\s*or\s*\})\s*", text)
    ranges = [_inequality(part) or _interval(part) for part in parts]
    if any(one is None for one in ranges):
        return None
    found = [one for one in ranges if one is not None]
    return sorted(found, key=_lower_end) if len(found) > 1 else found


def _lower_end(one: Range) -> Fraction:
    quantity = read_quantity(one.low)
    return quantity.value if quantity else Fraction(-(10**30))


def _interval(text: str) -> Range | None:
    if text[:1] not in ("(", "[", "]") or text[-1:] not in (")", "]", "["):
        return None
    ends = [end.strip() for end in _split(text[1:-1], ",")]
    if len(ends) != 2:
        return None
    return Range(ends[0], _infinite(ends[1]), text[0] == "[", text[-1] == "]")


def _inequality(text: str) -> Range | None:
    """`2 \\le x < 5`, `5 > x \\ge 2`, `x > 3`: None for others."""
    parts = [part.strip() for part in _RELATION.split(text)]
    if len(parts) == 3:  # nothing on the other side of the variable
        is_left = _VARIABLE.fullmatch(parts[0])
        parts = ["", parts[1], *parts] if is_left else [*parts, parts[1], ""]
    if len(parts) != 5 or not _VARIABLE.fullmatch(parts[2]):
        return None
    low, left, variable, right, high = parts
    if {left, right} <= _GREATER:
        low, left, right, high = high, right, left, low
    elif not {left, right} <= _LESS:
        return None
    low_closed, high_closed = bool(low) and left in _CLOSED, bool(high) and right in _CLOSED
    return Range(low or "-\\infty", high or "\\infty", low_closed, high_closed, variable)


def _infinite(end: str) -> str:
    return "\\infty" if end.replace(" ", "") in ("+\\infty", "\\infty", "oo", "inf") else end


def _split(text: str, separator: str) -> list[str]:
    """Parts between separators that no bracket encloses."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in _OPENING) - (character in _CLOSING)
        if character == separator and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _matches(text: str) -> bool:
    """Whether the bracket at the start closes at the end."""
    depth = 0
    for index, character in enumerate(text):
        depth += (character in _OPENING) - (character in _CLOSING)
        if depth == 0 and not text[index].isspace():
            return index >= len(text.rstrip()) - 1
    return False
