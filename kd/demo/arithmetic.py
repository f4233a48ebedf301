"""Chained arithmetic modulo 10: problems whose traces answer early and check afterwards.

A problem is a start digit and operations, applied from left to right. Its trace computes, states
the answer, undoes the operations (backward check) and repeats them (forward check); the answer
follows the thought:

    9*9-8+6    <think>9*9=1;1-8=3;3+6=9;=9!9-6=3;3+8=1;1*9=9;9*9=1;1-8=3;3+6=9;</think>9

By this construction the answer comes before half of the sequence. Factors are 3, 7 and 9, which
modulo 10 have inverses and carry every error on.

    python -m kd.demo.arithmetic --output DIR [--seed 0]

writes the problem sets of SETS as DIR/NAME.jsonl.
"""

import argparse
import hashlib
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kd.files import write_jsonl

Split = Literal["selection", "report", "training", "pretraining"]
Operation = tuple[str, int]

INVERSE_FACTOR = {3: 7, 7: 3, 9: 9}
OPPOSITE = {"+": "-", "-": "+", "*": "*"}
ALPHABET = "0123456789+-*=;!"


@dataclass(frozen=True)
class ArithmeticSet:
    """What is drawn: how many problems, the range of operations, what their traces contain.

    num_checks: 0 none, 1 the backward check, 2 the forward check after it. random_products replaces
        the result of each multiplication by a random digit: such traces teach the form, + and -,
        and leave * to be learned later.
    """

    split: Split
    num_problems: int
    min_operations: int = 3
    max_operations: int = 4
    num_checks: int = 2
    random_products: bool = False


# Pre-training takes two stages. With checks in the first, half of a trace can be copied, and a
# small model learns to copy long before it learns to compute.
SETS = {
    "train_problems": ArithmeticSet("training", 1064),
    "selection": ArithmeticSet("selection", 300),
    "report": ArithmeticSet("report", 300),
    "teacher_stage_1": ArithmeticSet("pretraining", 9700, 2, 3, num_checks=0),
    "teacher_stage_2": ArithmeticSet("pretraining", 8100),
    "student_base_stage_1": ArithmeticSet(
        "pretraining", 9700, 2, 3, num_checks=0, random_products=True
    ),
    "student_base_stage_2": ArithmeticSet("pretraining", 8100, random_products=True),
}


@dataclass(frozen=True)
class ArithmeticProblem:
    start: int
    operations: tuple[Operation, ...]

    @property
    def prompt(self) -> str:
        return str(self.start) + "".join(f"{sign}{operand}" for sign, operand in self.operations)


def apply(value: int, operation: Operation) -> int:
    """The digit after one operation, modulo 10."""
    sign, operand = operation
    return {"+": value + operand, "-": value - operand, "*": value * operand}[sign] % 10


def inverse(operation: Operation) -> Operation:
    """The operation that undoes another modulo 10: +6 and -6, *3 and *7, *9 and *9."""
    sign, operand = operation
    return OPPOSITE[sign], INVERSE_FACTOR[operand] if sign == "*" else operand


def split_of(prompt: str) -> Split:
    """The split of a problem, by a hash of its text: no seed can put it into another."""
    bucket = hashlib.sha256(prompt.encode()).digest()[0] % 10
    return (
        "selection"
        if bucket == 0
        else "report"
        if bucket == 1
        else "training"
        if bucket < 4
        else "pretraining"
    )


def draw_rows(problem_set: ArithmeticSet, seed: str) -> list[dict[str, str]]:
    """Rows {"id", "prompt", "reasoning", "answer"} of distinct problems, by the seed.

    Raises ValueError when the operations allow fewer problems than are asked for.
    """
    rng = random.Random(seed)
    rows: dict[str, dict[str, str]] = {}
    for _ in range(100 * problem_set.num_problems):
        if len(rows) == problem_set.num_problems:
            return list(rows.values())
        problem = _draw_problem(problem_set, rng)
        if problem.prompt not in rows and split_of(problem.prompt) == problem_set.split:
            values = _values(problem, rng if problem_set.random_products else None)
            rows[problem.prompt] = {
                "id": f"{problem_set.split}-{problem.prompt}",
                "prompt": problem.prompt,
                "reasoning": render_trace(problem.operations, values, problem_set.num_checks),
                "answer": str(values[-1]),
            }
    raise ValueError(
        f"num_problems = {problem_set.num_problems}: there are too few distinct problems; allow "
        "more operations"
    )


def render_trace(operations: tuple[Operation, ...], values: list[int], num_checks: int = 2) -> str:
    """The thought without markers: the steps through values, the answer, and the checks.

    num_checks: 0 none, 1 the backward check, 2 the forward check after it.
    """
    forward = list(zip(values[:-1], operations, values[1:], strict=True))
    backward = [
        (after, inverse(operation), before) for before, operation, after in reversed(forward)
    ]
    checks = [_render_steps(backward), _render_steps(forward)][:num_checks]
    return f"{_render_steps(forward)}={values[-1]}!{''.join(checks)}"


def write_problem_sets(output: Path, seed: int = 0) -> None:
    """Write each set of SETS as output/NAME.jsonl, aside first: a file is whole or absent."""
    for name, problem_set in SETS.items():
        write_jsonl(output / f"{name}.jsonl", draw_rows(problem_set, seed=f"{seed}/{name}"))


def _draw_problem(problem_set: ArithmeticSet, rng: random.Random) -> ArithmeticProblem:
    num_operations = rng.randint(problem_set.min_operations, problem_set.max_operations)
    return ArithmeticProblem(
        rng.randrange(10), tuple(_draw_operation(rng) for _ in range(num_operations))
    )


def _draw_operation(rng: random.Random) -> Operation:
    sign = rng.choice("+-*")
    return sign, rng.choice(list(INVERSE_FACTOR)) if sign == "*" else rng.randint(1, 9)


def _values(problem: ArithmeticProblem, product_rng: random.Random | None) -> list[int]:
    """The start and the digit after each operation; products come from product_rng if any."""
    values = [problem.start]
    for operation in problem.operations:
        random_product = product_rng is not None and operation[0] == "*"
        values.append(product_rng.randrange(10) if random_product else apply(values[-1], operation))  # type: ignore[union-attr]
    return values


def _render_steps(steps: list[tuple[int, Operation, int]]) -> str:
    return "".join(f"{before}{sign}{operand}={after};" for before, (sign, operand), after in steps)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the problem sets of the arithmetic task.")
    parser.add_argument("--output", type=Path, required=True, help="folder for the .jsonl files")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write_problem_sets(args.output, args.seed)


if __name__ == "__main__":
    main()
