r"""Which text of a response is its answer: boxes that belong together, or a closing sentence."""

import re

BOXED = "\\boxed{"
# What may stand between boxes of one list, as in `$x = \boxed{1}$, and $y = \boxed{2}$`. An "or"
# offers alternatives, of which the last one is taken.
_JOINT = re.compile(
    r"(?:\$|\\[()\[\],;: ]|\\q?quad|\s)*(?:,|;|&|\band\b|\\(?:text|mbox)\{\s*,?\s*and\s*\})"
    r"(?:\$|\\[()\[\],;: ]|\\q?quad|\s|,|\band\b|\\(?:text|mbox)\{\s*and\s*\})*"
    r"(?:[A-Za-z](?:_\{?\w+\}?)?\s*=\s*)?\$?"
)
_SENTENCE = re.compile(
    r"\banswer(?:\s+(?:is|would be|must be)\s*:?|\s*[:=])[\s*]*(.+?)(?:\.(?=\s|\*|$)|\n|$)", re.I
)
_REASON = re.compile(r",?\s+(?:since|because|as|so|which|where|when)\b", re.I)
_FIRST_FORMULA = re.compile(r"\$\$?([^$]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.S)


def last_boxed(text: str) -> str | None:
    r"""The content of the last \boxed{...} whose braces balance; None when there is none.

    Boxes joined by commas and "and" are one list, as `1, 2` for `\boxed{1} and \boxed{2}`; earlier
    ones are superseded.
    """
    contents: list[str] = []
    start, following = text.rfind(BOXED), len(text)
    while start >= 0:
        content = _balanced(text[start + len(BOXED) :])
        if content is not None:
            end = start + len(BOXED) + len(content) + 1
            if contents and not _JOINT.fullmatch(text, end, following):
                break
            contents.insert(0, content.strip())
            following = start
        start = text.rfind(BOXED, 0, start)
    if not contents:
        return None
    return ", ".join(dict.fromkeys(contents))


def closing_answer(text: str) -> str | None:
    """What the last sentence of the kind "The answer is ..." gives; None without one."""
    if "\n" not in text.strip() and " " not in text.strip():
        return text
    sentences = list(_SENTENCE.finditer(text))
    if not sentences:
        return None
    answer = sentences[-1].group(1)
    formula = _FIRST_FORMULA.match(answer)
    if formula:
        inner: str = next(filter(None, formula.groups()))
        return inner
    return _REASON.split(answer, maxsplit=1)[0]


def _balanced(text: str) -> str | None:
    """The text up to the brace that closes one opened before it; an escaped brace does not
    count.
    """
    depth = 1
    escaped = False
    for index, character in enumerate(text):
        if not escaped:
            depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[:index]
        escaped = character == "\\" and not escaped
    return None
