"""Measure the accuracy of one or more models, on the recipe's problems and tasks, on other tasks,
or with a harness.

    python launch/evaluate.py --recipe NAME --model PATH [--model PATH ...] [--output DIR]
    python launch/evaluate.py --recipe NAME --model PATH --tasks aime24,math500 [--num-samples K]
    python launch/evaluate.py ... --backend vllm --tensor-parallel 4
    deepspeed --num_gpus 8 launch/evaluate.py ...   # or torchrun, or srun: a share each
    python launch/evaluate.py ... --server http://HOST:8000   # where `vllm serve PATH` runs
    python launch/evaluate.py ... --tasks gsm8k --harness lm-eval [-- LM_EVAL_ARGUMENTS]

Prints a table, and writes LABEL.json and LABEL.responses.jsonl of each model to the folder
evaluation/ of the recipe's run, for a task to TASK/ below it, and for a harness to lm-eval/TASK/.
It may be killed at any time: the same command, on as many ranks, continues after the last finished
batch, and gives the same responses.
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kd.cli import generation_arguments, recipe_parser, run
from kd.data.tokenizers import load_tokenizers
from kd.distributed.device import keep_gpus_of_rank
from kd.distributed.process_group import find_rank
from kd.errors import UserError
from kd.evaluate.evaluation import (
    ProblemSet,
    check_ranks,
    evaluate,
    local_problems,
    task_problems,
)
from kd.evaluate.harness import evaluate_with_harness
from kd.evaluate.results import table
from kd.evaluate.tasks import check_evaluation
from kd.generation.backends import Backend, Subject, choose_backend, make_subject
from kd.generation.sampling import check_num_samples, sampling_of
from kd.hub import resolve
from kd.logs import configure_logging
from kd.names import check_name
from kd.recipe import ModelSection, Recipe, load_recipe


def main() -> None:
    args = parse_args()
    rank, num_ranks, local_rank = find_rank()
    if num_ranks > 1:
        keep_gpus_of_rank(local_rank, args.tensor_parallel)
    configure_logging(rank)
    recipe = load_recipe(args.recipe, args.overrides)
    check_arguments(args, recipe, num_ranks)
    for model in args.model:
        resolve("--model", model)  # before the first one is loaded
    labels = check_labels(args.model, args.label)
    output = args.output or recipe.run_dir / "evaluation"
    sets = [] if args.harness else problem_sets(recipe, args)
    backend = choose_backend(args.backend, args.server, args.tensor_parallel)
    check_ranks(recipe, backend, sets, num_ranks)

    def rows_of_all() -> list[dict[str, Any] | None]:
        rows: list[dict[str, Any] | None] = []
        for model, label in zip(args.model, labels, strict=True):
            subject = subject_of(recipe, model, label, backend, args.seed)
            if args.harness:
                limit = ["--limit", str(args.limit)] if args.limit else []
                further = [*limit, *args.harness_args]
                rows += evaluate_with_harness(recipe, subject, args.tasks, further, output)
            else:
                rows += [evaluate(recipe, subject, s, output, rank, num_ranks) for s in sets]
        return rows

    rows = rows_of_all()
    if None in rows:  # others had shares to finish; the last rank to get here finds all results
        rows = rows_of_all()
    finished = [row for row in rows if row is not None]
    if len(finished) < len(rows):
        print(f"rank {rank}: its share is done; the last rank to finish prints the table")
        return
    print(f"\n{table(finished)}\n\n{output}")


def parse_args() -> argparse.Namespace:
    parser = recipe_parser("Evaluate models on the recipe's problems, or on public benchmarks.")
    parser.add_argument(
        "--model",
        required=True,
        action="append",
        help="folder or hub id; may be repeated. A model's own code runs only if the recipe sets "
        "trust_remote_code for that model: in [teacher] or [student] for the models named there, "
        "and in [student] for this run's exports",
    )
    parser.add_argument(
        "--label", action="append", default=[], help="name in the table, one per --model"
    )
    parser.add_argument(
        "--tasks",
        help="comma-separated names from kd/evaluate/tasks.py, or tasks of the harness; default: "
        "the recipe's evaluation.tasks",
    )
    parser.add_argument(
        "--num-samples",
        type=int,
        help="responses to each problem; default: the task's usual number, or 1",
    )
    generation_arguments(parser)
    parser.add_argument("--harness", choices=["lm-eval"], help="let this harness run its own tasks")
    parser.add_argument("--limit", type=int, help="only the first LIMIT problems")
    parser.add_argument(
        "--output", type=Path, help="default: evaluation/ in the recipe's run folder"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the sampled responses (%(default)s)"
    )
    parser.add_argument(
        "--local_rank",
        type=int,
        help="set by some launchers and ignored; LOCAL_RANK is read instead",
    )
    parser.add_argument(
        "harness_args", nargs="*", metavar="-- ARGUMENTS", help="further arguments for the harness"
    )
    return parser.parse_args()


def check_arguments(args: argparse.Namespace, recipe: Recipe, num_ranks: int) -> None:
    """Raises UserError for arguments that exclude each other."""
    num_samples = args.num_samples
    if num_samples is not None:
        check_num_samples(num_samples, recipe.evaluation.temperature)
    if args.harness and args.tasks is None:
        raise UserError(f"--harness {args.harness} needs --tasks: name tasks of the harness")
    if args.harness and num_samples is not None:
        raise UserError(
            f"--num-samples = {num_samples}: tasks of a harness set this number themselves; leave "
            "it out"
        )
    if args.harness and args.server is not None:
        raise UserError(
            f"--server {args.server}: the harness loads the model itself; leave out --server or "
            "--harness"
        )
    if args.harness and num_ranks > 1:
        raise UserError(
            f"--harness {args.harness} with WORLD_SIZE = {num_ranks}: the harness runs in a "
            "single process; start it without a launcher"
        )
    if args.harness_args and not args.harness:
        raise UserError(
            f"unknown arguments {' '.join(args.harness_args)}: remove them, or add the --harness "
            "that they are for"
        )


def problem_sets(recipe: Recipe, args: argparse.Namespace) -> list[ProblemSet]:
    evaluation, sizes = recipe.evaluation, (args.num_samples, args.limit)
    if args.tasks is not None:
        return task_problems(args.tasks.split(","), evaluation, *sizes)
    check_evaluation(recipe)
    local = [local_problems(evaluation, *sizes)] if evaluation.path is not None else []
    return [
        *local,
        *(task_problems(evaluation.tasks, evaluation, *sizes) if evaluation.tasks else []),
    ]


def check_labels(models: Sequence[str], labels: Sequence[str]) -> list[str]:
    """One distinct label per model: the last two parts of its path when none are given."""
    if labels and len(labels) != len(models):
        raise UserError(
            f"--label is given {len(labels)} times for {len(models)} --model: give one to each "
            "model, or none"
        )
    chosen = [
        re.sub(r"[^\w.=-]+", "-", text)
        for text in labels or ["/".join(Path(m).parts[-2:]) for m in models]
    ]
    if len(set(chosen)) != len(chosen):
        raise UserError(
            f"two models have the same label ({', '.join(chosen)}): give each its own --label"
        )
    for label, model in zip(chosen, models, strict=True):
        check_name("--label", label, f"give --model {model} a --label of letters and digits")
    return chosen


def subject_of(recipe: Recipe, name: str, label: str, backend: Backend, seed: int) -> Subject:
    """A model, loaded once for all tasks, or not at all if all responses exist already."""
    section = section_of(recipe, name)
    # With the teacher left out the model's own tokenizer is checked, and its own template and end
    # token are used, unless the recipe sets them.
    tokenizer = load_tokenizers(recipe.model_copy(update={"student": section, "teacher": None}))
    sampling = sampling_of(recipe.evaluation, seed)
    return make_subject(label, section, tokenizer, sampling, backend)


def section_of(recipe: Recipe, name: str) -> ModelSection:
    """How to load a model: as the recipe says, else as its student without a revision.

    The student's trust_remote_code covers what this run exported, and no other model.
    """
    for section in (recipe.student, recipe.teacher):
        if section is not None and section.model == name:
            return section
    exported = Path(name).resolve().is_relative_to(recipe.run_dir.resolve())
    trusted = recipe.student.trust_remote_code and exported
    return recipe.student.model_copy(
        update={"model": name, "revision": None, "trust_remote_code": trusted}
    )


if __name__ == "__main__":
    run(main)
