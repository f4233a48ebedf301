"""How much of lock-stepped ranks' time is work, for long-tailed lengths, by plan_step itself.

    python benchmarks/balance.py [--recipe qwen7b_to_1p5b_trunc100] [--draws 20] [--output DIR]

Ranks run their micro-batches side by side, and each row of them takes as long as its slowest. The
useful share is the work of all sequences, padding left out, over ranks times the sum of the largest
of each row; work is a L + b L^2 from the shapes of the recipe (both models, recomputation, loss).
Lengths are log-normal (median 4,500, sigma 0.55, a guess), capped or not, and
kept whole or by half; a global batch is about four micro-batches of the budget a rank. Beside
token budgets stands what one sequence a micro-batch gives. Nothing is trained; seconds on a CPU.
Writes DIR/balance.json and balance.md.
"""

import argparse
import itertools
import shlex
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from kd.cli import run
from kd.data.step_plan import BatchShape, Work, plan_step
from kd.data.truncate import IntArray
from kd.files import write_json, write_text
from kd.recipe import ROOT, load_recipe
from kd.runs.environment import environment

MEDIAN, SIGMA, BUDGET, MICRO_BATCHES = 4500, 0.55, 16384, 4
CAPS, KEEPS, RANKS = (4096, None), (1.0, 0.5), (8, 32, 256)
WAYS = {"packed budget": "packed", "padded budget": "padded", "one sequence": None}
HEADER = """\
| longest | keep | ranks | way | micro-batches a rank | useful share | worst of the draws |
|---|---|---|---|---|---|---|
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Simulate how long ranks wait for one another.")
    parser.add_argument("--recipe", default="qwen7b_to_1p5b_trunc100")
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args()
    from kd.plan.flops import pair_of  # imports torch

    work = pair_of(load_recipe(arguments.recipe)).work
    rows = [
        row_of(cap, keep, ranks, way, work, arguments.draws)
        for cap, keep, ranks, way in itertools.product(CAPS, KEEPS, RANKS, WAYS)
    ]
    command = f"python benchmarks/balance.py {shlex.join(sys.argv[1:])}".strip()
    facts = {
        "command": command,
        "environment": environment(),
        "recipe": arguments.recipe,
        "work": {"linear": work.linear, "quadratic": work.quadratic},
        "lengths": {"median": MEDIAN, "sigma": SIGMA},
        "budget": BUDGET,
        "rows": rows,
    }
    write_json(arguments.output / "balance.json", facts)
    table = HEADER + "".join(markdown(row) for row in rows)
    write_text(arguments.output / "balance.md", table)
    print(table)


def row_of(
    cap: int | None, keep: float, num_ranks: int, way: str, work: Work, num_draws: int
) -> dict[str, Any]:
    shares, rows = [], []
    for seed in range(num_draws):
        length_N = draw(cap, keep, num_ranks, seed)
        shape = BatchShape(len(length_N), work=work)
        if layout := WAYS[way]:
            shape = replace(shape, max_tokens=BUDGET, layout=layout)
        plan = plan_step(0, length_N, shape, seed=seed, data_parallel_size=num_ranks)
        loads = np.array([[load(length_N[m], shape) for m in rank] for rank in plan.micro_batches])
        shares.append(float(work.of(length_N).sum() / (num_ranks * loads.max(axis=0).sum())))
        rows.append(len(plan.micro_batches[0]))
    return {
        "longest": cap,
        "keep_fraction": keep,
        "ranks": num_ranks,
        "way": way,
        "micro_batches_per_rank": statistics.median(rows),
        "useful_share": statistics.median(shares),
        "worst_share": min(shares),
    }


def draw(cap: int | None, keep: float, num_ranks: int, seed: int) -> IntArray:
    """So many sequences that they fill MICRO_BATCHES budgets on every rank."""
    random = np.random.default_rng(seed)
    full = np.exp(random.normal(np.log(MEDIAN), SIGMA, 400 * num_ranks))
    kept = np.maximum(keep * np.minimum(full, cap or np.inf), 1).astype(np.int64)
    num = int(np.searchsorted(kept.cumsum(), MICRO_BATCHES * BUDGET * num_ranks))
    length_N: IntArray = kept[:num]
    return length_N


def load(length_M: IntArray, shape: BatchShape) -> float:
    """Work of a micro-batch, padding included."""
    each = shape.work.of(length_M)
    return float(each.sum() if shape.layout == "packed" else len(each) * each.max(initial=0.0))


def markdown(row: dict[str, Any]) -> str:
    return (
        f"| {row['longest'] or 'as drawn'} | {row['keep_fraction']:g} | {row['ranks']} | "
        f"{row['way']} | {row['micro_batches_per_rank']:g} | {row['useful_share']:.3f} | "
        f"{row['worst_share']:.3f} |\n"
    )


if __name__ == "__main__":
    run(main)
