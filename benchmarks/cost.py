"""What half of every trace costs beside the whole of it: the same steps at several lengths, by the
real launcher.

    python benchmarks/cost.py [--recipe tiny] [--keep 1.0,0.5,0.25] [--steps 16] [--rounds 5]
    [--set ...] [--output DIR]

Runs on all GPUs of this machine, or on two ranks of its CPU, the lengths in turn, several times, so
that other load on the machine hits all alike: a ratio of times is the median of those of the
rounds. One more length, of two tokens, shows the fixed part of a step: gathers, optimizer and
Python, which no truncation saves. Writes DIR/cost.json and cost.md: each figure, and its ratio to
that of the first length.
"""

import argparse
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from kd.cli import overrides_argument, run
from kd.cluster.local import local_launch
from kd.errors import UserError
from kd.files import write_json, write_text
from kd.recipe import ROOT, load_recipe
from kd.runs.environment import environment
from kd.runs.records import read_metrics

WARMUP_STEPS = 4
FIXED = "fixed"  # the name of the run of two tokens
# Of the embedded pair, so large that its step is more than its fixed part; a rank's part of whole
# traces is one micro-batch.
BATCH = ("training.global_batch_size=256", "training.max_tokens_per_micro_batch=10240")
HEADER = """\
| keep | tokens | FLOPs | step ms | above the fixed part | peak GiB of a rank \
| above the fixed part |
|---|---|---|---|---|---|---|
"""


def main() -> None:
    arguments = parse_arguments()
    overrides = [*(BATCH if arguments.recipe == "tiny" else ()), *arguments.overrides]
    names = [*arguments.keep, FIXED]
    with tempfile.TemporaryDirectory() as folder:
        rounds = [
            {
                name: train(arguments, name, [*overrides, f"run.output_dir={folder}/{i}"])
                for name in names
            }
            for i in range(arguments.rounds)
        ]
    rows = [summarise(name, [done[name] for done in rounds]) for name in names]
    command = f"python benchmarks/cost.py {shlex.join(sys.argv[1:])}".strip()
    facts = {"command": command, "environment": environment(), "overrides": overrides, "rows": rows}
    write_json(arguments.output / "cost.json", facts)
    table = HEADER + "".join(markdown(row, rows) for row in rows)
    write_text(arguments.output / "cost.md", table)
    print(table)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure what a step costs at several lengths.")
    parser.add_argument("--recipe", default="tiny")
    parser.add_argument(
        "--keep",
        default="1.0,0.5,0.25",
        help="values of keep_fraction; the first is what others relate to",
    )
    parser.add_argument("--steps", type=int, default=16, help="optimizer steps of each run")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each length")
    overrides_argument(parser)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args()
    arguments.keep = arguments.keep.split(",")
    if arguments.steps <= WARMUP_STEPS:
        raise UserError(
            f"--steps {arguments.steps}: the first {WARMUP_STEPS} are not counted: give more"
        )
    return arguments


def train(arguments: argparse.Namespace, name: str, overrides: list[str]) -> list[dict[str, Any]]:
    """The metrics of one run, its first steps left out."""
    length = "truncation.max_tokens=2" if name == FIXED else f"truncation.keep_fraction={name}"
    settings = [
        *overrides,
        length,
        f"run.name=keep_{name}",
        f"training.max_steps={arguments.steps}",
    ]
    settings += [f"training.checkpoint_every={arguments.steps}", "data.num_validation=0"]
    recipe = load_recipe(arguments.recipe, settings)
    command, variables = local_launch(recipe, ROOT / "launch" / "train.py")
    words = [word for setting in settings for word in ("--set", setting)]
    done = subprocess.run(
        [*command, "--recipe", arguments.recipe, *words],
        env=variables,
        stdout=subprocess.DEVNULL,
        check=False,
    )
    if done.returncode:
        raise UserError(
            f"the run of {name} ended with status {done.returncode}: what it printed stands above"
        )
    return read_metrics(recipe.run_dir / "metrics.jsonl")[WARMUP_STEPS:]


def summarise(name: str, rounds: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """Means of what is counted, the median of what is timed over all rounds, and the largest
    peak.
    """
    steps = [step for done in rounds for step in done]
    return {
        "keep": name,
        "num_steps": len(steps),
        "num_input_tokens_per_step": statistics.fmean(step["num_input_tokens"] for step in steps),
        "flops_per_step": statistics.fmean(step["flops"] for step in steps),
        "step_ms": statistics.median(step["step_ms"] for step in steps),
        "step_ms_of_rounds": [
            statistics.median(step["step_ms"] for step in done) for done in rounds
        ],
        "peak_memory_gib": max(step["peak_memory_gib"] for step in steps),
    }


def markdown(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    whole, fixed = rows[0], rows[-1]

    def cell(key: str, form: str, less: float = 0.0) -> str:
        value, reference = row[key] - less, whole[key] - less
        ratio = value / reference
        if key == "step_ms" and not less:
            pairs = zip(row["step_ms_of_rounds"], whole["step_ms_of_rounds"], strict=True)
            ratio = statistics.median(one / other for one, other in pairs)
        return f"{value:{form}}" if row in (whole, fixed) else f"{value:{form}} ({ratio:.2f})"

    cells = ["two tokens: the fixed part" if row is fixed else row["keep"]]
    cells += [cell("num_input_tokens_per_step", ",.0f"), cell("flops_per_step", ".3g")]
    for key, form in (("step_ms", ".0f"), ("peak_memory_gib", ".2f")):
        cells += [cell(key, form), "" if row is fixed else cell(key, form, fixed[key])]
    return f"| {' | '.join(cells)} |\n"


if __name__ == "__main__":
    run(main)
