"""The text of a job: #SBATCH lines, quoted variables, and then a script of launch/slurm."""

import re
import shlex
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from kd.errors import UserError
from kd.recipe import ROOT

EARLY_SECONDS = 60  # SLURM may send a signal up to so much too soon


@dataclass(frozen=True)
class JobRequest:
    """The resources and options of a job; None leaves a value to the cluster.

    Raises UserError for numbers and options that no cluster accepts.
    """

    num_nodes: int
    gpus_per_node: int
    tasks_per_node: int
    signal_seconds: int
    gpu: str | None = None  # as kd.plan.gpus names it
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    constraint: str | None = None
    more_options: tuple[str, ...] = ()
    srun_options: tuple[str, ...] = ()
    restarts: int = 3  # after a failure that left a new checkpoint
    evaluate_ranks: int = 1  # on one node
    cpus_per_task: int | None = None
    setup: Path | None = None
    container: str | None = None

    def __post_init__(self) -> None:
        numbers = {
            "nodes": (self.num_nodes, 1),
            "tasks-per-node": (self.tasks_per_node, 1),
            "signal-seconds": (self.signal_seconds, 1),
            "cpus-per-task": (1 if self.cpus_per_task is None else self.cpus_per_task, 1),
            "restarts": (self.restarts, 0),
            "evaluate-ranks": (self.evaluate_ranks, 1),
        }
        for flag, (number, least) in numbers.items():
            if number < least:
                raise UserError(f"--{flag} {number}: write at least {least}")
        if self.evaluate_ranks > self.tasks_per_node:
            raise UserError(
                f"--evaluate-ranks {self.evaluate_ranks}: an evaluation runs on one node, which "
                f"has {self.tasks_per_node} ranks: lower it"
            )
        if self.time is not None and seconds_of(self.time) <= self.signal_seconds + EARLY_SECONDS:
            raise UserError(
                f"--time {self.time} ends before the signal to save, which comes "
                f"{self.signal_seconds} s (--signal-seconds) or up to {EARLY_SECONDS} s more "
                "before the limit: ask for more time, or lower --signal-seconds"
            )
        for option in self.more_options:
            if not option.startswith("--"):
                raise UserError(
                    f"{option!r}, after --, is not an option of sbatch: write --name=value, such "
                    "as --mem=0"
                )

    @property
    def num_tasks(self) -> int:
        return self.num_nodes * self.tasks_per_node


@dataclass(frozen=True)
class Job:
    """What the scripts of launch/slurm are told: absolute paths, and a run and its recipe per task
    of an array. The run of a job that fills a cache is the cache, and OUTPUT.jobs is that of one
    that generates.
    """

    name: str
    folder: Path  # of the submission: code, recipes, scripts, logs
    runs: tuple[Path, ...]
    recipes: tuple[Path, ...]
    commit: str
    script_options: tuple[str, ...] = ()  # of launch/cache.py or launch/generate.py


def train_script(job: Job, request: JobRequest) -> str:
    return _script("train", job, request, _of_all_ranks(request) | _signal(request))


def cache_script(job: Job, request: JobRequest) -> str:
    return _script("cache", job, request, _of_all_ranks(request) | _signal(request))


def generate_script(job: Job, request: JobRequest) -> str:
    # SLURM may send the signal early; what it interrupts is one batch
    signal = {"signal": f"B:USR1@{EARLY_SECONDS}"}
    return _script("generate", job, request, _of_all_ranks(request) | signal)


def preflight_script(job: Job, request: JobRequest) -> str:
    return _script("preflight", job, request, _of_all_ranks(request))


def evaluate_script(job: Job, request: JobRequest) -> str:
    options: dict[str, object] = {
        "nodes": 1,
        "ntasks": request.evaluate_ranks,
        "gpus-per-node": request.evaluate_ranks if request.gpus_per_node else None,
        "cpus-per-task": request.cpus_per_task,
        "signal": f"B:USR1@{EARLY_SECONDS}",
    }
    return _script("evaluate", job, request, options)


def seconds_of(time: str) -> int:
    """Of a limit as SLURM writes it: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S; else UserError."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time)
    if match is None:
        raise UserError(
            f"--time {time}: write minutes, hours:minutes:seconds or days-hours, such as 90 or "
            "24:00:00"
        )
    days, *parts = (None if part is None else int(part) for part in match.groups())
    numbers = [part for part in parts if part is not None]
    units = (3600, 60, 1) if days is not None or len(numbers) == 3 else (60, 1)
    return (days or 0) * 86400 + sum(
        number * unit for number, unit in zip(numbers, units, strict=False)
    )


def _of_all_ranks(request: JobRequest) -> dict[str, object]:
    return {
        "nodes": request.num_nodes,
        "ntasks-per-node": request.tasks_per_node,
        "gpus-per-node": request.gpus_per_node or None,
        "cpus-per-task": request.cpus_per_task,
    }


def _signal(request: JobRequest) -> dict[str, object]:
    """Only to the batch script, which passes it to srun."""
    return {"signal": f"B:USR1@{request.signal_seconds}"}


def _script(kind: str, job: Job, request: JobRequest, options: Mapping[str, object]) -> str:
    is_array = len(job.runs) > 1
    log = f"{job.folder}/{kind}-".replace("%", "%%") + ("%A_%a.out" if is_array else "%j.out")
    options = {
        # squeue shows it; a name is no path, and the cluster's own tools may not quote it.
        "job-name": re.sub(r"[^\w.=-]+", "-", job.name) + ("" if kind == "train" else f"-{kind}"),
        **options,
        "array": f"0-{len(job.runs) - 1}" if is_array else None,
        "output": log,
        "open-mode": "append",
        "requeue": "",
        "time": request.time,
        "partition": request.partition,
        "account": request.account,
        "constraint": request.constraint,
    }
    lines = [_option(name, value) for name, value in options.items() if value is not None]
    lines += [
        _option(*option.removeprefix("--").partition("=")[::2]) for option in request.more_options
    ]
    _, body = (
        (ROOT / "launch" / "slurm" / f"{kind}.sbatch").read_text(encoding="utf-8").split("\n", 1)
    )
    return "\n".join(["#!/usr/bin/env bash", *lines, "", *_variables(job, request), "", body])


def _option(name: str, value: object) -> str:
    r"""sbatch reads "..." with \ as its escape, and expands nothing."""
    text = str(value)
    if "\n" in name + text:
        raise UserError(f"--{name}={text!r}: an option of sbatch must be one line")
    quoted = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'#SBATCH --{name}="{quoted}"' if text else f"#SBATCH --{name}"


def _variables(job: Job, request: JobRequest) -> list[str]:
    container: list[object] = []
    if request.container:
        folders = [Path.cwd(), *sorted({run.parent for run in job.runs})]
        container = ["apptainer", "exec", *(["--nv"] if request.gpus_per_node else [])]
        container += [word for folder in folders for word in ("--bind", folder)] + [
            request.container
        ]
    return [
        f"work_dir={_quote(Path.cwd())} # the recipe's relative paths start here",
        f"code={_quote(job.folder / 'code')}",
        f"commit={_quote(job.commit)}",
        f"python_dir={_quote(Path(sys.executable).parent)}",
        f"setup={_quote(request.setup or '')}",
        f"container={_array(container)}",
        f"folder={_quote(job.folder)}",
        f"restarts={request.restarts}",
        f"srun_options={_array(request.srun_options)}",
        f"runs={_array(job.runs)}",
        f"recipes={_array(job.recipes)}",
        *([f"script_options={_array(job.script_options)}"] if job.script_options else []),
    ]


def _quote(value: object) -> str:
    return shlex.quote(str(value))


def _array(values: Iterable[object]) -> str:
    return f"({' '.join(map(_quote, values))})"
