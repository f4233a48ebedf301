"""From responses to one score: which answer a response gives, whether it is right, and what the share means.

The answer of a response, first that applies:
    1. the last \\boxed{...} after the thought
    2. the text after the thought, when there is any
    3. the last \\boxed{...} anywhere: a thought that was never closed may still hold an answer
"""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

from kd.evaluate.generate import Response
from kd.evaluate.judge import MathJudge
from kd.recipe import EvaluationSection

BOXED = "\\boxed{"
Z_95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution


@dataclass(frozen=True)
class Answer:
    text: str
    boxed: bool


@dataclass(frozen=True)
class Verdict:
    answer: str | None
    correct: bool
    closed: bool


@dataclass(frozen=True)
class Summary:
    accuracy: float
    ci95: tuple[float, float]
    num_problems: int
    num_correct: int
    mean_response_tokens: float
    unclosed_fraction: float
    unended_fraction: float
    num_judge_timeouts: int


def score(
    responses: Sequence[Response], expected: Sequence[str], evaluation: EvaluationSection, think_close: str
) -> tuple[list[Verdict], Summary]:
    """Judge every response. think_close: the marker as the recipe writes it; its whitespace does not matter.

    Raises UserError when the judge is "math" and math-verify is not installed.
    """
    marker = think_close.strip()
    with MathJudge() if evaluation.judge == "math" else nullcontext(_exactly_equal) as judge:
        verdicts = [
            _judge(response.text, answer, marker, judge) for response, answer in zip(responses, expected, strict=True)
        ]
        num_timeouts = judge.num_timeouts if isinstance(judge, MathJudge) else 0
    return verdicts, _summarise(responses, verdicts, num_timeouts)


def extract_answer(response: str, marker: str) -> Answer | None:
    """The answer of a response, in the order above. marker: closes the thought."""
    _, closed, after = response.rpartition(marker)
    boxed = last_boxed(after) if closed else None
    if boxed is not None:
        return Answer(boxed, boxed=True)
    if closed and after.strip():
        return Answer(after.strip(), boxed=False)
    boxed = last_boxed(response)
    return None if boxed is None else Answer(boxed, boxed=True)


def last_boxed(text: str) -> str | None:
    """The content of the last \\boxed{...} whose braces balance; None when there is none."""
    start = text.rfind(BOXED)
    while start >= 0:
        content = _balanced(text[start + len(BOXED) :])
        if content is not None:
            return content.strip()
        start = text.rfind(BOXED, 0, start)
    return None


def wilson_interval(num_correct: int, num_problems: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a share (Wilson 1927, eq. 4); (0, 1) when there are no problems."""
    if num_problems == 0:
        return 0.0, 1.0
    share = num_correct / num_problems
    z2_n = Z_95**2 / num_problems
    centre = share + z2_n / 2
    half = math.sqrt(z2_n * (share * (1 - share) + z2_n / 4))
    return max(0.0, (centre - half) / (1 + z2_n)), min(1.0, (centre + half) / (1 + z2_n))


def _judge(response: str, expected: str, marker: str, judge: Callable[[str, str], bool]) -> Verdict:
    answer = extract_answer(response, marker)
    if answer is None:
        return Verdict(None, correct=False, closed=marker in response)
    written = BOXED + answer.text + "}" if answer.boxed and isinstance(judge, MathJudge) else answer.text
    correct = _exactly_equal(expected, answer.text) or judge(expected, written)
    return Verdict(answer.text, correct, closed=marker in response)


def _exactly_equal(expected: str, answer: str) -> bool:
    return expected.strip() == answer.strip()


def _balanced(text: str) -> str | None:
    """The text up to the brace that closes one opened before it; an escaped brace does not count."""
    depth = 1
    escaped = False
    for index, character in enumerate(text):
        if not escaped:
            depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[:index]
        escaped = character == "\\" and not escaped
    return None


def _summarise(responses: Sequence[Response], verdicts: Sequence[Verdict], num_judge_timeouts: int) -> Summary:
    num_problems = len(verdicts)
    num_correct = sum(verdict.correct for verdict in verdicts)
    return Summary(
        accuracy=num_correct / num_problems,
        ci95=wilson_interval(num_correct, num_problems),
        num_problems=num_problems,
        num_correct=num_correct,
        mean_response_tokens=sum(response.num_tokens for response in responses) / num_problems,
        unclosed_fraction=sum(not verdict.closed for verdict in verdicts) / num_problems,
        unended_fraction=sum(not response.ended for response in responses) / num_problems,
        num_judge_timeouts=num_judge_timeouts,
    )
