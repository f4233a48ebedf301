"""What a student learns from whose responses, for as many FLOPs.

    python benchmarks/rollouts.py [--recipe tiny] [--seeds 3] [--budget-steps 75] [--arm NAME]

Each arm trains until it has spent what --budget-steps steps on whole traces of the data cost: in
training alone, and, for arms that sample, with sampling too. FLOPs of a step are those of a pilot
of a few steps, by the plan's formula, of the sequences as they were; "sampling share" is the FLOPs
of sampling over those of training. One process for each run, two beside each other, a core each.
Runs stay in --work, and are not trained again. Writes rollouts.json and .md.
"""

import argparse
import math
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from kd.cli import run
from kd.evaluate.score import wilson_interval
from kd.files import read_json, write_json, write_text
from kd.recipe import ROOT
from kd.runs.environment import environment
from kd.runs.records import read_metrics

WHOLE = ("truncation.keep_fraction=1.0",)
# Of sampled sequences the prompt is never supervised; of the data's it is where the recipe says so
NO_PROMPT = ('data.loss_sections=["cot","answer"]',)
# Longer than any response of the embedded task
ALL_TOKENS = 96
ARMS: dict[str, tuple[str, ...]] = {
    "data, first 25 %": ("truncation.keep_fraction=0.25",),
    "data, first 50 %": ("truncation.keep_fraction=0.5",),
    "data, whole": WHOLE,
    "data without prompts, first 25 %": ("truncation.keep_fraction=0.25", *NO_PROMPT),
    "data without prompts, first 50 %": ("truncation.keep_fraction=0.5", *NO_PROMPT),
    "data without prompts, whole": (*WHOLE, *NO_PROMPT),
    "student's, 16 tokens": ("rollout.max_new_tokens=16", *WHOLE),
    "student's, 32 tokens": ("rollout.max_new_tokens=32", *WHOLE),
    "student's, all": (f"rollout.max_new_tokens={ALL_TOKENS}", *WHOLE),
    "teacher's, all": ("rollout.source=teacher", f"rollout.max_new_tokens={ALL_TOKENS}", *WHOLE),
    "half data's first 50 %, half student's, 32 tokens": (
        "rollout.fraction=0.5",
        "rollout.max_new_tokens=32",
        "truncation.keep_fraction=0.5",
    ),
}
PILOT_STEPS = 6
HEADER = """\
| responses | counted | steps | accuracy (95 %) | each seed | unclosed | sampling share | s |
|---|---|---|---|---|---|---|---|
"""


class Spent(NamedTuple):
    """FLOPs of a step."""

    training: float
    sampling: float


def main() -> None:
    arguments = parse_arguments()
    arms = arguments.arm or list(ARMS)
    piloted = list(dict.fromkeys(("data, whole", *arms)))
    with ThreadPoolExecutor(2) as two:
        pilots = two.map(lambda arm: train(arguments, arm, 0, PILOT_STEPS), piloted)
        spent = {arm: spent_in(folder) for arm, folder in zip(piloted, pilots, strict=True)}
        budget = spent["data, whole"].training * arguments.budget_steps
        wanted = [(arm, counted) for arm in arms for counted in countings(spent[arm])]
        rows = list(two.map(lambda w: row_of(arguments, *w, spent[w[0]], budget), wanted))
    facts = {
        "command": f"python benchmarks/rollouts.py {shlex.join(sys.argv[1:])}".strip(),
        "environment": environment(),
        "recipe": arguments.recipe,
        "budget_flops": budget,
        "rows": rows,
    }
    write_json(arguments.output / "rollouts.json", facts)
    table = HEADER + "".join(map(markdown, rows))
    write_text(arguments.output / "rollouts.md", table)
    print(table)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare whose responses a student learns from.")
    parser.add_argument("--recipe", default="tiny")
    parser.add_argument(
        "--arm", action="append", choices=list(ARMS), help="all when absent; may be repeated"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--budget-steps", type=int, default=75, help="on whole traces of the data")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "rollouts")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    return parser.parse_args()


def countings(spent: Spent) -> tuple[str, ...]:
    return ("training", "training and sampling") if spent.sampling else ("training",)


def row_of(
    arguments: argparse.Namespace, arm: str, counted: str, spent: Spent, budget: float
) -> dict[str, Any]:
    """All seeds of an arm, trained and scored."""
    each = spent.training + (spent.sampling if counted != "training" else 0.0)
    num_steps = max(round(budget / each), 1)
    runs = [train(arguments, arm, seed, num_steps) for seed in range(arguments.seeds)]
    scores = [score(arguments, folder) for folder in runs]
    records = [record for folder in runs for record in read_metrics(folder / "metrics.jsonl")]
    num_correct = sum(found["num_correct"] for found in scores)
    num_problems = sum(found["num_problems"] for found in scores)
    return {
        "arm": arm,
        "counted": counted,
        "num_steps": num_steps,
        "accuracy": num_correct / num_problems,
        "ci95": wilson_interval(num_correct, num_problems),
        "accuracies": [found["accuracy"] for found in scores],
        "unclosed_fraction": sum(s["unclosed_fraction"] for s in scores) / len(scores),
        "training_flops": math.fsum(r["flops"] for r in records) / len(runs),
        "sampling_flops": math.fsum(r["flops_of_sampling"] or 0.0 for r in records) / len(runs),
        "training_seconds": sum(r["step_ms"] for r in records) / 1000 / len(runs),
    }


def train(arguments: argparse.Namespace, arm: str, seed: int, num_steps: int) -> Path:
    """The folder of a finished run; one that is there is not trained again."""
    name = "".join(c if c.isalnum() else "-" for c in arm) + f"-{num_steps}-seed{seed}"
    folder = arguments.work.absolute() / name
    if not (folder / "SUCCESS").exists():
        settings = [
            f"run.output_dir={folder.parent}",
            f"run.name={name}",
            f"run.seed={seed}",
            f"training.max_steps={num_steps}",
            f"training.validate_every={num_steps}",
            f"training.checkpoint_every={num_steps}",
            "training.micro_batch_size=32",
            *ARMS[arm],
        ]
        words = [word for setting in settings for word in ("--set", setting)]
        call("train.py", "--recipe", arguments.recipe, *words, "--resume", "auto")
    return folder


def spent_in(folder: Path) -> Spent:
    records = read_metrics(folder / "metrics.jsonl")
    sampling = math.fsum(record["flops_of_sampling"] or 0.0 for record in records)
    return Spent(math.fsum(r["flops"] for r in records) / len(records), sampling / len(records))


def score(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    recipe, model = folder / "recipe.json", folder / "export" / "last"
    call("evaluate.py", "--recipe", str(recipe), "--model", str(model), "--label", "last")
    found: dict[str, Any] = read_json(folder / "evaluation" / "last.json")
    return found


def call(script: str, *words: str) -> None:
    one_core = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, str(ROOT / "launch" / script), *words]
    done = subprocess.run(command, capture_output=True, text=True, env=one_core, check=False)
    if done.returncode:
        sys.exit(f"{shlex.join(command)}:\n{done.stderr[-3000:]}")


def markdown(row: dict[str, Any]) -> str:
    low, high = row["ci95"]
    seeds = " ".join(f"{accuracy:.3f}" for accuracy in row["accuracies"])
    return (
        f"| {row['arm']} | {row['counted']} | {row['num_steps']} | {row['accuracy']:.3f} "
        f"({low:.3f}-{high:.3f}) | {seeds} | {row['unclosed_fraction']:.3f} | "
        f"{row['sampling_flops'] / row['training_flops']:.2f} | {row['training_seconds']:.0f} |\n"
    )


if __name__ == "__main__":
    run(main)
