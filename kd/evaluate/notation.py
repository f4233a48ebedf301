"""Answers in one notation: LaTeX of few commands, however they were written."""

import re
from collections.abc import Callable

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
