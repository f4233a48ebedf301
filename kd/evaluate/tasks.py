"""Public benchmarks, as data: which hub dataset, which columns, and how many samples of each
problem are usual.

`python -m kd.evaluate.tasks aime24 math500` fetches them to the hub cache; then no network is
needed.
"""

import difflib
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kd.constants import EXIT_USER_ERROR
from kd.errors import UserError
from kd.evaluate.problems import Problem, check_limit
from kd.hub import hub_errors
from kd.recipe import Recipe

if TYPE_CHECKING:
    import datasets

# That of Qwen2.5-Math and DeepSeek-R1.
INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."


def _after_hashes(answer: Any) -> str:
    """GSM8K writes a solution, then `#### 1,234`."""
    _, hashes, final = str(answer).rpartition("####")
    return final.strip().replace(",", "") if hashes else ""


def _joined(answers: Any) -> str:
    """OlympiadBench has a list of final answers."""
    return ", ".join(map(str, answers))


@dataclass(frozen=True)
class Task:
    """problem, answer: columns. num_samples: of each problem, more where they are few."""

    hub_id: str
    split: str
    problem: str
    num_samples: int
    answer: str = "answer"
    config: str | None = None
    to_answer: Callable[[Any], str] = str


TASKS: dict[str, Task] = {
    "aime24": Task("HuggingFaceH4/aime_2024", "train", "problem", num_samples=64),
    "aime25": Task("yentinglin/aime_2025", "train", "problem", num_samples=64),
    "amc23": Task("math-ai/amc23", "test", "question", num_samples=16),
    "math500": Task("HuggingFaceH4/MATH-500", "test", "problem", num_samples=4),
    "minerva_math": Task("math-ai/minervamath", "test", "question", num_samples=4),
    "olympiadbench": Task(
        "Hothan/OlympiadBench",
        "train",
        "question",
        num_samples=4,
        answer="final_answer",
        config="OE_TO_maths_en_COMP",  # open-ended, text only, English
        to_answer=_joined,
    ),
    "gsm8k": Task(
        "openai/gsm8k", "test", "question", num_samples=1, config="main", to_answer=_after_hashes
    ),
}


def parse_tasks(names: Iterable[str]) -> list[str]:
    """The names, each once. Raises UserError with the nearest names for an unknown one."""
    names = list(dict.fromkeys(name.strip() for name in names if name.strip()))
    for name in names:
        if name not in TASKS:
            close = difflib.get_close_matches(name, TASKS, cutoff=0.5)
            nearest = f" Did you mean {' or '.join(close)}?" if close else ""
            raise UserError(
                f"--tasks: {name!r} is not a task.{nearest}\nThe tasks are {', '.join(TASKS)}"
            )
    if not names:
        raise UserError(f"--tasks: name at least one of {', '.join(TASKS)}")
    return names


def check_evaluation(recipe: Recipe) -> None:
    """Raises UserError when the recipe names nothing to evaluate on, or no task of that name."""
    if recipe.evaluation.tasks:
        parse_tasks(recipe.evaluation.tasks)
    elif recipe.evaluation.path is None:
        raise UserError(
            "neither evaluation.path nor evaluation.tasks is set: name a JSONL file of problems "
            "(prompt, answer) or tasks in kd/evaluate/tasks.py, such as --set "
            "'evaluation.tasks=[\"math500\"]'"
        )


def load_task(name: str, limit: int | None = None) -> list[Problem]:
    """The first `limit` problems of a task, each with INSTRUCTION behind it; an id is the row's
    number, from 1.

    Raises UserError that names task and dataset when it cannot be had, or lacks a column or an
    answer.
    """
    check_limit(limit)
    task = TASKS[name]
    where = f"--tasks {name}: {task.hub_id!r}"
    rows = _load_rows(name, task)
    missing = [column for column in (task.problem, task.answer) if column not in rows.column_names]
    if missing:
        raise UserError(
            f"{where} has no column {missing[0]!r}; its columns are {', '.join(rows.column_names)}"
        )
    if len(rows) == 0:
        raise UserError(f"{where}: split {task.split!r} is empty")
    return [
        _problem(where, task, number, row)
        for number, row in enumerate(rows.select(range(len(rows))[:limit]), 1)
    ]


def _load_rows(name: str, task: Task) -> "datasets.Dataset":
    from datasets import load_dataset  # takes seconds, and local problems need none of it

    try:
        with hub_errors(f"--tasks {name}", task.hub_id):
            return load_dataset(task.hub_id, task.config, split=task.split)
    except UserError as error:
        raise UserError(
            f"{error}\nTo fetch the task, run `python -m kd.evaluate.tasks {name}`"
        ) from error.__cause__


def _problem(where: str, task: Task, number: int, row: dict[str, Any]) -> Problem:
    problem, answer = str(row[task.problem] or "").strip(), task.to_answer(row[task.answer]).strip()
    for column, text in ((task.problem, problem), (task.answer, answer)):
        if not text:
            raise UserError(f"{where}: row {number} has no usable {column!r}: {row[column]!r}")
    return Problem(str(number), f"{problem}\n{INSTRUCTION}", answer)


def main(names: Sequence[str]) -> None:
    for name in parse_tasks(names):
        print(f"{name}: {len(load_task(name))} problems of {TASKS[name].hub_id}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
