"""Problems and traces of the arithmetic task."""

import itertools
import json
import re
from pathlib import Path

import pytest

from kd.demo.arithmetic import (
    SETS,
    ArithmeticSet,
    apply,
    draw_rows,
    inverse,
    render_trace,
    split_of,
    write_problem_sets,
)

STEP = re.compile(r"(\d)([-+*])(\d)=(\d);")
SMALL = ArithmeticSet("training", 200)


def steps(text: str) -> list[tuple[int, tuple[str, int], int]]:
    assert STEP.sub("", text) == ""
    return [(int(a), (sign, int(b)), int(c)) for a, sign, b, c in STEP.findall(text)]


def split_trace(row: dict[str, str]) -> tuple[list, str, list]:
    before, stated, after = re.fullmatch(r"([^!]*;)=(\d)!(.*)", row["reasoning"]).groups()
    return steps(before), stated, steps(after)


def test_the_documented_example_is_rendered_as_written() -> None:
    trace = render_trace((("*", 9), ("-", 8), ("+", 6)), [9, 1, 3, 9])
    assert trace == "9*9=1;1-8=3;3+6=9;=9!9-6=3;3+8=1;1*9=9;9*9=1;1-8=3;3+6=9;"


def test_every_step_and_check_is_right_modulo_ten_and_steps_follow_the_prompt() -> None:
    for row in draw_rows(SMALL, "0"):
        forward, stated, checks = split_trace(row)
        assert all(
            apply(before, operation) == after for before, operation, after in forward + checks
        )
        assert row["prompt"] == str(forward[0][0]) + "".join(
            f"{sign}{digit}" for _, (sign, digit), _ in forward
        )
        assert all(one[2] == two[0] for one, two in itertools.pairwise(forward))
        assert stated == row["answer"] == str(forward[-1][2])


def test_checks_undo_the_operations_and_then_repeat_them() -> None:
    for row in draw_rows(SMALL, "0"):
        forward, _, checks = split_trace(row)
        undone = [
            (after, inverse(operation), before) for before, operation, after in reversed(forward)
        ]
        assert checks == undone + forward


def test_the_answer_is_stated_before_half_of_the_sequence() -> None:
    for row in draw_rows(SMALL, "0"):
        num_tokens = len(row["prompt"]) + 1 + len(row["reasoning"]) + 3
        assert len(row["prompt"]) + 1 + row["reasoning"].index("!") + 1 < num_tokens // 2


@pytest.mark.parametrize("num_checks", [0, 1, 2])
def test_as_many_checks_as_asked_for_and_operations_within_their_range(num_checks: int) -> None:
    for row in draw_rows(ArithmeticSet("pretraining", 100, 5, 6, num_checks=num_checks), "0"):
        forward, _, checks = split_trace(row)
        assert len(forward) in (5, 6)
        assert len(checks) == num_checks * len(forward)


def test_the_inverse_undoes_each_operation_on_each_digit() -> None:
    for operation in [("+", 1), ("+", 9), ("-", 4), ("*", 3), ("*", 7), ("*", 9)]:
        for digit in range(10):
            assert apply(apply(digit, operation), inverse(operation)) == digit


def test_random_products_leave_sums_right_and_products_to_chance() -> None:
    num_right = num_products = 0
    for row in draw_rows(ArithmeticSet("pretraining", 300, random_products=True), "0"):
        forward, stated, checks = split_trace(row)
        assert stated == row["answer"] == str(forward[-1][2])
        assert checks[len(forward) :] == forward
        for before, operation, after in forward:
            if operation[0] == "*":
                num_products += 1
                num_right += apply(before, operation) == after
            else:
                assert apply(before, operation) == after
    assert num_products > 200
    assert 0.02 < num_right / num_products < 0.2


def test_splits_are_disjoint_whatever_the_seed() -> None:
    prompts: dict[str, set[str]] = {}
    for problem_set in SETS.values():
        small = ArithmeticSet(**{**vars(problem_set), "num_problems": 150})
        for seed in range(3):
            rows = draw_rows(small, str(seed))
            prompts.setdefault(problem_set.split, set()).update(row["prompt"] for row in rows)
    assert set(prompts) == {"selection", "report", "training", "pretraining"}
    assert sum(map(len, prompts.values())) == len(set().union(*prompts.values()))
    assert all(
        split_of(prompt) == split for split, members in prompts.items() for prompt in members
    )


def test_rows_are_distinct_and_the_same_for_the_same_seed() -> None:
    rows = draw_rows(SMALL, "7")
    assert rows == draw_rows(SMALL, "7") != draw_rows(SMALL, "8")
    assert (
        len({row["id"] for row in rows})
        == len({row["prompt"] for row in rows})
        == SMALL.num_problems
    )


def test_asking_for_more_problems_than_there_are_is_an_error() -> None:
    with pytest.raises(ValueError, match="num_problems = 400"):
        draw_rows(ArithmeticSet("training", 400, 1, 1), "0")


def test_the_written_sets_are_whole_and_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "kd.demo.arithmetic.SETS", {"one": SMALL, "two": ArithmeticSet("report", 10)}
    )
    write_problem_sets(tmp_path / "sets")
    assert sorted(path.name for path in (tmp_path / "sets").iterdir()) == ["one.jsonl", "two.jsonl"]
    rows = [json.loads(line) for line in (tmp_path / "sets" / "one.jsonl").read_text().splitlines()]
    assert len(rows) == 200
    assert set(rows[0]) == {"id", "prompt", "reasoning", "answer"}
