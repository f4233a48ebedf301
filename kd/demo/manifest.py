"""Where the two shipped models of the arithmetic task come from, as JSON.

python -m kd.demo.manifest --assets DIR --problem-sets DIR --scores DIR --seed N

writes manifest.json into the folder of --assets.
"""

import argparse
import hashlib
from pathlib import Path
from typing import Any

from kd.files import write_json
from kd.runs.environment import environment
from kd.runs.records import EvaluationRecord, read_record

SCORES = ("accuracy", "ci95", "num_problems", "unclosed_fraction")


def manifest(assets: Path, problem_sets: Path, scores: Path, seed: int) -> dict[str, Any]:
    """SHA-256 of every file of the models and problem sets, and the scores."""
    return {
        "command": f"bash launch/demo.sh --from-scratch {seed}",
        "seed": seed,
        "files": {
            str(path.relative_to(assets)): sha256(path) for path in sorted(assets.glob("*/*"))
        },
        "problem_sets": {path.name: sha256(path) for path in sorted(problem_sets.glob("*.jsonl"))},
        "scores": {path.stem: _scores(path) for path in sorted(scores.glob("*.json"))},
        "environment": environment(),
    }


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _scores(path: Path) -> dict[str, Any]:
    found = read_record(path, EvaluationRecord, "evaluate the model again").as_read()
    return {key: found[key] for key in SCORES}


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Write the manifest of the arithmetic task's models."
    )
    for name in ("--assets", "--problem-sets", "--scores"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--seed", type=int, required=True)
    args = parser.parse_args()
    content = manifest(args.assets, args.problem_sets, args.scores, args.seed)
    write_json(args.assets / "manifest.json", content)


if __name__ == "__main__":
    main()
