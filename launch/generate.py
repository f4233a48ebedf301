"""Write reasoning traces of the recipe's teacher, as rows {"id", "prompt", "reasoning", "answer"}.

    python launch/generate.py --recipe NAME --problems FILE --output FILE [--temperature T]

Samples as the recipe's [evaluation] says, unless a flag says otherwise. May be killed at any time:
the same command goes on after the last finished batch, and gives the same file.
"""

import argparse
import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kd.cli import recipe_parser, run
from kd.data.tokenizers import load_tokenizers
from kd.errors import UserError
from kd.evaluate.problems import Problem, load_problems, render_prompts
from kd.generation.generator import load_generator, weights_sha256
from kd.generation.journal import TraceFile, split_response
from kd.generation.sampling import Response, Sampling, generate_batch, sampling_of
from kd.logs import configure_logging
from kd.recipe import DataSection, Recipe, TeacherSection, load_recipe


def main() -> None:
    args = parse_args()
    configure_logging(rank=0)
    flags = ("temperature", "top_p", "max_new_tokens", "batch_size")
    given = [
        f"evaluation.{flag}={getattr(args, flag)}"
        for flag in flags
        if getattr(args, flag) is not None
    ]
    recipe = load_recipe(args.recipe, args.overrides + given)
    if recipe.teacher is None:
        raise UserError(f"recipe {args.recipe!r} has no [teacher] to generate with")
    problems = load_problems("--problems", args.problems, args.limit, need_answers=False)
    sampling = sampling_of(recipe.evaluation, args.seed)
    traces = TraceFile(args.output, settings(recipe, recipe.teacher, problems, sampling, args.keep))
    if not traces.complete:
        write_traces(recipe, recipe.teacher, problems, sampling, args.keep, traces)
    fates = ", ".join(f"{count} {fate}" for fate, count in sorted(traces.counts.items()))
    print(f"{args.output}: {fates}")


def parse_args() -> argparse.Namespace:
    parser = recipe_parser("Write reasoning traces of the recipe's teacher.")
    parser.add_argument(
        "--problems", required=True, help="JSONL file: prompt, and id when rows have one"
    )
    parser.add_argument("--output", required=True, type=Path, help="JSONL file of traces")
    parser.add_argument(
        "--temperature",
        type=float,
        help="0 is greedy; the recipe's evaluation.temperature unless given",
    )
    parser.add_argument("--top-p", type=float, help="the recipe's evaluation.top_p unless given")
    parser.add_argument(
        "--max-new-tokens", type=int, help="the recipe's evaluation.max_new_tokens unless given"
    )
    parser.add_argument(
        "--batch-size", type=int, help="the recipe's evaluation.batch_size unless given"
    )
    parser.add_argument("--limit", type=int, help="only the first LIMIT problems")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--keep",
        choices=["ended", "closed"],
        default="ended",
        help="ended: drop answers cut off by max-new-tokens; closed: keep them. Thoughts never "
        "closed are dropped",
    )
    return parser.parse_args()


def settings(
    recipe: Recipe,
    teacher: TeacherSection,
    problems: Sequence[Problem],
    sampling: Sampling,
    keep: str,
) -> dict[str, Any]:
    """All that the rows depend on, so that a file is not continued under other settings."""
    texts = "\n".join(f"{problem.id}\t{problem.prompt}" for problem in problems)
    rendering = ["system_prompt", "chat_template", "template_kwargs", "date", "end_token"]
    rendering += ["think_open", "think_close", "answer_open", "answer_close"]
    return {
        "teacher": teacher.model,
        "revision": teacher.revision,
        "weights_sha256": weights_sha256(teacher.model),
        "problems_sha256": hashlib.sha256(texts.encode()).hexdigest(),
        "num_problems": len(problems),
        **vars(sampling),
        "batch_size": recipe.evaluation.batch_size,
        "keep": keep,
        **{key: getattr(recipe.data, key) for key in rendering},
    }


def write_traces(
    recipe: Recipe,
    teacher: TeacherSection,
    problems: Sequence[Problem],
    sampling: Sampling,
    keep: str,
    traces: TraceFile,
) -> None:
    """Generate the missing batches of batch_size problems, in the order of the file."""
    tokenizer = load_tokenizers(recipe)
    model = load_generator("teacher.model", teacher)
    batch_size = recipe.evaluation.batch_size
    num_batches = -(-len(problems) // batch_size)
    for index in range(traces.num_batches, num_batches):
        batch = problems[index * batch_size : (index + 1) * batch_size]
        prompts = render_prompts(tokenizer, batch, recipe.data)
        responses = generate_batch(model, tokenizer, prompts, sampling, index)
        traces.append(*to_rows(batch, responses, recipe.data, keep))
        print(f"batch {index + 1}/{num_batches}: {traces.counts['kept']} traces", flush=True)
    traces.finish()


def to_rows(
    problems: Sequence[Problem], responses: Sequence[Response], data: DataSection, keep: str
) -> tuple[list[dict[str, str]], Counter[str]]:
    """The rows of the responses that can be split, and how many were kept or dropped, by reason."""
    rows: list[dict[str, str]] = []
    counts: Counter[str] = Counter()
    for problem, response in zip(problems, responses, strict=True):
        parts = split_response(response, data, keep)
        counts[parts if isinstance(parts, str) else "kept"] += 1
        if not isinstance(parts, str):
            rows.append(
                {
                    "id": problem.id,
                    "prompt": problem.prompt,
                    "reasoning": parts[0],
                    "answer": parts[1],
                }
            )
    return rows, counts


if __name__ == "__main__":
    run(main)
