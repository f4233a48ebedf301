"""How a cell of a study ended that a job trained: read from the cell's folder, and written into
study.json.

`python -m kd.study.outcomes RUN` at the end of a job; nothing for a run that is of no study.
"""

import os
import sys
from pathlib import Path

from kd.cli import run as run_command
from kd.evaluate.evaluation import is_scored, result_files
from kd.files import write_json
from kd.recipe import Recipe, load_recipe
from kd.runs.folder import NOTHING_TO_LEARN, SUCCESS
from kd.runs.lock import hold
from kd.runs.records import StudyRecord, read_record
from kd.study.cells import REMEDY, Outcome
from kd.study.runner import describe


def outcome_of(recipe: Recipe, run: Path) -> Outcome:
    """Of a cell that is not at work now."""
    if (run / NOTHING_TO_LEARN).exists():
        return Outcome("no_supervised_token", (run / NOTHING_TO_LEARN).read_text().strip())
    if not (run / SUCCESS).exists():
        return Outcome(
            "failed", f"see the log of its job, in the folder that {run}/slurm.json names"
        )
    exports = [name for name in ("best", "last") if (run / "export" / name).exists()]
    scores = result_files(recipe, run / "evaluation", f"export-{exports[0]}") if exports else []
    if scores and is_scored(recipe, scores):
        return Outcome("done", ", ".join(map(describe, scores)))
    return Outcome("pending", "trained but not scored yet")


def record_outcome(run: Path) -> bool:
    """Whether the run is a cell of a study in the folder above it, which then knows its outcome."""
    path = run.parent / "study.json"
    if not os.path.lexists(path):
        return False
    hold(run.parent, ".outcomes.lock")  # the tasks of an array may end together
    study = read_record(path, StudyRecord, REMEDY)
    rows = [cell.as_read() for cell in study.cells]
    mine = [row for row in rows if row["name"] == run.name]
    if not mine:
        return False
    recipe = load_recipe(str(run.parent / "recipes" / f"{run.name}.json"))
    mine[0].update(vars(outcome_of(recipe, run)))
    write_json(path, study.as_read() | {"cells": rows})
    return True


def main() -> None:
    record_outcome(Path(sys.argv[1]))


if __name__ == "__main__":
    run_command(main)
