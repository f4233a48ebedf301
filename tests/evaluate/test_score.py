"""Answers of responses, judges, and the interval."""

import itertools
import random
import sys

import pytest

from kd.errors import UserError
from kd.evaluate.boxes import last_boxed
from kd.evaluate.judge import MathJudge
from kd.evaluate.score import (
    Answer,
    accuracy_interval,
    extract_answer,
    mean_pass_at_k,
    score,
    wilson_interval,
)
from kd.generation.sampling import Response
from kd.recipe import EvaluationSection

MATH = EvaluationSection(judge="math")
EXACT = EvaluationSection(judge="exact")
CLOSE = "\n</think>\n\n"


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (r"hm </think> so \boxed{1} or \boxed{2}", Answer("2", True)),
        (r"\boxed{1} </think> it is \boxed{2}.", Answer("2", True)),
        (r"\boxed{1} </think> it is 2", Answer("it is 2", False)),
        (r"so \boxed{1} </think>  ", Answer("1", True)),
        (r"so \boxed{1}, or \boxed{3} and", Answer("3", True)),
        ("1+1=2;</think>2", Answer("2", False)),
        ("a</think>b</think>c", Answer("c", False)),
        ("no thought, no box", None),
        ("</think>", None),
        ("", None),
    ],
)
def test_the_answer_is_boxed_after_the_thought_then_text_after_it_then_boxed_anywhere(
    response: str, expected: Answer | None
) -> None:
    assert extract_answer(response, "</think>") == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\left\{1, 2\right\}} is it", r"\left\{1, 2\right\}"),
        (r"\boxed{x^{2^{3}}} \boxed{4", "x^{2^{3}}"),
        (r"\boxed{ 7 }", "7"),
        (r"\boxed{a\\}b}", r"a\\"),
        (r"\boxed{{}", None),
        ("boxed{1}", None),
    ],
)
def test_the_last_box_with_balanced_braces_counts(text: str, expected: str | None) -> None:
    assert last_boxed(text) == expected


@pytest.mark.process
def test_the_math_judge_knows_equal_values_in_other_forms() -> None:
    pairs = [
        ("1/2", r"\boxed{\frac{1}{2}}", True),
        (r"\frac{1}{2}", "The answer is 0.5.", True),
        ("$12$", r"\boxed{12\text{ cm}}", True),
        ("1,000", r"\boxed{1000}", True),
        ("2", r"\boxed{\frac{1}{2}}", False),
        (r"\sqrt{8}", r"\boxed{2\sqrt{2}}", True),
        ("(1,2)", r"\boxed{(2,1)}", False),
        ("5", r"\boxed{}", False),
    ]
    responses = [Response(f"<think>\n?{CLOSE}{text}", 10, True) for _, text, _ in pairs]
    verdicts, summary = score(responses, [expected for expected, _, _ in pairs], MATH, CLOSE)
    assert [verdict.correct for verdict in verdicts] == [correct for _, _, correct in pairs]
    assert summary.num_correct == 5
    assert summary.num_judge_timeouts == 0


@pytest.mark.process
def test_an_answer_that_hangs_the_judge_is_wrong_and_the_next_one_is_judged() -> None:
    with MathJudge(timeout_s=60.0) as judge:
        assert judge("1/2", r"\boxed{0.5}")
        judge.timeout_s = 0.5
        assert not judge("9", r"\boxed{9^{9^{9^{9}}}}")
        assert judge.num_timeouts == 1
        judge.timeout_s = 60.0
        assert judge("1/2", r"\boxed{0.5}")


def test_the_math_judge_names_the_extra_when_math_verify_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(UserError, match=r'extra "eval"'):
        score([Response("</think>1", 3, True)], ["2"], MATH, CLOSE)
    assert score([Response("</think>1", 3, True)], ["1"], EXACT, CLOSE)[1].accuracy == 1.0


def test_the_summary_counts_what_was_not_closed_and_not_ended() -> None:
    responses = [
        Response("a</think>1", 4, True),
        Response("a</think> 1 ", 6, False),
        Response("a b", 2, False),
    ]
    verdicts, summary = score(responses, ["1", "1", "1"], EXACT, CLOSE)
    assert [verdict.correct for verdict in verdicts] == [True, True, False]
    assert (summary.accuracy, summary.mean_response_tokens) == (pytest.approx(2 / 3), 4.0)
    assert (summary.unclosed_fraction, summary.unended_fraction) == (
        pytest.approx(1 / 3),
        pytest.approx(2 / 3),
    )


def test_exact_means_the_same_characters_after_strip() -> None:
    verdicts, _ = score([Response("</think>0.5", 3, True)] * 2, [" 0.5\n", "1/2"], EXACT, CLOSE)
    assert [verdict.correct for verdict in verdicts] == [True, False]


@pytest.mark.parametrize(
    ("num_correct", "num_problems", "low", "high"),
    [
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (5, 10, 0.2366, 0.7634),
        (81, 263, 0.2553, 0.3662),
    ],
)
def test_the_wilson_interval_has_its_published_values(
    num_correct: int, num_problems: int, low: float, high: float
) -> None:
    assert wilson_interval(num_correct, num_problems) == (
        pytest.approx(low, abs=5e-5),
        pytest.approx(high, abs=5e-5),
    )


def test_the_wilson_interval_of_nothing_is_everything() -> None:
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_samples_of_a_problem_count_as_responses_and_their_problems_as_problems() -> None:
    texts = ["</think>1", "</think>2", "</think>2", "</think>2", "</think>1", "</think>1"]
    verdicts, summary = score([Response(text, 3, True) for text in texts], ["1", "2"], EXACT, CLOSE)
    assert [verdict.correct for verdict in verdicts] == [True, False, False, True, False, False]
    assert (summary.num_problems, summary.num_samples, summary.num_correct) == (2, 3, 2)
    assert summary.accuracy == pytest.approx(1 / 3)
    assert summary.pass_at_k == {"1": pytest.approx(1 / 3), "2": pytest.approx(2 / 3), "3": 1.0}


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_pass_at_k_is_the_share_of_all_choices_of_k_samples_that_hold_a_right_one(k: int) -> None:
    right = [
        [True, False, False, True, False],
        [False] * 5,
        [True] * 5,
        [False, False, True, False, False],
    ]
    shares = [[any(chosen) for chosen in itertools.combinations(samples, k)] for samples in right]
    expected = sum(sum(share) / len(share) for share in shares) / len(shares)
    assert mean_pass_at_k([sum(samples) for samples in right], 5, k) == pytest.approx(expected)


def test_the_interval_of_one_sample_is_wilsons() -> None:
    assert accuracy_interval([1, 0, 1, 1, 0], 1) == pytest.approx(wilson_interval(3, 5))


@pytest.mark.parametrize(
    ("counts", "independent"),
    [
        ([8, 8, 0, 0], (2, 4)),
        ([4, 4, 4, 4], (16, 32)),
        ([8, 8, 8, 8], (4, 4)),
        ([0, 0, 0, 0], (0, 4)),
        ([4], (0.5, 1)),
    ],
)
def test_samples_that_agree_say_no_more_than_one(
    counts: list[int], independent: tuple[int, int]
) -> None:
    assert accuracy_interval(counts, 8) == pytest.approx(wilson_interval(*independent))


def test_the_interval_holds_the_true_share_95_times_in_100_though_samples_of_a_problem_agree() -> (
    None
):
    draw = random.Random(0)
    hits = 0
    for _ in range(1000):
        # 30 problems, most of them easy or hard: mean 0.4
        shares = [draw.betavariate(0.6, 0.9) for _ in range(30)]
        counts = [sum(draw.random() < share for _ in range(16)) for share in shares]
        low, high = accuracy_interval(counts, 16)
        hits += low <= 0.4 <= high
    assert 0.93 <= hits / 1000 <= 0.97
