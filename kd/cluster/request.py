"""The command line of launch/submit.py, and what of it is asked of the scheduler."""

import argparse
from pathlib import Path

from kd.cli import axis_arguments, overrides_argument
from kd.cluster.sbatch import JobRequest
from kd.errors import UserError

CPUS_PER_GPU = 4


def parse_arguments(words: list[str], description: str) -> argparse.Namespace:
    """words: of the command line; what follows -- goes to sbatch, as sbatch_options."""
    options = words[words.index("--") + 1 :] if "--" in words else []
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", help="a name from recipes/, or the path of a .toml file")
    overrides_argument(parser)
    _resource_arguments(parser)
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
    _cache_arguments(parser)
    _generation_arguments(parser)
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


def _resource_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what JobRequest is made of."""
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


def _cache_arguments(parser: argparse.ArgumentParser) -> None:
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


def _generation_arguments(parser: argparse.ArgumentParser) -> None:
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


def request_of(arguments: argparse.Namespace) -> JobRequest:
    """Raises UserError for what no cluster could serve."""
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
        srun_options=_srun_options_of(arguments),
        restarts=arguments.restarts,
        evaluate_ranks=_evaluate_ranks_of(arguments),
        cpus_per_task=_cpus_of(arguments),
        setup=setup and setup.absolute(),
        container=container,
    )


def _evaluate_ranks_of(arguments: argparse.Namespace) -> int:
    asked: int | None = arguments.evaluate_ranks
    if asked is not None and not arguments.evaluate:
        raise UserError(f"--evaluate-ranks {asked} is of an evaluation: add --evaluate")
    return 1 if asked is None else asked


def _srun_options_of(arguments: argparse.Namespace) -> tuple[str, ...]:
    for option in arguments.srun_options:
        if not option.startswith("-"):
            raise UserError(
                f"--srun-arg {option}: write an option of srun, such as --srun-arg=--mpi=pmix"
            )
    return tuple(arguments.srun_options)


def _cpus_of(arguments: argparse.Namespace) -> int | None:
    asked: int | None = arguments.cpus_per_task
    is_said = any(option.startswith("--cpus-per-") for option in arguments.sbatch_options)
    return asked or (CPUS_PER_GPU if arguments.gpus_per_node and not is_said else None)
