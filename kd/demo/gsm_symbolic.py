"""Grade-school word problems with worked solutions: reasoning-gym, split by template.

A template is the text of one problem with its names and numbers left open. Training, validation and
report draw from different templates: a report on templates seen in training would show memory, not
reasoning.

    prompt      A boy has 8 books. His sister has 5 fewer books than he has. How many books do they
                have together?
    reasoning   His sister has 8 - 5 = 3 books.\\nTogether, they have 8 + 3 = 11 books.
    answer      11
"""

from pathlib import Path
from random import Random
from typing import Any, Literal

from reasoning_gym.arithmetic.gsm_symbolic.gsm_symbolic import (
    GSMSymbolicDataset,
    GSMSymbolicDatasetConfig,
    tasks_ok,
)

from kd.files import write_jsonl

Split = Literal["train", "validation", "report"]

# The package lists those whose problems are sound, one of them twice
TEMPLATES = sorted(set(tasks_ok))
NUM_ROWS: dict[Split, int] = {"train": 2000, "validation": 128, "report": 200}
DIFFICULTY = 1.0  # the only one there is
ANSWER_MARKER = "\n#### "  # precedes the number that ends a solution


def split_of(template: int) -> Split:
    """The split that all problems of a template belong to: about one template in ten is held out
    for each purpose.
    """
    return "validation" if template % 10 == 0 else "report" if template % 10 == 5 else "train"


def draw_rows(split: Split, num_rows: int, seed: int = 0) -> list[dict[str, str]]:
    """Rows {"id", "prompt", "reasoning", "answer"} of distinct problems, templates in turn; the
    same for one seed.

    Raises ValueError when the split's templates give fewer problems than are asked for.
    """
    generators = GSMSymbolicDataset(GSMSymbolicDatasetConfig()).generators
    templates = [template for template in TEMPLATES if split_of(template) == split]
    rng = Random(f"{seed}/{split}")
    rows: dict[str, dict[str, str]] = {}
    for attempt in range(10 * num_rows):
        if len(rows) == num_rows:
            break
        template = templates[attempt % len(templates)]
        problem = generators[template](rng, DIFFICULTY)
        rows.setdefault(problem["question"], _to_row(f"{split}-{template}-{attempt}", problem))
    if len(rows) < num_rows:
        raise ValueError(
            f"num_rows = {num_rows}: the templates of {split!r} gave only {len(rows)} distinct "
            "problems"
        )
    return list(rows.values())


def write_problem_sets(output: Path) -> None:
    """Write the missing ones of output/{train,validation,report}.jsonl, aside first: a file that
    exists is whole.
    """
    for split, num_rows in NUM_ROWS.items():
        path = output / f"{split}.jsonl"
        if not path.exists():
            write_jsonl(path, draw_rows(split, num_rows))


def _to_row(row_id: str, problem: dict[str, Any]) -> dict[str, str]:
    # The number behind the marker is left out: here and there it is 24.0 where the answer says 24.
    reasoning, marker, _ = problem["metadata"]["answer_cot"].rpartition(ANSWER_MARKER)
    assert marker, f"{row_id}: no {ANSWER_MARKER!r} in the solution"
    return {
        "id": row_id,
        "prompt": problem["question"],
        "reasoning": reasoning,
        "answer": problem["answer"],
    }
