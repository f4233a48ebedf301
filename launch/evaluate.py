"""Accuracy of one or more models on the recipe's problems: a JSON of results and all responses per model, and a table.

python launch/evaluate.py --recipe NAME --model PATH [--model PATH ...] [--output DIR]
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kd.cli import recipe_parser, run
from kd.data.tokenizers import load_tokenizers
from kd.errors import UserError
from kd.evaluate.generate import Response, generate, sampling_of
from kd.evaluate.load import load_generator
from kd.evaluate.problems import Problem, load_problems, render_prompts
from kd.evaluate.report import results, table
from kd.evaluate.score import Verdict, score
from kd.files import write_json, write_jsonl
from kd.hub import resolve
from kd.logs import configure_logging
from kd.recipe import ModelSection, Recipe, load_recipe


def main() -> None:
    args = parse_args()
    configure_logging(rank=0)
    recipe = load_recipe(args.recipe, args.overrides)
    if recipe.evaluation.path is None:
        raise UserError("evaluation.path is not set: name a JSONL file of problems (prompt, answer)")
    problems = load_problems("evaluation.path", recipe.evaluation.path, args.limit)
    for model in args.model:
        resolve("--model", model)  # before the first one is loaded
    labels = check_labels(args.model, args.label)
    output = args.output or recipe.run_dir / "evaluation"
    rows = [
        evaluate(recipe, problems, model, label, args.seed, output)
        for model, label in zip(args.model, labels, strict=True)
    ]
    print(f"\n{table(rows)}\n\n{output}")


def parse_args() -> argparse.Namespace:
    parser = recipe_parser("Evaluate models on the recipe's problems.")
    parser.add_argument(
        "--model",
        required=True,
        action="append",
        help="folder or hub id; may be repeated. Code that comes with a model runs only where the recipe trusts it: "
        "student.model and teacher.model with their trust_remote_code, and this run's exports with the student's",
    )
    parser.add_argument("--label", action="append", default=[], help="name in the table, one per --model")
    parser.add_argument("--limit", type=int, help="only the first LIMIT problems")
    parser.add_argument("--output", type=Path, help="folder; evaluation/ of the recipe's run when absent")
    parser.add_argument("--seed", type=int, default=0, help="of the sampled responses")
    return parser.parse_args()


def check_labels(models: Sequence[str], labels: Sequence[str]) -> list[str]:
    """One distinct label per model, fit for a file name: the last two parts of its path when none are given."""
    if labels and len(labels) != len(models):
        raise UserError(f"--label is given {len(labels)} times for {len(models)} --model: give one each, or none")
    chosen = [re.sub(r"[^\w.=-]+", "-", text) for text in labels or ["/".join(Path(m).parts[-2:]) for m in models]]
    if len(set(chosen)) != len(chosen):
        raise UserError(f"two models are labelled alike ({', '.join(chosen)}): give each a --label of its own")
    return chosen


def evaluate(
    recipe: Recipe, problems: Sequence[Problem], name: str, label: str, seed: int, output: Path
) -> dict[str, Any]:
    """Generate, judge and write output/LABEL.json and output/LABEL.responses.jsonl. Returns the results."""
    evaluation, data = recipe.evaluation, recipe.data
    section = section_of(recipe, name)
    # With the teacher left out the model's own tokenizer is checked, and its own template and end token are used,
    # unless the recipe sets them.
    tokenizer = load_tokenizers(recipe.model_copy(update={"student": section, "teacher": None}))
    model = load_generator("--model", section)
    prompts = render_prompts(tokenizer, problems, data)
    sampling = sampling_of(evaluation, seed)
    responses = generate(model, tokenizer, prompts, sampling, evaluation.batch_size)
    verdicts, summary = score(responses, [problem.answer for problem in problems], evaluation, data.think_close)
    content = results(label, name, recipe.run.name, str(evaluation.path), evaluation.judge, sampling, summary)
    write_jsonl(output / f"{label}.responses.jsonl", map(response_row, problems, responses, verdicts))
    write_json(output / f"{label}.json", content)
    return content


def section_of(recipe: Recipe, name: str) -> ModelSection:
    """How to load a model: as the recipe says when it names it, else as its student but without a revision.

    Trust in the student's code reaches what this run exported, and no other model.
    """
    for section in (recipe.student, recipe.teacher):
        if section is not None and section.model == name:
            return section
    exported = Path(name).resolve().is_relative_to(recipe.run_dir.resolve())
    trusted = recipe.student.trust_remote_code and exported
    return recipe.student.model_copy(update={"model": name, "revision": None, "trust_remote_code": trusted})


def response_row(problem: Problem, response: Response, verdict: Verdict) -> dict[str, Any]:
    return {
        "id": problem.id,
        "prompt": problem.prompt,
        "expected": problem.answer,
        **vars(verdict),
        "ended": response.ended,
        "num_tokens": response.num_tokens,
        "response": response.text,
    }


if __name__ == "__main__":
    run(main)
