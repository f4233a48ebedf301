"""From responses to one score: which answer a response gives, whether it is right, the share.

The answer of a response, first that applies: 1. the last \\boxed{...} after the thought, with those
that commas and "and" join to it 2. the text after the thought, when there is any 3. the same as 1.
anywhere: a thought that was never closed may still hold an answer
"""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

from kd.evaluate.boxes import BOXED, last_boxed
from kd.evaluate.judge import MathJudge
from kd.generation.sampling import Response
from kd.recipe import EvaluationSection

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
    """Means and num_correct are over all responses: accuracy is avg@num_samples.

    pass_at_k: share of problems that one of k samples solves, by k as text, up to num_samples.
    """

    accuracy: float
    ci95: tuple[float, float]
    num_problems: int
    num_samples: int
    num_correct: int
    pass_at_k: dict[str, float]
    mean_response_tokens: float
    unclosed_fraction: float
    unended_fraction: float
    num_judge_timeouts: int


def score(
    responses: Sequence[Response],
    expected: Sequence[str],
    evaluation: EvaluationSection,
    think_close: str,
) -> tuple[list[Verdict], Summary]:
    """Judge every response. think_close: the recipe's marker; its whitespace is ignored.

    expected: one answer per problem. responses: the same number of samples of each problem, one
        problem after another.
    Raises UserError when the judge is "math" and math-verify is not installed.
    """
    marker = think_close.strip()
    num_samples = len(responses) // len(expected)
    answers = [answer for answer in expected for _ in range(num_samples)]
    with MathJudge() if evaluation.judge == "math" else nullcontext(_exactly_equal) as judge:
        verdicts = [
            _judge(response.text, answer, marker, judge)
            for response, answer in zip(responses, answers, strict=True)
        ]
        num_timeouts = judge.num_timeouts if isinstance(judge, MathJudge) else 0
    return verdicts, summarise(responses, verdicts, num_samples, num_timeouts)


def summarise(
    responses: Sequence[Response],
    verdicts: Sequence[Verdict],
    num_samples: int,
    num_judge_timeouts: int,
) -> Summary:
    """responses and verdicts: num_samples of each problem, one problem after another."""
    num_responses = len(verdicts)
    starts = range(0, num_responses, num_samples)
    counts = [
        sum(verdict.correct for verdict in verdicts[start : start + num_samples])
        for start in starts
    ]
    return Summary(
        accuracy=sum(counts) / num_responses,
        ci95=accuracy_interval(counts, num_samples),
        num_problems=len(counts),
        num_samples=num_samples,
        num_correct=sum(counts),
        pass_at_k={
            str(k): mean_pass_at_k(counts, num_samples, k) for k in _powers_of_two(num_samples)
        },
        mean_response_tokens=sum(response.num_tokens for response in responses) / num_responses,
        unclosed_fraction=sum(not verdict.closed for verdict in verdicts) / num_responses,
        unended_fraction=sum(not response.ended for response in responses) / num_responses,
        num_judge_timeouts=num_judge_timeouts,
    )


def mean_pass_at_k(counts: Sequence[int], num_samples: int, k: int) -> float:
    """Chance that one of k samples is right, unbiased: 1 - C(n - c, k) / C(n, k) (Chen et al. 2021,
    eq. 1), averaged.

    counts: right ones of the num_samples responses to each problem. k: at most num_samples.
    """
    wrong = sum(math.comb(num_samples - count, k) for count in counts)
    return 1.0 - wrong / (math.comb(num_samples, k) * len(counts))


def accuracy_interval(counts: Sequence[int], num_samples: int) -> tuple[float, float]:
    """95 % interval of the share of right responses, with problems as the unit.

    Wilson's, of as many independent responses as have the variance of the mean over problems
    (Kish's effective sample size): num_problems of them when the samples of a problem agree,
    num_problems * num_samples when they differ at random. All right or all wrong, or a single
    problem: num_problems, since nothing says how samples differ.
    """
    num_problems = len(counts)
    share = sum(counts) / (num_problems * num_samples)
    variance = sum((count / num_samples - share) ** 2 for count in counts) / num_problems
    binomial = share * (1 - share)
    if binomial == 0 or num_problems == 1:
        return wilson_interval(share * num_problems, num_problems)
    size = num_problems * min(binomial / variance if variance else math.inf, num_samples)
    return wilson_interval(share * size, size)


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


def wilson_interval(num_correct: float, num_problems: float) -> tuple[float, float]:
    """Wilson's 95 % score interval of a share (1927, eq. 4); (0, 1) without problems."""
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
    written = (
        BOXED + answer.text + "}" if answer.boxed and isinstance(judge, MathJudge) else answer.text
    )
    correct = _exactly_equal(expected, answer.text) or judge(expected, written)
    return Verdict(answer.text, correct, closed=marker in response)


def _exactly_equal(expected: str, answer: str) -> bool:
    return expected.strip() == answer.strip()


def _powers_of_two(largest: int) -> list[int]:
    """1, 2, 4, ..., and `largest` itself."""
    return [2**exponent for exponent in range((largest - 1).bit_length())] + [largest]
