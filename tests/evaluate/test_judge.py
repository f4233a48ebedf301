"""The math judge on what data sets write as gold and models as answers."""

import time
from collections.abc import Iterator

import pytest
from judged_pairs import DIFFERENT, EQUAL

from kd.evaluate.answers import equal_answers
from kd.evaluate.boxes import last_boxed
from kd.evaluate.judge import MathJudge
from kd.evaluate.notation import tidy
from kd.evaluate.quantities import read_quantity, without_e_notation


def pairs() -> Iterator[tuple[str, str, str, bool]]:
    for table, is_equal in ((EQUAL, True), (DIFFERENT, False)):
        for kind, rows in table.items():
            for answer, gold in rows:
                is_text = "boxed" in answer or kind == "sentences" or "answer" in answer.lower()
                yield kind, gold, answer if is_text else f"\\boxed{{{answer}}}", is_equal


@pytest.mark.process
def test_the_judge_is_right_about_every_pair_of_the_table() -> None:
    start = time.monotonic()
    with MathJudge(timeout_s=60.0) as judge:
        wrong = [
            f"{kind}: {answer!r} for {gold!r} is not {is_equal}"
            for kind, gold, answer, is_equal in pairs()
            if judge(gold, answer) != is_equal
        ]
        assert judge.num_timeouts == 0
    assert not wrong, "\n".join(wrong)
    assert len(list(pairs())) >= 150
    assert time.monotonic() - start < 60


def test_numbers_and_forms_are_decided_without_an_algebra_system() -> None:
    def never(gold: str, answer: str) -> bool:
        raise AssertionError(f"{answer} for {gold}")

    decided = ("powers of ten", "several boxes", "choices", "words", "percentages")
    for kind, gold, answer, is_equal in pairs():
        if kind in decided and "e" not in (gold[-1], answer[-2]) and "frac" not in answer:
            assert equal_answers(gold, answer, never) == is_equal, (gold, answer)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"\boxed{1} and \boxed{2}", "1, 2"),
        (r"$x=\boxed{1}$, $y = \boxed{2}$ and $z_1=\boxed{3}$.", "1, 2, 3"),
        (r"\boxed{1}" + "\n\n" + r"\boxed{2}", "2"),
        (r"\boxed{0}. So \boxed{1}, \boxed{2}", "1, 2"),
        (r"\boxed{1} or \boxed{2}", "2"),
        (r"\boxed{1} and \boxed{2", "1"),
    ],
)
def test_boxes_that_are_joined_are_one_list(text: str, expected: str) -> None:
    assert last_boxed(text) == expected


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e6000", None),
        ("9" * 5000, None),
        ("1/0", None),
        (r"\frac{1}{0}", None),
        ("", None),
        (".", None),
        ("1 234 567", 1234567),
        ("-3 dozen", -36),
        ("12 34", None),
    ],
)
def test_what_is_no_number_of_a_reasonable_size_is_left_alone(text: str, value: int | None) -> None:
    quantity = read_quantity(tidy(text))
    assert (quantity and quantity.value) == value


def test_e_notation_inside_an_expression_is_rewritten_and_eulers_number_is_not() -> None:
    assert without_e_notation("2e-3x") == "2e-3x"
    assert without_e_notation("1.5E+3 + 2e") == r"(1.5 \times 10^{3}) + 2e"
    assert without_e_notation("2e^3") == "2e^3"
    assert without_e_notation(r"\frac{1e3}{x}") == r"\frac{(1 \times 10^{3})}{x}"
