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
from kd.recipe import ROOT, Recipe, load_recipe
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


def parse_args(words: list[str]) -> argparse.Namespace:
    options = words[words.index("--") + 1 :] if "--" in words else []
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", help="a name from recipes/, or the path of a .toml file")
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="override one value of the recipe; may be repeated",
    )
    parser.add_argument("--nodes", type=int, default=1, help="number of nodes (%(default)s)")
    parser.add_argument(
        "--gpus-per-node",
        type=int,
        required=True,
        help="GPUs of each node, with one rank on each; 0: train on CPUs",
    )
    parser.add_argument(
        "--gpu",
        help="kind of GPU, such as h100; a run that does not fit into its memory is refused",
    )
    parser.add_argument(
        "--tasks-per-node", type=int, help="ranks of each node, only with --gpus-per-node 0"
    )
    parser.add_argument(
        "--time",
        help="time limit of a job, in SLURM's form 24:00:00; default: that of the partition",
    )
    parser.add_argument("--partition", help="as for sbatch")
    parser.add_argument("--account", help="as for sbatch")
    parser.add_argument("--constraint", help="as for sbatch")
    # A checkpoint of 8 B parameters is some 110 GB, which take 5 minutes at 0.4 GB/s; a step may
    # come before it.
    parser.add_argument(
        "--signal-seconds",
        type=int,
        default=600,
        help="how long before the time limit the ranks are told to save (%(default)s)",
    )
    parser.add_argument(
        "--cpus-per-task",
        type=int,
        help=f"cores of a rank, for Python, autograd and NCCL; default: {CPUS_PER_GPU} with a "
        "GPU, else what the cluster gives",
    )
    parser.add_argument(
        "--restarts",
        type=int,
        default=3,
        help="how often a job is requeued after a rank failed or was killed, if it left a new "
        "checkpoint each time (%(default)s)",
    )
    parser.add_argument(
        "--srun-arg",
        dest="srun_options",
        action="append",
        default=[],
        metavar="--FLAG=VALUE",
        help="an option for srun, such as --srun-arg=--mpi=pmix; may be repeated",
    )
    parser.add_argument(
        "--preflight",
        action="store_true",
        help="submit launch/preflight.py instead of the run, with the same resources and settings",
    )
    parser.add_argument(
        "--setup",
        type=Path,
        help="a shell file that the job sources first, for modules or an environment",
    )
    parser.add_argument("--container", metavar="IMAGE", help="run in this image, with apptainer")
    parser.add_argument(
        "--evaluate",
        action="store_true",
        help="submit a second job that runs launch/evaluate.py after the run has succeeded",
    )
    parser.add_argument(
        "--array-over",
        metavar="FIELD=V1,V2",
        help="submit an array with a run for each value: keep_fraction=0.25,0.5,0.75,1.0",
    )
    axis_arguments(parser)
    caches = parser.add_argument_group(
        "a teacher that runs once", "options of launch/cache.py and launch/study.py"
    )
    caches.add_argument(
        "--fill-cache",
        type=Path,
        metavar="FOLDER",
        help="fill this cache instead of training; then train with --set teacher.cache=FOLDER",
    )
    caches.add_argument(
        "--cache",
        "--kind",
        nargs="?",
        const="hidden",
        choices=("hidden", "vector", "top_k", "sampled"),
        help="kind of the cache (%(const)s); with an axis of a study, a job fills STUDY/cache "
        "first, and the cells train from it",
    )
    caches.add_argument(
        "--cache-dtype",
        "--dtype",
        choices=("fp32", "bf16", "int8"),
        help="dtype of hidden and vector (bf16)",
    )
    caches.add_argument(
        "--num-tokens",
        type=int,
        metavar="K",
        help="tokens per position of top_k (128) or sampled (12)",
    )
    texts = parser.add_argument_group("responses of the teacher, with launch/generate.py")
    texts.add_argument(
        "--generate",
        type=Path,
        metavar="FILE",
        help="write this file of responses instead of training",
    )
    texts.add_argument(
        "--problems",
        type=Path,
        metavar="FILE",
        help="JSONL of the problems that the teacher answers",
    )
    texts.add_argument(
        "--generate-arg",
        dest="generate_options",
        action="append",
        default=[],
        metavar="--FLAG=VALUE",
        help="an option for launch/generate.py, such as --generate-arg=--num-samples=4; may be "
        "repeated",
    )
    parser.add_argument(
        "--evaluate-ranks",
        type=int,
        metavar="N",
        help="ranks of each job of --evaluate, on one node, one GPU per rank (1)",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check, print the scripts, and submit nothing"
    )
    arguments = parser.parse_args(words[: len(words) - len(options) - ("--" in words)])
    arguments.sbatch_options = options
    return arguments


def request_of(arguments: argparse.Namespace) -> JobRequest:
    if arguments.gpus_per_node < 0 or (arguments.gpus_per_node == 0) != (
        arguments.tasks_per_node is not None
    ):
        raise UserError(
            f"--gpus-per-node {arguments.gpus_per_node}: a node has a rank per GPU; give "
            "--tasks-per-node with 0 GPUs, and only then"
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
                f"--container {container}: no such image; name a .sif file, a folder or "
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
        evaluate_ranks=evaluate_ranks_of(arguments),
        cpus_per_task=cpus_of(arguments),
        setup=setup and setup.absolute(),
        container=container,
    )


def evaluate_ranks_of(arguments: argparse.Namespace) -> int:
    asked: int | None = arguments.evaluate_ranks
    if asked is not None and not arguments.evaluate:
        raise UserError(f"--evaluate-ranks {asked} is of an evaluation: add --evaluate")
    return 1 if asked is None else asked


def srun_options_of(arguments: argparse.Namespace) -> tuple[str, ...]:
    for option in arguments.srun_options:
        if not option.startswith("-"):
            raise UserError(
                f"--srun-arg {option}: write an option of srun, such as --srun-arg=--mpi=pmix"
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
