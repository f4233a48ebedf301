"""What a study costs with one pass of the teacher, and with a teacher in every cell.

    python benchmarks/study_cost.py --recipe tiny [--keep 0.25,0.5,0.75,1.0] [--seeds 3]
                                    [--work DIR] [--output DIR]

Trains and scores every cell twice, in turn: from an fp32 cache of hidden states, and with the
teacher itself. Both studies stay in --work. FLOPs are by the plan's formula, of the batches as they
were; seconds are those of whole cells, with loading, validation, checkpoints, export and scoring,
and of all of the filling. Writes study_cost.json and .md.
"""

import argparse
import math
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kd.cli import CacheRequest, recipe_parser, run
from kd.files import read_json, write_json, write_text
from kd.recipe import ROOT
from kd.runs.environment import environment
from kd.runs.records import FILLED, FilledRecord, read_metrics, read_record
from kd.study.cells import Cell, make_study, parse_axes
from kd.study.runner import Runner

CACHE = CacheRequest("hidden", "fp32")
HEADER = """\
| study | FLOPs | of them the teacher | s | accuracy of each cell |
|---|---|---|---|---|
"""


def main() -> None:
    arguments = parse_arguments()
    studies = {
        name: make_study(
            arguments.recipe,
            arguments.overrides,
            parse_axes(arguments.keep, None, None, arguments.seeds, cross=False),
            arguments.work / name,
            options,
        )
        for name, options in (("cache", CACHE), ("teacher", None))
    }
    runners = {name: TimedRunner(study) for name, study in studies.items()}
    turns = {name: runner.run() for name, runner in runners.items()}
    cells = [one_cell(turns) for _ in studies["cache"].cells]
    for turn in turns.values():  # the references' scores
        next(turn, None)
    filled = read_record(studies["cache"].cache / FILLED, FilledRecord, "fill it again")
    facts = {
        "command": f"python benchmarks/study_cost.py {shlex.join(sys.argv[1:])}".strip(),
        "environment": environment(),
        "cells": cells,
        **totals(cells, filled, runners["cache"].filling_seconds),
    }
    write_json(arguments.output / "study_cost.json", facts)
    write_text(arguments.output / "study_cost.md", markdown(facts))
    print(markdown(facts))


def parse_arguments() -> argparse.Namespace:
    parser = recipe_parser("Measure a study with and without a teacher's cache.")
    parser.add_argument("--keep", default="0.25,0.5,0.75,1.0", help="lengths, as launch/study.py's")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "study_cost")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    return parser.parse_args()


class TimedRunner(Runner):
    filling_seconds = 0.0

    def _fill_cache(self) -> None:
        started = time.perf_counter()
        super()._fill_cache()
        self.filling_seconds = time.perf_counter() - started


def one_cell(turns: dict[str, Iterator[tuple[Cell, Any]]]) -> dict[str, Any]:
    """The next cell of both studies, each with what it took."""
    found: dict[str, Any] = {}
    runs = {}
    for name, turn in turns.items():
        started = time.perf_counter()
        cell, outcome = next(turn)
        if outcome.status != "done":
            sys.exit(f"{name}, {cell.point.name}: {outcome.status}: {outcome.text}")
        run_dir = runs[name] = cell.recipe.run_dir
        records = read_metrics(run_dir / "metrics.jsonl")
        found["name"] = cell.point.name
        found[name] = {
            "seconds": time.perf_counter() - started,  # of the first cell, with the filling
            "training_seconds": sum(record["step_ms"] for record in records) / 1000,
            "peak_memory_gib": max(record["peak_memory_gib"] for record in records),
            "flops": math.fsum(record["flops"] for record in records),
            "flops_spared": math.fsum(record["flops_spared"] or 0.0 for record in records),
            "losses": [record["loss"] for record in records],
            "accuracy": read_json(run_dir / "evaluation" / "export-best.json")["accuracy"],
        }
    losses = [found[name].pop("losses") for name in turns]
    differing = (i for i, pair in enumerate(zip(*losses, strict=True), 1) if pair[0] != pair[1])
    largest = max(abs(one - other) / other for one, other in zip(*losses, strict=True))
    texts = [
        (path / "evaluation" / "export-best.responses.jsonl").read_text() for path in runs.values()
    ]
    return found | {
        "same_responses": texts[0] == texts[1],
        "first_step_that_differs": next(differing, None),
        "largest_relative_difference_of_a_loss": largest,
    }


def totals(
    cells: list[dict[str, Any]], filled: FilledRecord, filling_seconds: float
) -> dict[str, Any]:
    def total(name: str, figure: str) -> float:
        return math.fsum(cell[name][figure] for cell in cells)

    assert filled.flops is not None
    cells[0]["cache"]["seconds"] -= filling_seconds
    spared = total("cache", "flops_spared")
    saved = total("teacher", "seconds") - total("cache", "seconds")
    return {
        "filled": filled.model_dump(),
        "filling_seconds": filling_seconds,
        "flops": {
            "cache": filled.flops + total("cache", "flops"),
            "teacher": total("teacher", "flops"),
        },
        "flops_of_teacher": {"cache": filled.flops, "teacher": spared},
        "passes_over_whole_traces": spared / filled.flops,
        "seconds": {
            "cache": filling_seconds + total("cache", "seconds"),
            "teacher": total("teacher", "seconds"),
        },
        "cells_that_repay_the_filling": {
            "flops": math.ceil(filled.flops / (spared / len(cells))),
            "seconds": math.ceil(filling_seconds / (saved / len(cells))) if saved > 0 else None,
        },
    }


def markdown(facts: dict[str, Any]) -> str:
    text = HEADER
    for name in ("teacher", "cache"):
        accuracies = " ".join(f"{cell[name]['accuracy']:.3f}" for cell in facts["cells"])
        text += (
            f"| {name} | {facts['flops'][name]:.3g} | {facts['flops_of_teacher'][name]:.3g} | "
            f"{facts['seconds'][name]:.0f} | {accuracies} |\n"
        )
    same = sum(cell["same_responses"] for cell in facts["cells"])
    repaid = facts["cells_that_repay_the_filling"]
    worst = max(cell["largest_relative_difference_of_a_loss"] for cell in facts["cells"])
    return (
        f"{text}\nFilling: {facts['filling_seconds']:.0f} s, {facts['filled']['flops']:.3g} FLOPs, "
        f"repaid by {repaid['flops']} cells in FLOPs and {repaid['seconds']} in seconds. Responses "
        f"of {same} of {len(facts['cells'])} cells are the same to the last one; losses differ by "
        f"at most {worst:.1g}.\n"
    )


if __name__ == "__main__":
    run(main)
