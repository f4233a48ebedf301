r"""Whether two answers are equal: what their form shows is decided here, before and around
math-verify, which takes e for Euler's number, 1e-34 for 0, and words for products of letters.

Numbers, letters of choices, words, lists and intervals are compared part by part; of what is left,
expressions and matrices, `symbolic` judges each part.
"""

import re
from collections.abc import Callable
from fractions import Fraction

from kd.evaluate.boxes import BOXED, closing_answer, last_boxed
from kd.evaluate.forms import (
    Range,
    Sequence,
    has_left_side,
    read_ranges,
    read_sequence,
    value_of,
)
from kd.evaluate.notation import tidy
from kd.evaluate.quantities import (
    equal_quantities,
    nearly_equal,
    read_quantity,
    without_e_notation,
)

# symbolic(gold, answer): equality of two expressions in LaTeX, each in a box, or of a box and text
Symbolic = Callable[[str, str], bool]

_LETTER = r"\\text\{\s*\(?([A-Z])\)?\s*[.:]?\s*\}|\(\s*([A-Z])\s*\)"
_CHOICE = re.compile(rf"(?:{_LETTER}|([A-Z])[).:]?)", re.S)
# with its number or text behind it, but nothing that makes two of it
_CHOSEN = re.compile(
    rf"(?:(?:[Oo]ption|[Cc]hoice)\s*)?(?:{_LETTER}|([A-Z])(?:[).:]|$))"
    r"(?!\s*(?:[,+*/=<>&-]|and\b|or\b|\\(?:cup|cap|times|cdot|text\{\s*(?:,|and|or))))\s*.*",
    re.S,
)
_RATIO = re.compile(r"\d+(?:\s*:\s*\d+)+")
_CLOCK = re.compile(r"\d{1,2}:\d{2}")
_MULTIPLE = re.compile(r"[-+\d.,]+\s*[A-Za-z](?:\s+[A-Za-z])*")  # of variables
_BASE = re.compile(r"([0-9A-Fa-f]+)\s*_\s*\{?\s*(\d+)\s*\}?")
_WORDS = re.compile(r"[A-Za-z][A-Za-z' -]*")
_KNOWN_WORDS = {"yes", "no", "true", "false", "even", "odd", "none", "dne", "never", "always"}


def equal_answers(expected: str, answer: str, symbolic: Symbolic) -> bool:
    """Whether `answer`, a text with boxes or without, gives `expected`, which has none."""
    gold, boxed = tidy(expected), last_boxed(answer)
    if boxed is not None:
        return bool(gold) and _equal(gold, tidy(boxed), symbolic)
    written = closing_answer(answer)
    verdict = _decide(gold, tidy(written if written is not None else answer), symbolic)
    if not gold or verdict or (written is not None and verdict is False):
        return verdict is True
    if choice := _choice(gold):
        return bool(re.search(rf"(?:[\s(*]|[Oo]ption \(?){choice}\)?[\s.*$]*$", answer))
    return symbolic(BOXED + without_e_notation(gold) + "}", _formulas(answer))


def _formulas(text: str) -> str:
    r"""`text` with its e-notation as formulas, unless it may stand in one already."""
    rewritten = without_e_notation(text)
    if rewritten != text and not re.search(r"\$|\\[(\[]", text):
        rewritten = re.sub(r"\([\d.]+ \\times 10\^\{-?\d+\}\)", r"$\g<0>$", rewritten)
    return rewritten


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
    verdict = _decide_text(gold, answer)
    if verdict is not None:
        return verdict
    numbers = read_quantity(value_of(gold, answer)), read_quantity(value_of(answer, gold))
    lists = read_sequence(gold), read_sequence(answer)
    if numbers[0] and numbers[1]:
        if equal_quantities(numbers[0], numbers[1]):
            return True
        if not (lists[0] or lists[1]):  # 100,200 may be either
            return False
    if numbers[0] and _MULTIPLE.fullmatch(answer):
        return False
    ranges = read_ranges(gold, answer), read_ranges(answer, gold)
    if ranges[0] and ranges[1]:
        return len(ranges[0]) == len(ranges[1]) and all(
            _equal_ranges(one, other, symbolic)
            for one, other in zip(ranges[0], ranges[1], strict=True)
        )
    if lists[0] and lists[1]:
        return _equal_sequences(lists[0], lists[1], symbolic)
    if (lists[0] or lists[1]) and not re.search(r"\\begin|\\cup|\\in\b|\\text", gold + answer):
        return False
    if has_left_side(gold) != has_left_side(answer):
        return _equal(value_of(gold, answer), value_of(answer, gold), symbolic)
    return None


def _decide_text(gold: str, answer: str) -> bool | None:
    """The verdict on what an algebra system would misread: digits of a base, ratios and times of
    day, letters of choices, words.
    """
    bases = _BASE.fullmatch(gold), _BASE.fullmatch(answer)
    if bases[0] and bases[1]:
        return bases[0].groups() == bases[1].groups()
    if _RATIO.fullmatch(gold) and _RATIO.fullmatch(answer):
        return _equal_ratios(gold, answer)
    choice = _choice(gold)
    if choice:
        return choice == _chosen(answer)
    if _is_words(gold) or _is_words(answer):
        texts = [re.sub(r"\s*-\s*", "-", _bare(side).lower()) for side in (gold, answer)]
        if all(_WORDS.fullmatch(text) for text in texts):
            names = [sorted(re.split(r"\s+and\s+", text)) for text in texts]
            return names[0] == names[1]
        if read_quantity(answer) or read_quantity(gold):
            return False
    return None


def _equal_ratios(gold: str, answer: str) -> bool:
    """2:4 is 1:2, but a quarter past six is not half past twelve."""
    parts = [[int(part) for part in ratio.split(":")] for ratio in (gold, answer)]
    if parts[0] == parts[1] or _CLOCK.fullmatch(gold) or len(parts[0]) != len(parts[1]):
        return parts[0] == parts[1]
    return all(
        one * parts[1][0] == other * parts[0][0]
        for one, other in zip(parts[0], parts[1], strict=True)
    ) and bool(parts[0][0] and parts[1][0])


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


def _choice(gold: str) -> str | None:
    """The letter that `gold` is, in parentheses or one of the five of a test."""
    match = _CHOICE.fullmatch(gold)
    letter: str | None = next(filter(None, match.groups())) if match else None
    return letter if len(gold) > 1 or gold in "ABCDE" else None


def _chosen(answer: str) -> str | None:
    match = _CHOSEN.fullmatch(answer)
    return next(filter(None, match.groups())) if match else None


def _is_words(text: str) -> bool:
    """Text that is no formula: a product of letters would equal its anagrams."""
    bare = _bare(text)
    if _WORDS.fullmatch(bare) is None:
        return False
    if not re.search(r"[A-Za-z]{2}", bare):  # p - q
        return False
    is_text = "\\text{" in text and len(bare) > 1
    return is_text or len(bare) > 3 or bare.lower() in _KNOWN_WORDS


def _bare(text: str) -> str:
    return re.sub(r"\\text\{([^{}]*)\}", r"\1", text).strip().rstrip(".!")


def _without_spaces(text: str) -> str:
    return _bare(text).replace(" ", "")
