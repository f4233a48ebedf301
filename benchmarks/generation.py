"""Tokens per second of vLLM and of transformers on the embedded problems, in turn on one machine.

    .venv-vllm/bin/python benchmarks/generation.py [--problems 100] [--output DIR]     # make vllm

Each backend generates the greedy responses of the shipped teacher to the same problems: twice, of
which the second counts, so that loading and the first call are apart. A model of 1.3 M parameters
says how they compare on a CPU, and nothing of a GPU. Writes DIR/generation.json and generation.md.
"""

import argparse
import shlex
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
| backend | load s | tokens / s | accuracy | responses as transformers' |
|---|---|---|---|---|
"""


def main() -> None:
    arguments = parse_arguments()
    recipe = load_recipe("tiny_trunc50")
    rows = draw_rows(ArithmeticSet("report", arguments.problems), "report")
    problems = [Problem(row["id"], row["prompt"], row["answer"]) for row in rows]
    found = [measure(recipe, problems, name) for name in ("transformers", "vllm")]
    texts = [row.pop("texts") for row in found]
    for row, of_backend in zip(found, texts, strict=True):
        row["num_equal"] = sum(map(str.__eq__, of_backend, texts[0]))
    content = {
        "command": f"python benchmarks/generation.py {shlex.join(sys.argv[1:])}".strip(),
        "environment": environment(),
        "num_problems": len(problems),
        "rows": found,
        "vllm_over_transformers": found[1]["tokens_per_s"] / found[0]["tokens_per_s"],
    }
    write_json(arguments.output / "generation.json", content)
    table = HEADER + "".join(markdown(row, len(problems)) for row in found)
    table += f"\nvLLM / transformers: {content['vllm_over_transformers']:.2f}\n"
    write_text(arguments.output / "generation.md", table)
    print(table)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare vLLM and transformers.")
    parser.add_argument("--problems", type=int, default=100)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    return parser.parse_args()


def measure(recipe: Recipe, problems: list[Problem], name: str) -> dict[str, Any]:
    assert recipe.teacher is not None
    backend, tokenizer = choose_backend(name), load_tokenizers(recipe)
    sampling = sampling_of(recipe.evaluation, seed=0)
    subject = make_subject("teacher", recipe.teacher, tokenizer, sampling, backend)
    requests = make_requests(tokenizer, problems, 1, recipe.data)
    started = time.perf_counter()
    generate = subject.load()
    loaded = time.perf_counter()
    generate(requests, 0)
    begun = time.perf_counter()
    responses = generate(requests, 0)
    seconds = time.perf_counter() - begun
    answers = [problem.answer for problem in problems]
    _, summary = score(responses, answers, recipe.evaluation, recipe.data.think_close)
    num_tokens = sum(response.num_tokens for response in responses)
    return {
        "backend": str(backend),
        "load_s": loaded - started,
        "num_tokens": num_tokens,
        "seconds": seconds,
        "tokens_per_s": num_tokens / seconds,
        "accuracy": summary.accuracy,
        "texts": [response.text for response in responses],
    }


def markdown(row: dict[str, Any], num_problems: int) -> str:
    return (
        f"| {row['backend']} | {row['load_s']:.0f} | {row['tokens_per_s']:,.0f} | "
        f"{row['accuracy']:.3f} | {row['num_equal']} of {num_problems} |\n"
    )


if __name__ == "__main__":
    run(main)
