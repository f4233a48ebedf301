"""Tokens per second of vLLM and of transformers on the embedded problems, in turn on one machine.

    .venv-vllm/bin/python benchmarks/generation.py [--problems 100] [--output DIR]     # make vllm

Each backend generates the greedy responses of the shipped teacher to the same problems, once to
warm up, and then in turn, so that other load on the machine hits both alike. A model of 1.3 M
parameters says how they compare on a CPU, and nothing of a GPU. Writes DIR/generation.json and .md.
"""

import argparse
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from kd.cli import run
from kd.data.tokenizers import load_tokenizers
from kd.demo.arithmetic import ArithmeticSet, draw_rows
from kd.evaluate.problems import Problem, make_requests
from kd.evaluate.score import score
from kd.files import write_json, write_text
from kd.generation.backends import choose_backend, make_subject
from kd.generation.sampling import sampling_of
from kd.recipe import ROOT, Recipe, load_recipe
from kd.runs.environment import environment

HEADER = """\
| backend | load s | tokens / s, median (range) | accuracy | responses as transformers' |
|---|---|---|---|---|
"""


def main() -> None:
    arguments = parse_arguments()
    recipe = load_recipe("tiny_trunc50")
    rows = draw_rows(ArithmeticSet("report", arguments.problems), "report")
    problems = [Problem(row["id"], row["prompt"], row["answer"]) for row in rows]
    found = measure(recipe, problems, arguments.rounds)
    content = {
        "command": f"python benchmarks/generation.py {shlex.join(sys.argv[1:])}".strip(),
        "environment": environment(),
        "num_problems": len(problems),
        "num_rounds": arguments.rounds,
        "rows": found,
        "vllm_over_transformers": statistics.median(
            slow / fast for slow, fast in zip(*(row["seconds"] for row in found), strict=True)
        ),
    }
    write_json(arguments.output / "generation.json", content)
    table = HEADER + "".join(markdown(row, len(problems)) for row in found)
    table += (
        f"\nvLLM / transformers, median of the rounds: {content['vllm_over_transformers']:.2f}\n"
    )
    write_text(arguments.output / "generation.md", table)
    print(table)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare vLLM and transformers.")
    parser.add_argument("--problems", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    return parser.parse_args()


def measure(recipe: Recipe, problems: list[Problem], num_rounds: int) -> list[dict[str, Any]]:
    """transformers first."""
    assert recipe.teacher is not None
    tokenizer, sampling = load_tokenizers(recipe), sampling_of(recipe.evaluation, seed=0)
    requests = make_requests(tokenizer, problems, 1, recipe.data)
    answers = [problem.answer for problem in problems]
    rows, generators, texts = [], [], []
    for name in ("transformers", "vllm"):
        backend = choose_backend(name)
        subject = make_subject("teacher", recipe.teacher, tokenizer, sampling, backend)
        started = time.perf_counter()
        generators.append(subject.load())
        load_s = time.perf_counter() - started
        responses = generators[-1](requests, 0)
        _, summary = score(responses, answers, recipe.evaluation, recipe.data.think_close)
        texts.append([response.text for response in responses])
        num_tokens = sum(response.num_tokens for response in responses)
        row = {"backend": str(backend), "load_s": load_s, "num_tokens": num_tokens}
        num_equal = sum(map(str.__eq__, texts[-1], texts[0]))
        rows.append({**row, "accuracy": summary.accuracy, "num_equal": num_equal, "seconds": []})
    for _ in range(num_rounds):
        for row, generate in zip(rows, generators, strict=True):
            started = time.perf_counter()
            generate(requests, 0)
            row["seconds"].append(time.perf_counter() - started)
    return rows


def markdown(row: dict[str, Any], num_problems: int) -> str:
    rates = sorted(row["num_tokens"] / seconds for seconds in row["seconds"])
    speed = f"{statistics.median(rates):,.0f} ({rates[0]:,.0f}-{rates[-1]:,.0f})"
    return (
        f"| {row['backend']} | {row['load_s']:.0f} | {speed} | {row['accuracy']:.3f} | "
        f"{row['num_equal']} of {num_problems} |\n"
    )


if __name__ == "__main__":
    run(main)
