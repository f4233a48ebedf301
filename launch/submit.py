"""Submit a recipe to SLURM: python launch/submit.py RECIPE --nodes 2 --gpus-per-node 8 [-- OPTIONS
OF SBATCH]

Checks recipe and run, freezes code, resolved recipe and script in the run's folder, and submits. A
job that nears its time limit saves a checkpoint, is requeued and goes on by itself.
"""

import argparse
import contextlib
import shlex
import sys
from pathlib import Path

from kd.cli import axis_arguments, run
from kd.cluster.sbatch import JobRequest
from kd.cluster.submit import (
    Submission,
    left_to_do,
    prepare,
    read_recipes,
    submit,
    why_pending,
)
from kd.errors import UserError
from kd.recipe import Recipe
from kd.study.cells import Axes, Study, make_study, parse_axes, write_study

CPUS_PER_GPU = 4


def main() -> None:
    arguments = parse_args(sys.argv[1:])
    # DeepSpeed says on stdout that a login node has no GPU.
    with contextlib.redirect_stdout(sys.stderr):
        request = request_of(arguments)
        study = study_of(arguments)
        if study is None:
            folder, recipes = read_recipes(
                arguments.recipe, arguments.overrides, arguments.array_over
            )
        else:
            folder, recipes = study.folder, tuple(cell.recipe for cell in study.cells)
        submissions = make_submissions(folder, recipes, request, arguments)
    if arguments.dry_run:
        scripts = [text for s in submissions for text in (s.script, s.evaluate) if text]
        print(*scripts, sep="\n")
        return
    if study is not None:
        write_study(study)
    for submission in submissions:
        print(how_to_follow(submission, submit(submission)))


def make_submissions(
    folder: Path, recipes: tuple[Recipe, ...], request: JobRequest, arguments: argparse.Namespace
) -> list[Submission]:
    """What is to be trained, and what is trained already and only to be evaluated; or, with
    --preflight, a look at what the first would have.
    """
    if arguments.preflight:
        return [prepare(folder, recipes[:1], request, preflight=True)]
    train, score = left_to_do(recipes, arguments.evaluate)
    submissions = []
    if train:
        submissions.append(prepare(folder, train, request, evaluate=arguments.evaluate))
    if score:
        submissions.append(prepare(folder, score, request, train=False, evaluate=True))
    return submissions


def study_of(arguments: argparse.Namespace) -> Study | None:
    """The study whose cells are to be the tasks of an array; None when no axis was given."""
    axes = parse_axes(
        arguments.keep, arguments.sections, arguments.windows, arguments.seeds, arguments.cross
    )
    if axes == Axes():
        return None
    if arguments.array_over is not None:
        raise UserError(
            f"--array-over {arguments.array_over}: the axes of a study make an array of their own"
        )
    return make_study(arguments.recipe, arguments.overrides, axes)


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


def how_to_follow(submission: Submission, ids: list[str]) -> str:
    job, folder = submission.job, submission.job.folder
    lines, runs = list(submission.plans), ", ".join(map(str, job.runs))
    kind = submission.kind
    does = {"train": "trains", "evaluate": "evaluates", "preflight": "looks before"}[kind]
    lines += [f"job {ids[0]} {does} {runs}"]
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
