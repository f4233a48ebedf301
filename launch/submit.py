"""Submit a recipe to SLURM, as jobs that train, fill a cache or evaluate.

python launch/submit.py RECIPE --nodes 2 --gpus-per-node 8 [-- SBATCH_OPTIONS]

Checks the recipe and the run, copies the code, the resolved recipe and the script into the run's
folder, and submits. A job near its time limit saves a checkpoint, is requeued and continues by
itself. --fill-cache FOLDER runs launch/cache.py instead of training. With an axis of a study,
--cache first fills STUDY/cache, and the cells train from it. --generate FILE runs
launch/generate.py instead of training, with a share of the problems on each rank.
"""

import argparse
import contextlib
import dataclasses
import functools
import io
import runpy
import shlex
import sys
from pathlib import Path

from kd.cli import CacheRequest, run
from kd.cluster.request import parse_arguments, request_of
from kd.cluster.sbatch import JobRequest
from kd.cluster.submit import (
    Submission,
    cancel,
    left_to_do,
    prepare,
    prepare_filler,
    prepare_generation,
    read_recipes,
    submit,
    why_pending,
)
from kd.errors import UserError
from kd.recipe import ROOT, Recipe, load_recipe
from kd.study.cells import Axes, Study, axes_of, make_study, write_study


def main() -> None:
    arguments = parse_arguments(sys.argv[1:], __doc__)
    # DeepSpeed says on stdout that a login node has no GPU.
    with contextlib.redirect_stdout(sys.stderr):
        check_generation(arguments)
        request = request_of(arguments)
        cache = cache_of(arguments)
        study = study_of(arguments, cache)
        submissions = make_submissions(arguments, request, study, cache)
    if arguments.dry_run:
        scripts = [text for s in submissions for text in (s.script, s.evaluate) if text]
        print(*scripts, sep="\n")
        return
    if study is not None:
        write_study(study)
    filler = None
    for submission in submissions:
        try:
            ids = submit(submission, after=filler)
        except BaseException:
            if filler is not None:
                cancel(filler)  # nobody would read its cache
            raise
        print(how_to_follow(submission, ids, filler))
        filler = ids[0] if submission.kind == "cache" else None


def make_submissions(
    arguments: argparse.Namespace,
    request: JobRequest,
    study: Study | None,
    cache: CacheRequest | None,
) -> list[Submission]:
    """The jobs to submit: one that fills the cache, one that trains, and one that evaluates runs
    that are trained already. With --preflight: one that checks what the first of them would get.
    """
    if arguments.generate is not None:
        recipe = load_recipe(arguments.recipe, arguments.overrides)
        words = generate_arguments(arguments)
        request = dataclasses.replace(request, tasks_per_node=ranks_per_node(arguments, words))
        return [prepare_generation(words, recipe, request, tuple(arguments.generate_options))]
    if cache is not None and study is None:
        recipe = load_recipe(arguments.recipe, arguments.overrides)
        return [prepare_filler(arguments.fill_cache, recipe, request, cache, recipe.run.name)]
    folder, recipes = folder_and_recipes(arguments, study)
    if arguments.preflight:
        return [prepare(folder, recipes[:1], request, preflight=True)]
    train, score = left_to_do(recipes, arguments.evaluate)
    awaits_cache = study is not None and study.awaits_cache
    checked = functools.partial(prepare, folder, request=request, awaits_cache=awaits_cache)
    submissions = []
    if train:
        if study is not None and cache is not None and awaits_cache:
            submissions.append(prepare_filler(study.cache, train[0], request, cache, study.name))
        submissions.append(checked(train, evaluate=arguments.evaluate))
    if score:
        submissions.append(checked(score, train=False, evaluate=True))
    return submissions


def folder_and_recipes(
    arguments: argparse.Namespace, study: Study | None
) -> tuple[Path, tuple[Recipe, ...]]:
    if study is None:
        return read_recipes(arguments.recipe, arguments.overrides, arguments.array_over)
    return study.folder, tuple(cell.recipe for cell in study.cells)


def cache_of(arguments: argparse.Namespace) -> CacheRequest | None:
    """The teacher's cache that a job is to fill, if any. Raises UserError for arguments that
    exclude a cache, and for arguments about a cache when none is asked for.
    """
    kind, folder = arguments.cache, arguments.fill_cache
    flags = {"--fill-cache": folder, "--cache": kind}
    asked = [f"{flag} {value}" for flag, value in flags.items() if value is not None]
    if asked and arguments.preflight:
        raise UserError(f"{asked[0]} with --preflight, which fills nothing: leave one out")
    if folder is not None and (arguments.evaluate or arguments.array_over):
        other = "--evaluate" if arguments.evaluate else "--array-over"
        raise UserError(
            f"{asked[0]} with {other}: a job that fills a cache trains nothing; leave one out"
        )
    if asked:
        return CacheRequest(kind or "hidden", arguments.cache_dtype or "bf16", arguments.num_tokens)
    flags = {"--cache-dtype": arguments.cache_dtype, "--num-tokens": arguments.num_tokens}
    for flag, value in flags.items():
        if value is not None:
            raise UserError(
                f"{flag} {value} needs a teacher's cache: add --fill-cache FOLDER, or --cache "
                "with an axis of a study"
            )
    return None


def check_generation(arguments: argparse.Namespace) -> None:
    """Raises UserError for what does not go with --generate, and for its words without it."""
    if arguments.generate is None:
        for flag, value in {
            "--problems": arguments.problems,
            "--generate-arg": arguments.generate_options,
        }.items():
            if value:
                raise UserError(f"{flag} {value} needs launch/generate.py: add --generate FILE")
        return
    others = {
        "--fill-cache": arguments.fill_cache,
        "--cache": arguments.cache,
        "--evaluate": arguments.evaluate,
        "--array-over": arguments.array_over,
        "--preflight": arguments.preflight,
        "an axis of a study": axes_of(arguments) != Axes(),
    }
    for flag, value in others.items():
        if value:
            raise UserError(
                f"--generate {arguments.generate} with {flag}: that job trains nothing; leave one "
                "out"
            )
    if arguments.problems is None:
        raise UserError(f"--generate {arguments.generate} needs the problems: add --problems FILE")
    for option in arguments.generate_options:
        if not option.startswith("--"):
            raise UserError(
                f"--generate-arg {option}: write an option of launch/generate.py, such as "
                "--generate-arg=--num-samples=4"
            )


def generate_arguments(arguments: argparse.Namespace) -> argparse.Namespace:
    """What launch/generate.py makes of --generate-arg. Raises UserError for what it refuses."""
    parse = runpy.run_path(str(ROOT / "launch" / "generate.py"))["parse_args"]
    words = ["--recipe", arguments.recipe, "--problems", str(arguments.problems)]
    words += ["--output", str(arguments.generate), *arguments.generate_options]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parsed: argparse.Namespace = parse(words)
    except SystemExit:
        why = said.getvalue().strip().rpartition("error: ")[2]
        raise UserError(
            f"--generate-arg {' '.join(arguments.generate_options)}: launch/generate.py says: {why}"
        ) from None
    return parsed


def ranks_per_node(arguments: argparse.Namespace, words: argparse.Namespace) -> int:
    """Of a job that generates: one for each --tensor-parallel GPUs."""
    num_gpus: int = arguments.gpus_per_node
    each: int = words.tensor_parallel
    if num_gpus and (each < 1 or num_gpus % each):
        raise UserError(
            f"--generate-arg=--tensor-parallel={each}: a rank would have {each} of the {num_gpus} "
            "GPUs of a node: take a number that divides them"
        )
    num_tasks: int = num_gpus // each if num_gpus else arguments.tasks_per_node
    return num_tasks


def study_of(arguments: argparse.Namespace, cache: CacheRequest | None) -> Study | None:
    """The study whose cells are to be the tasks of an array; None when no axis was given."""
    axes = axes_of(arguments)
    if axes == Axes():
        if cache is not None and arguments.fill_cache is None:
            raise UserError(
                f"--cache {cache.kind} needs a study: add an axis, such as --keep 0.25,0.5. For "
                "one run use --fill-cache FOLDER, then --set teacher.cache=FOLDER"
            )
        return None
    if arguments.array_over is not None:
        raise UserError(
            f"--array-over {arguments.array_over} with axes of a study, which make their own "
            "array: leave one out"
        )
    if arguments.fill_cache is not None:
        raise UserError(
            f"--fill-cache {arguments.fill_cache} with axes of a study, which has its cache in "
            "its own folder: use --cache"
        )
    study = make_study(arguments.recipe, arguments.overrides, axes, cache_request=cache)
    if cache is not None:
        from kd.training.fill_cache import check_request  # imports torch

        check_request(study.cells[0].recipe, cache, study.cache)
    return study


def how_to_follow(submission: Submission, ids: list[str], after: str | None) -> str:
    """after: the job that it waits for."""
    job, folder = submission.job, submission.job.folder
    lines, runs = list(submission.plans), ", ".join(map(str, job.runs))
    kind = submission.kind
    does = {"train": "trains", "evaluate": "evaluates", "cache": "fills", "generate": "writes"}
    what = runs.removesuffix(".jobs") if kind == "generate" else runs
    lines += [f"job {ids[0]} {does.get(kind, 'checks before')} {what}"]
    lines += (
        [f"  it starts when job {after} has succeeded, and is cancelled otherwise"] if after else []
    )
    lines += [f"job {ids[1]} evaluates when it has succeeded"] if len(ids) > 1 else []
    if reason := why_pending(ids[0]):
        lines.append(f"  SLURM cannot start it as requested: {reason}")
    lines += [f"  squeue --jobs={','.join(ids)}"]
    logs = [
        f"{kind}-{ids[0]}{f'_{i}' if len(job.runs) > 1 else ''}.out" for i in range(len(job.runs))
    ]
    lines += [f"  tail -F {shlex.quote(str(folder / log))}" for log in logs]
    # SLURM kills what is left KillWait after its TERM, 30 s unless the cluster says otherwise.
    lines += [
        f"  scancel --batch --signal=TERM {ids[0]}    # the ranks save; submit again to continue"
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
