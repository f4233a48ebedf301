"""Submit a recipe to SLURM: python launch/submit.py RECIPE --nodes 2 --gpus-per-node 8 [-- OPTIONS
OF SBATCH]

Checks recipe and run, freezes code, resolved recipe and script in the run's folder, and submits. A
job that nears its time limit saves a checkpoint, is requeued and goes on by itself. --fill-cache
FOLDER runs launch/cache.py in the place of training; --cache, with an axis of a study, does so for
STUDY/cache, and the cells train from it. --generate FILE runs launch/generate.py, a share on each
rank.
"""

import argparse
import contextlib
import functools
import shlex
import sys
from pathlib import Path

from kd.cli import CacheRequest, axis_arguments, run
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
from kd.recipe import Recipe, load_recipe
from kd.study.cells import Axes, Study, axes_of, make_study, write_study

CPUS_PER_GPU = 4


def main() -> None:
    arguments = parse_args(sys.argv[1:])
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
    """What is to be trained, after the job that fills its cache, and what is trained already and
    only to be evaluated; or, with --preflight, a look at what the first would have.
    """
    if arguments.generate is not None:
        recipe = load_recipe(arguments.recipe, arguments.overrides)
        output, problems = arguments.generate, arguments.problems
        options = tuple(arguments.generate_options)
        return [prepare_generation(output, problems, recipe, request, options)]
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
    """The teacher's cache that a job is to fill, if any. Raises UserError for what does not go with
    one, and for words on a cache where there is none.
    """
    kind, folder = arguments.cache, arguments.fill_cache
    flags = {"--fill-cache": folder, "--cache": kind}
    asked = [f"{flag} {value}" for flag, value in flags.items() if value is not None]
    if asked and arguments.preflight:
        raise UserError(f"{asked[0]} with --preflight, which looks before a run: leave one out")
    if folder is not None and (arguments.evaluate or arguments.array_over):
        other = "--evaluate" if arguments.evaluate else "--array-over"
        raise UserError(f"{asked[0]} with {other}: that job trains nothing: leave one out")
    if asked:
        return CacheRequest(kind or "hidden", arguments.cache_dtype or "bf16", arguments.num_tokens)
    flags = {"--cache-dtype": arguments.cache_dtype, "--num-tokens": arguments.num_tokens}
    for flag, value in flags.items():
        if value is not None:
            raise UserError(
                f"{flag} {value} is of a teacher's cache: add --fill-cache FOLDER, or --cache with "
                "an axis of a study"
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
                raise UserError(f"{flag} {value} is of launch/generate.py: add --generate FILE")
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
                f"--generate {arguments.generate} with {flag}: that job trains nothing: leave one "
                "out"
            )
    if arguments.problems is None:
        raise UserError(f"--generate {arguments.generate} needs --problems FILE")
    for option in arguments.generate_options:
        if not option.startswith("--"):
            raise UserError(
                f"--generate-arg {option}: write a flag of launch/generate.py, as in "
                "--generate-arg=--num-samples=4"
            )


def study_of(arguments: argparse.Namespace, cache: CacheRequest | None) -> Study | None:
    """The study whose cells are to be the tasks of an array; None when no axis was given."""
    axes = axes_of(arguments)
    if axes == Axes():
        if cache is not None and arguments.fill_cache is None:
            raise UserError(
                f"--cache {cache.kind}: a study has one for all of its cells: add an axis, as in "
                "--keep 0.25,0.5; for one run use --fill-cache FOLDER, and then --set "
                "teacher.cache=FOLDER"
            )
        return None
    if arguments.array_over is not None:
        raise UserError(
            f"--array-over {arguments.array_over}: the axes of a study make an array of their own"
        )
    if arguments.fill_cache is not None:
        raise UserError(
            f"--fill-cache {arguments.fill_cache}: a study fills one in its own folder: use --cache"
        )
    study = make_study(arguments.recipe, arguments.overrides, axes, cache_request=cache)
    if cache is not None:
        from kd.training.fill_cache import check_request  # imports torch

        check_request(study.cells[0].recipe, cache, study.cache)
    return study


def parse_args(words: list[str]) -> argparse.Namespace:
    options = words[words.index("--") + 1 :] if "--" in words else []
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", help="a name from recipes/, or the path of a .toml file")
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE"
    )
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument(
        "--gpus-per-node", type=int, required=True, help="and as many ranks; 0: train on CPUs"
    )
    parser.add_argument(
        "--gpu", help="its kind, as in h100: refuse what will not fit into its memory"
    )
    parser.add_argument("--tasks-per-node", type=int, help="ranks of a node without GPUs")
    parser.add_argument(
        "--time", help="limit of a job, as SLURM writes it: 24:00:00; the partition's when absent"
    )
    parser.add_argument("--partition")
    parser.add_argument("--account")
    parser.add_argument("--constraint")
    # A checkpoint of 8 B parameters is some 110 GB, which take 5 minutes at 0.4 GB/s; a step may
    # come before it.
    parser.add_argument(
        "--signal-seconds",
        type=int,
        default=600,
        help="how long before the limit a job is told to save; default 600",
    )
    parser.add_argument(
        "--cpus-per-task",
        type=int,
        help=f"cores of a rank, for Python, autograd and NCCL; {CPUS_PER_GPU} beside a GPU, else "
        "what the cluster gives",
    )
    parser.add_argument(
        "--restarts",
        type=int,
        default=3,
        help="how often a run goes on by itself after a rank was killed or failed, each time only "
        "if the start before it left a new checkpoint; default 3",
    )
    parser.add_argument(
        "--srun-arg",
        dest="srun_options",
        action="append",
        default=[],
        metavar="--FLAG=VALUE",
        help="a flag for srun, as in --srun-arg=--mpi=pmix; may be repeated",
    )
    parser.add_argument(
        "--preflight",
        action="store_true",
        help="submit launch/preflight.py in the place of the run, with all that the run would have",
    )
    parser.add_argument(
        "--setup", type=Path, help="a file that the job sources first: modules, an environment"
    )
    parser.add_argument("--container", metavar="IMAGE", help="run in this image by apptainer")
    parser.add_argument(
        "--evaluate", action="store_true", help="a second job: launch/evaluate.py, after success"
    )
    parser.add_argument(
        "--array-over",
        metavar="FIELD=V1,V2",
        help="an array of runs, one per value: keep_fraction=0.25,0.5,0.75,1.0",
    )
    axis_arguments(parser)
    caches = parser.add_argument_group(
        "a teacher that runs once", "in the words of launch/cache.py and of launch/study.py"
    )
    caches.add_argument(
        "--fill-cache",
        type=Path,
        metavar="FOLDER",
        help="fill this cache in the place of the run; then train with --set teacher.cache=FOLDER",
    )
    caches.add_argument(
        "--cache",
        "--kind",
        nargs="?",
        const="hidden",
        choices=("hidden", "vector", "top_k", "sampled"),
        help="kind of the cache (%(const)s); with an axis of a study the cells wait for a job that "
        "fills STUDY/cache, and train from that",
    )
    caches.add_argument(
        "--cache-dtype",
        "--dtype",
        choices=("fp32", "bf16", "int8"),
        help="of hidden states and vectors (bf16)",
    )
    caches.add_argument(
        "--num-tokens", type=int, metavar="K", help="of top_k (128) and sampled (12)"
    )
    texts = parser.add_argument_group("responses of the teacher, by launch/generate.py")
    texts.add_argument(
        "--generate", type=Path, metavar="FILE", help="write this file in the place of the run"
    )
    texts.add_argument("--problems", type=Path, metavar="FILE", help="what the teacher answers")
    texts.add_argument(
        "--generate-arg",
        dest="generate_options",
        action="append",
        default=[],
        metavar="--FLAG=VALUE",
        help="a flag of launch/generate.py, as in --generate-arg=--num-samples=4; may be repeated",
    )
    parser.add_argument(
        "--evaluate-ranks",
        type=int,
        default=1,
        metavar="N",
        help="ranks of each job of --evaluate, on one node, with a GPU each; default 1",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check, print the scripts, submit nothing"
    )
    arguments = parser.parse_args(words[: len(words) - len(options) - ("--" in words)])
    arguments.sbatch_options = options
    return arguments


def request_of(arguments: argparse.Namespace) -> JobRequest:
    if arguments.gpus_per_node < 0 or (arguments.gpus_per_node == 0) != (
        arguments.tasks_per_node is not None
    ):
        raise UserError(
            f"--gpus-per-node {arguments.gpus_per_node}: a node has a rank per GPU; for 0, and for "
            "0 alone, say how many ranks with --tasks-per-node"
        )
    if arguments.gpu is not None:
        from kd.plan.gpus import named_gpu  # the package imports torch

        named_gpu(arguments.gpu)
    setup, container = arguments.setup, arguments.container
    if setup is not None and not setup.is_file():
        raise UserError(f"--setup {setup}: no such file")
    if container is not None and "://" not in container:
        if not Path(container).exists():
            raise UserError(
                f"--container {container}: no such image; write a .sif file, a folder or "
                "docker://NAME"
            )
        container = str(Path(container).absolute())
    return JobRequest(
        gpu=arguments.gpu,
        num_nodes=arguments.nodes,
        gpus_per_node=arguments.gpus_per_node,
        tasks_per_node=arguments.gpus_per_node or arguments.tasks_per_node,
        signal_seconds=arguments.signal_seconds,
        time=arguments.time,
        partition=arguments.partition,
        account=arguments.account,
        constraint=arguments.constraint,
        more_options=tuple(arguments.sbatch_options),
        srun_options=srun_options_of(arguments),
        restarts=arguments.restarts,
        evaluate_ranks=arguments.evaluate_ranks,
        cpus_per_task=cpus_of(arguments),
        setup=setup and setup.absolute(),
        container=container,
    )


def srun_options_of(arguments: argparse.Namespace) -> tuple[str, ...]:
    for option in arguments.srun_options:
        if not option.startswith("-"):
            raise UserError(
                f"--srun-arg {option}: write a flag of srun, as in --srun-arg=--mpi=pmix"
            )
    return tuple(arguments.srun_options)


def cpus_of(arguments: argparse.Namespace) -> int | None:
    asked: int | None = arguments.cpus_per_task
    is_said = any(option.startswith("--cpus-per-") for option in arguments.sbatch_options)
    return asked or (CPUS_PER_GPU if arguments.gpus_per_node and not is_said else None)


def how_to_follow(submission: Submission, ids: list[str], after: str | None) -> str:
    """after: the job that it waits for."""
    job, folder = submission.job, submission.job.folder
    lines, runs = list(submission.plans), ", ".join(map(str, job.runs))
    kind = submission.kind
    does = {"train": "trains", "evaluate": "evaluates", "cache": "fills", "generate": "writes for"}
    lines += [f"job {ids[0]} {does.get(kind, 'looks before')} {runs}"]
    lines += [f"  it waits for the success of job {after}, and is cancelled else"] if after else []
    lines += [f"job {ids[1]} evaluates after its success"] if len(ids) > 1 else []
    if reason := why_pending(ids[0]):
        lines.append(f"  SLURM does not start it as it was asked for: {reason}")
    lines += [f"  squeue --jobs={','.join(ids)}"]
    logs = [
        f"{kind}-{ids[0]}{f'_{i}' if len(job.runs) > 1 else ''}.out" for i in range(len(job.runs))
    ]
    lines += [f"  tail -F {shlex.quote(str(folder / log))}" for log in logs]
    # SLURM kills what is left KillWait after its TERM, 30 s unless the cluster says otherwise.
    lines += [
        f"  scancel --batch --signal=TERM {ids[0]}    # the ranks save; submit again to go on"
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
