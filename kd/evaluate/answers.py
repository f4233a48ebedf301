r"""Whether two answers are equal: what their form shows is decided here, before and around
math-verify, which takes e for Euler's number, 1e-34 for 0, and words for products of letters.

Numbers, letters of choices, words, lists and intervals are compared part by part; of what is left,
expressions and matrices, `symbolic` judges each part.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from kd.evaluate.boxes import BOXED, closing_answer, last_boxed
from kd.evaluate.quantities import (
    Quantity,
    equal_quantities,
    nearly_equal,
    read_quantity,
    without_e_notation,
)

# symbolic(gold, answer): equality of two expressions in LaTeX, each in a box, or of a box and text
Symbolic = Callable[[str, str], bool]

_UNICODE = {
    **{"\u2212": "-", "\u2013": "-", "\u00d7": r"\times ", "\u00b7": r"\cdot "},
    **{"\u22c5": r"\cdot ", "\u2264": r"\le ", "\u2265": r"\ge ", "\u221e": r"\infty "},
    **{"\u03c0": r"\pi ", "\u00b0": r"^\circ", "\u222a": r"\cup ", "\u2208": r"\in "},
    **{"\u00b1": r"\pm ", "\u00bd": r"\frac{1}{2}", "\u00bc": r"\frac{1}{4}"},
    **dict.fromkeys("\u00a0\u2009\u202f\u2006\u200a", " "),
}
_SUPERSCRIPTS = str.maketrans("\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207b",
                              "0123456789-")  # fmt: skip
_REWRITES: list[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]] = [
    (re.compile("[\u2070\u00b9\u00b2\u00b3\u2074-\u2079\u207b]+"),
     lambda m: "^{" + m[0].translate(_SUPERSCRIPTS) + "}"),
    (re.compile(r"\\[dtc]frac(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|limits)(?![a-zA-Z])\s*"), ""),
    (re.compile(r"\\(?:leqslant|leq|le)(?![a-zA-Z])\s*|<=|=<"), r"\\le "),
    (re.compile(r"\\(?:geqslant|geq|ge)(?![a-zA-Z])\s*|>="), r"\\ge "),
    (re.compile(r"\\lt(?![a-zA-Z])\s*"), "<"),
    (re.compile(r"\\gt(?![a-zA-Z])\s*"), ">"),
    (re.compile(r"\\lbrace(?![a-zA-Z])"), r"\\{"),
    (re.compile(r"\\rbrace(?![a-zA-Z])"), r"\\}"),
    (re.compile(r"\\(?:mathrm|textbf|mathbf|textit|textrm|mathit|mbox|operatorname|bf|rm)\s*\{"),
     r"\\text{"),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"(?<!\\)\\[,;:! ]|~|\\q?quad(?![a-zA-Z])"), " "),
    (re.compile(r"\\\$"), "$"),
    (re.compile(r"\s+"), " "),
]  # fmt: skip
_CHOICE = re.compile(
    r"(?:option|choice)?\s*(?:\\text\{\s*\(?([A-Z])\)?\s*[.:]?\s*\}|\(\s*([A-Z])\s*\)|([A-Z])[).:])"
    r"\s*.*|(?:(?:option|choice)\s+)?([A-Z])",
    re.I | re.S,
)
_LHS = re.compile(
    r"(\([A-Za-z](?:\s*,\s*[A-Za-z])+\)|[A-Za-z](?:_\{?\w+\}?)?(?:\s*\([a-z]\))?)\s*=\s*(?!.*=)(.+)",
    re.S,
)
_MEMBER = re.compile(r"[A-Za-z]\s*\\in(?![a-zA-Z])\s*(.+)", re.S)
_RELATION = re.compile(r"(<|>|\\le |\\ge )")
_VARIABLE = re.compile(r"[a-zA-Z]|\\(?:theta|alpha|lambda|phi)")
_AND = re.compile(r"\s*(?:,\s*)?(?:\band\b|\bor\b|\\text\{\s*,?\s*(?:and|or)\s*\})\s*|\s*;\s*")
_MULTIPLE = re.compile(r"[-+\d.,]+\s*[A-Za-z]")  # of a variable
_BASE = re.compile(r"([0-9A-Fa-f]+)\s*_\s*\{?\s*(\d+)\s*\}?")
_OPENING, _CLOSING = "([{", ")]}"
_WORDS = re.compile(r"[A-Za-z][A-Za-z' -]*")
_KNOWN_WORDS = {"yes", "no", "true", "false", "even", "odd", "none", "dne", "never", "always"}


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


def equal_answers(expected: str, answer: str, symbolic: Symbolic) -> bool:
    """Whether `answer`, a text with boxes or without, gives `expected`, which has none."""
    gold, boxed = tidy(expected), last_boxed(answer)
    written = boxed if boxed is not None else closing_answer(answer)
    if written is not None:
        written = tidy(written)
        verdict = _decide(gold, written, symbolic)
        if verdict is not None:
            return verdict
    if not gold or written == "":
        return False
    if written is None and (choice := _choice(gold)) and len(gold) > 1:
        return bool(re.search(rf"\({choice}\)[\s.*$]*$", answer))
    if boxed is not None and written:
        return _boxes_equal(gold, written, symbolic)
    target = without_e_notation(answer)
    if target != answer and not re.search(r"\$|\\[(\[]", answer):
        target = re.sub(r"\([\d.]+ \\times 10\^\{-?\d+\}\)", r"$\g<0>$", target)
    return symbolic(BOXED + without_e_notation(gold) + "}", target)


def tidy(text: str) -> str:
    """`text` in one notation, without spacing, delimiters of formulas and final punctuation."""
    for written, meant in _UNICODE.items():
        text = text.replace(written, meant)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    previous = None
    while previous != text:
        previous = text
        text = re.sub(r"(?<!\\)[.,;:*]+$|^\*+|\\+$", "", text.strip()).strip()
        if text.count("$") - text.count("\\$") == 2 and text[0] == text[-1] == "$":
            text = text[1:-1]
        text = re.sub(
            r"^\\[(\[](?P<inner>(?:(?!\\[)\]]).)*)\\[)\]]$", r"\g<inner>", text, flags=re.S
        )
    text = re.sub(r"^\\text\{([^{}]*\d[^{}]*)\}$", r"\1", text)
    return re.sub(r"(?<!\\)[.,;:]+$|^\\(?:approx|sim|simeq)(?![a-z])\s*", "", text.strip()).strip()


def close_values(gold: float, answer: float) -> bool:
    """Equal to six digits, however small: what math-verify rounds to six decimal places."""
    return nearly_equal(Fraction(gold), Fraction(answer), scientific=True)


def _decide(gold: str, answer: str, symbolic: Symbolic) -> bool | None:
    """The verdict on two tidied answers; None where only an algebra system can tell."""
    if not gold or not answer:
        return False
    if gold == answer:
        return True
    if "\\text" in gold + answer and _without_spaces(gold) == _without_spaces(answer):
        return True
    bases = _BASE.fullmatch(gold), _BASE.fullmatch(answer)
    if bases[0] and bases[1]:
        return bases[0].groups() == bases[1].groups()
    choice = _choice(gold)
    if choice and (len(gold) > 1 or gold in "ABCDE"):
        return choice == _choice(answer)
    words = _words(gold), _words(answer)
    if words[0] or words[1]:
        texts = [_WORDS.fullmatch(_bare(side)) for side in (gold, answer)]
        if all(texts):
            return _bare(gold).lower() == _bare(answer).lower()
        if read_quantity(answer) or read_quantity(gold):
            return False
    numbers = read_quantity(_value_of(gold, answer)), read_quantity(_value_of(answer, gold))
    if numbers[0] and numbers[1]:
        if equal_quantities(numbers[0], numbers[1]):
            return True
        if not (_is_list(gold) or _is_list(answer)):
            return False
    if numbers[0] and _MULTIPLE.fullmatch(answer):
        return False
    ranges = _ranges(gold, answer), _ranges(answer, gold)
    if ranges[0] and ranges[1]:
        return len(ranges[0]) == len(ranges[1]) and all(
            _equal_ranges(one, other, symbolic)
            for one, other in zip(ranges[0], ranges[1], strict=True)
        )
    lists = _sequence(gold), _sequence(answer)
    if lists[0] and lists[1]:
        return _equal_sequences(lists[0], lists[1], symbolic)
    if (lists[0] or lists[1]) and not re.search(r"\\begin|\\cup|\\in\b|\\text", gold + answer):
        return False
    return _decide_one(numbers, gold, answer, symbolic)


def _decide_one(
    numbers: tuple[Quantity | None, Quantity | None], gold: str, answer: str, symbolic: Symbolic
) -> bool | None:
    """One expression: without its left side where the other has none."""
    if (_LHS.fullmatch(gold) is None) != (_LHS.fullmatch(answer) is None):
        sides = _value_of(gold, answer), _value_of(answer, gold)
        if numbers[0] or numbers[1] or "e" in gold + answer:
            return _boxes_equal(*sides, symbolic)
        return _decide(*sides, symbolic)
    return None


def _equal(gold: str, answer: str, symbolic: Symbolic) -> bool:
    verdict = _decide(gold, answer, symbolic)
    return _boxes_equal(gold, answer, symbolic) if verdict is None else verdict


def _boxes_equal(gold: str, answer: str, symbolic: Symbolic) -> bool:
    gold, answer = (BOXED + without_e_notation(side) + "}" for side in (gold, answer))
    return symbolic(gold, answer)


def _equal_sequences(gold: Sequence, answer: Sequence, symbolic: Symbolic) -> bool:
    """In order, unless both are sets or lists without brackets."""
    if len(gold.items) != len(answer.items):
        return False
    kinds = {gold.brackets, answer.brackets}
    if not kinds <= {"", "{}"}:
        return len(kinds - {""}) == 1 and all(
            _equal(one, other, symbolic)
            for one, other in zip(gold.items, answer.items, strict=True)
        )
    left = list(answer.items)
    for item in gold.items:
        found = next((other for other in left if _equal(item, other, symbolic)), None)
        if found is None:
            return False
        left.remove(found)
    return True


def _equal_ranges(gold: Range, answer: Range, symbolic: Symbolic) -> bool:
    if gold.variable and answer.variable and gold.variable != answer.variable:
        return False
    return (
        (gold.low_closed, gold.high_closed) == (answer.low_closed, answer.high_closed)
        and _equal(gold.low, answer.low, symbolic)
        and _equal(gold.high, answer.high, symbolic)
    )


def _choice(text: str) -> str | None:
    match = _CHOICE.fullmatch(text)
    letter = next(filter(None, match.groups()), None) if match else None
    return letter if letter is None or letter.isupper() else None


def _words(text: str) -> str | None:
    """Text that is no formula: a product of letters would equal its anagrams."""
    bare = _bare(text)
    if _WORDS.fullmatch(bare) is None:
        return None
    is_text = "\\text{" in text and len(bare) > 1
    return bare if is_text or len(bare) > 3 or bare.lower() in _KNOWN_WORDS else None


def _bare(text: str) -> str:
    return re.sub(r"\\text\{([^{}]*)\}", r"\1", text).strip().rstrip(".!")


def _without_spaces(text: str) -> str:
    return _bare(text).replace(" ", "")


def _value_of(text: str, other: str) -> str:
    """`text` without `x =` or `x \\in`, where the other answer has none."""
    for pattern in (_LHS, _MEMBER):
        match = pattern.fullmatch(text)
        if match and not pattern.fullmatch(other):
            return match.group(match.lastindex or 1).strip()
    return text


def _is_list(text: str) -> bool:
    return _sequence(text) is not None


def _sequence(text: str) -> Sequence | None:
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


def _ranges(text: str, other: str) -> list[Range] | None:
    """Intervals, in the order of their union; a pair in parentheses is one where the other answer
    is an inequality, or an interval with another bracket.
    """
    text = _value_of(text, other)
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
    if len(parts) == 3:
        if _VARIABLE.fullmatch(parts[0]):
            low, variable, relation, high = "", parts[0], parts[1], parts[2]
            left = "<"
        elif _VARIABLE.fullmatch(parts[2]):
            low, left, variable, relation, high = parts[0], parts[1], parts[2], "", ""
        else:
            return None
        if relation in (">", "\\ge") or left in (">", "\\ge"):
            is_upper = bool(low)  # `5 > x`
            closed = (left if is_upper else relation) == "\\ge"
            if is_upper:
                return Range("-\\infty", low, False, closed, variable)
            return Range(high, "\\infty", closed, False, variable)
        if low:
            return Range(low, "\\infty", left == "\\le", False, variable)
        return Range("-\\infty", high, False, relation == "\\le", variable)
    if len(parts) != 5 or not _VARIABLE.fullmatch(parts[2]):
        return None
    low, left, variable, right, high = parts
    if {left, right} <= {">", "\\ge"}:
        low, left, right, high = high, right, left, low
    elif not {left, right} <= {"<", "\\le"}:
        return None
    return Range(low, high, left in ("\\le", "\\ge"), right in ("\\le", "\\ge"), variable)


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
