"""The embedded demo at several lengths: what each keeps of the accuracy, and what it costs, as JSON
and Markdown.

    python benchmarks/demo.py [--recipes tiny_trunc25 tiny_trunc50 tiny_trunc75 tiny_trunc100]

Runs launch/demo.sh for each and writes benchmarks/results/demo.json and demo.md, with hardware,
versions, commit.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from kd.files import write_json, write_text
from kd.runs.environment import environment
from kd.runs.records import read_metrics

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MODELS = ("teacher", "student-before", "student-after")
HEADER = """\
| recipe | tokens read | teacher | student before | student after (95 %) | training s \
| median step ms | demo s |
|---|---|---|---|---|---|---|---|
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Run the demo at several lengths.")
    lengths = [f"tiny_trunc{percent}" for percent in (25, 50, 75, 100)]
    parser.add_argument("--recipes", nargs="+", default=lengths)
    rows = [measure(recipe) for recipe in parser.parse_args().recipes]
    command = f"python benchmarks/{Path(sys.argv[0]).name} {' '.join(sys.argv[1:])}".strip()
    write_json(
        RESULTS / "demo.json", {"command": command, "environment": environment(), "rows": rows}
    )
    table = HEADER + "".join(map(markdown, rows))
    write_text(RESULTS / "demo.md", table)
    print(table)


def measure(recipe: str) -> dict[str, Any]:
    started = time.monotonic()
    subprocess.run(
        ["bash", "launch/demo.sh"], cwd=ROOT, env={**os.environ, "DEMO_RECIPE": recipe}, check=True
    )
    seconds = time.monotonic() - started
    run = ROOT / "runs" / "demo" / recipe
    steps = read_metrics(run / "metrics.jsonl")
    scores = {
        name: json.loads((run / "evaluation" / f"{name}.json").read_text()) for name in MODELS
    }
    keep = ("accuracy", "ci95", "num_problems", "mean_response_tokens", "unclosed_fraction")
    return {
        "recipe": recipe,
        "scores": {name: {key: score[key] for key in keep} for name, score in scores.items()},
        "num_steps": len(steps),
        "num_input_tokens": sum(step["num_input_tokens"] for step in steps),
        "training_s": sum(step["step_ms"] for step in steps) / 1000,
        "median_step_ms": statistics.median(step["step_ms"] for step in steps),
        "demo_s": seconds,
    }


def markdown(row: dict[str, Any]) -> str:
    teacher, before, after = (row["scores"][name] for name in MODELS)
    low, high = after["ci95"]
    return (
        f"| {row['recipe']} | {row['num_input_tokens']:,} | {teacher['accuracy']:.3f} | "
        f"{before['accuracy']:.3f} | {after['accuracy']:.3f} ({low:.3f}-{high:.3f}) | "
        f"{row['training_s']:.0f} | {row['median_step_ms']:.0f} | {row['demo_s']:.0f} |\n"
    )


if __name__ == "__main__":
    main()
