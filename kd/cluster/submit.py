"""Submit a recipe to SLURM: choose what to train, check it, copy its files and queue the jobs.

RUN/slurm/1/            one submission; RUN is the recipe's run, a study, an array's name without
                        a suffix, a teacher's cache, or OUTPUT.jobs of what a teacher writes
  code/                 a copy of what the job runs: edits made while it waits change nothing
  recipe.json           resolved; recipe_0.json and so on for an array
  KIND.sbatch           train, evaluate, preflight, cache or generate, and their logs
RUN/slurm.json          of each run: its jobs, and where their submission is
"""

import argparse
import contextlib
import glob
import json
import os
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kd.cli import CacheRequest
from kd.cluster.sbatch import (
    EARLY_SECONDS,
    Job,
    JobRequest,
    cache_script,
    evaluate_script,
    generate_script,
    preflight_script,
    seconds_of,
    train_script,
)
from kd.errors import UserError
from kd.evaluate.problems import load_problems
from kd.evaluate.tasks import check_evaluation
from kd.files import write_json, write_text
from kd.recipe import ROOT, Recipe, load_recipe
from kd.runs.check import check_can_write, check_recipe, inputs
from kd.runs.lock import hold

COPIED = ("kd", "launch", "recipes", "ds_configs")


@dataclass(frozen=True)
class Submission:
    """Jobs as they would be submitted; submit() does it."""

    job: Job
    recipes: tuple[Recipe, ...]
    plans: tuple[str, ...]  # a line for each recipe
    kind: Literal["train", "evaluate", "preflight", "cache", "generate"]
    script: str  # of that kind
    evaluate: str | None  # after training


def read_recipes(
    name: str, overrides: list[str], array_over: str | None
) -> tuple[Path, tuple[Recipe, ...]]:
    """The folder of the run and its recipe; of an array, its folder, and a recipe for each value of
    FIELD=V1,V2.
    """
    base = load_recipe(name, overrides)
    if array_over is None:
        return base.run_dir, (base,)
    field, equals, values = array_over.partition("=")
    if not equals or not all(values.split(",")):
        raise UserError(
            f"--array-over {array_over}: write FIELD=VALUE,VALUE, such as keep_fraction=0.25,0.5"
        )
    section, _, key = field.rpartition(".")
    section = section or _section_of(base, key)
    names = [
        re.sub(r"[^\w.=-]+", "-", f"{base.run.name}-{key}={value}") for value in values.split(",")
    ]
    if len(set(names)) != len(names):
        raise UserError(
            f"--array-over {array_over}: two values would share a run ({', '.join(names)}); "
            "choose values whose names differ"
        )
    return base.run_dir, tuple(
        load_recipe(name, [*overrides, f"{section}.{key}={value}", f"run.name={json.dumps(run)}"])
        for run, value in zip(names, values.split(","), strict=True)
    )


def left_to_do(
    recipes: tuple[Recipe, ...], evaluate: bool
) -> tuple[tuple[Recipe, ...], tuple[Recipe, ...]]:
    """The recipes to train, and those that are trained and only need to be evaluated. Raises
    UserError when nothing is left.
    """
    from kd.evaluate.evaluation import is_scored, result_files  # import torch
    from kd.runs.folder import NOTHING_TO_LEARN, SUCCESS

    train, score = [], []
    for recipe in recipes:
        run = recipe.run_dir
        if len(recipes) > 1 and (run / NOTHING_TO_LEARN).exists():
            continue
        if not (run / SUCCESS).exists():
            train.append(recipe)
        elif evaluate:
            label = "best" if (run / "export" / "best").exists() else "last"
            if not is_scored(recipe, result_files(recipe, run / "evaluation", f"export-{label}")):
                score.append(recipe)
    if not train and not score:
        first = recipes[0].run_dir
        what = (
            f"{first} is" if len(recipes) == 1 else f"all {len(recipes)} runs, {first} first, are"
        )
        raise UserError(
            f"{what} finished (SUCCESS{' and scores' if evaluate else ''}): start another run "
            "with --set run.name=NAME"
        )
    return tuple(train), tuple(score)


def prepare(
    folder: Path,
    recipes: tuple[Recipe, ...],
    request: JobRequest,
    *,
    train: bool = True,
    evaluate: bool = False,
    preflight: bool = False,
    awaits_cache: bool = False,
) -> Submission:
    """Check all that can be known before the job starts, and make its scripts; writes nothing.

    folder and recipes: of read_recipes, or of a study, without those that are finished. train:
    False for runs that are trained, and are to be evaluated. preflight: a job of
    launch/preflight.py in the place of both. awaits_cache: the recipes' teacher.cache is filled by
    a job before this one. Raises UserError.
    """
    from kd.evaluate.evaluation import check_ranks, local_problems  # import torch
    from kd.generation.backends import usual_backend

    _check_jobs_can_run(request)
    plans = []
    for recipe in recipes:
        check_recipe(recipe, awaits_cache=awaits_cache)
        _check_inputs_reach_the_job(recipe)
        plans.append(_check_fits(recipe, request))
        if evaluate:
            check_evaluation(recipe)
            if recipe.evaluation.path is not None:
                problems = local_problems(recipe.evaluation, num_samples=None, limit=None)
                check_ranks(recipe, usual_backend(), [problems], request.evaluate_ranks)
        _check_run(recipe)
    job = _make_job(folder.name, folder, tuple(recipe.run_dir for recipe in recipes))
    kind: Literal["train", "evaluate", "preflight"]
    kind = "preflight" if preflight else "train" if train else "evaluate"
    write = {"train": train_script, "evaluate": evaluate_script, "preflight": preflight_script}
    after = evaluate_script(job, request) if kind == "train" and evaluate else None
    return Submission(job, recipes, tuple(plans), kind, write[kind](job, request), after)


def prepare_filler(
    folder: Path, recipe: Recipe, request: JobRequest, cache: CacheRequest, name: str
) -> Submission:
    """As prepare(), a job of launch/cache.py, which fills the folder; name: of what it is for."""
    from kd.training.fill_cache import check_request, whole_traces  # imports torch

    _check_jobs_can_run(request)
    recipe = whole_traces(recipe)
    check_request(recipe, cache, folder)
    check_recipe(recipe)
    check_can_write(folder, f"the cache's folder {str(folder)!r}")
    _check_path(folder, "the cache's folder", "name another folder")
    _check_inputs_reach_the_job(recipe)
    plan = _check_filler_fits(recipe, request, cache.kind)
    job = _make_job(name, folder, (folder,), cache.words)
    return Submission(job, (recipe,), (plan,), "cache", cache_script(job, request), None)


def prepare_generation(
    arguments: argparse.Namespace, recipe: Recipe, request: JobRequest, options: tuple[str, ...]
) -> Submission:
    """As prepare(), a job of launch/generate.py. arguments: as that parses them; options: its words
    beyond --recipe, --problems and --output.
    """
    from kd.generation.backends import batch_size_of, usual_backend  # import torch
    from kd.generation.shares import check_num_batches

    output, num_ranks = arguments.output, request.num_tasks
    _check_jobs_can_run(request)
    if recipe.teacher is None:
        raise UserError(
            f"--generate {output}: the recipe has no [teacher] to generate with; add one"
        )
    if output.exists():
        raise UserError(f"--generate {output}: it exists already: name another file, or remove it")
    need_answers = arguments.keep == "correct"
    problems = load_problems("--problems", arguments.problems, arguments.limit, need_answers)
    num_requests = len(problems) * arguments.num_samples
    usual = batch_size_of(usual_backend(), recipe.evaluation, num_requests, num_ranks)
    size = arguments.batch_size or usual
    remedy = "set a lower --generate-arg=--batch-size"
    check_num_batches(num_ranks, num_requests, size, remedy)
    check_can_write(output.parent, f"the folder of --generate {str(output)!r}")
    _check_path(output, "--generate", "name another file")
    _check_inputs_reach_the_job(recipe)
    jobs = output.with_name(output.name + ".jobs")
    words = ("--problems", str(Path(arguments.problems).absolute()), *options)
    job = _make_job(output.name, jobs, (jobs,), words)
    return Submission(job, (recipe,), (), "generate", generate_script(job, request), None)


def submit(submission: Submission, after: str | None = None) -> list[str]:
    """Freeze the files and submit the jobs: ids of training and, if any, of evaluation. after: the
    id of a job that must succeed first; where it fails these are cancelled.

    Raises UserError, and leaves nothing behind, when a run is still in the queue or sbatch refuses.
    """
    job, owner = submission.job, submission.job.folder.parent.parent
    # Held until slurm.json says what is in the queue: sbatch may take its time
    hold(owner.parent, f".{owner.name}.submission.lock", patience_seconds=0)
    for run in job.runs:
        _check_not_queued(run)
    try:
        job.folder.mkdir(parents=True)
    except FileExistsError:
        raise UserError(
            f"{job.folder}: another submission was made just now: check it, then submit again"
        ) from None
    try:
        _freeze(submission)
        ids = _sbatch_all(submission, after)
    except BaseException:
        shutil.rmtree(job.folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # they hold something else
            job.folder.parent.rmdir()
            job.folder.parent.parent.rmdir()
        raise
    for index, run in enumerate(job.runs):
        task = f"_{index}" if len(job.runs) > 1 else ""
        write_json(
            run / "slurm.json", {"jobs": [id + task for id in ids], "submission": str(job.folder)}
        )
    return ids


def cancel(job: str) -> None:
    _slurm("scancel", job)


def _check_jobs_can_run(request: JobRequest) -> None:
    """What is asked of a checkout and of the cluster, whatever the job does."""
    _check_checkout()
    _check_limit(request)
    env_file = os.environ.get("DS_ENV_FILE")
    if env_file and not Path(env_file).is_file():
        raise UserError(
            f"DS_ENV_FILE = {env_file!r}: no such file; unset it to use launch/nodes.env"
        )


def _make_job(
    name: str, folder: Path, runs: tuple[Path, ...], script_options: tuple[str, ...] = ()
) -> Job:
    """The next submission in the folder: a task for each of the runs."""
    from kd.runs.environment import environment  # after the checks, which import no torch

    submission = _next_folder(folder.absolute() / "slurm")
    numbers = [""] if len(runs) == 1 else [f"_{index}" for index in range(len(runs))]
    return Job(
        name=name,
        folder=submission,
        runs=tuple(run.absolute() for run in runs),
        recipes=tuple(submission / f"recipe{number}.json" for number in numbers),
        commit=environment()["commit"] or "",
        script_options=script_options,
    )


def _check_checkout() -> None:
    missing = [part for part in COPIED if not (ROOT / part).is_dir()]
    if missing:
        raise UserError(
            f"{ROOT} has no {', '.join(missing)}: a job runs from a copy of a checkout, but this "
            "kd was installed without one; clone the repository and run its launch/submit.py"
        )


def _section_of(recipe: Recipe, key: str) -> str:
    sections = [name for name in Recipe.model_fields if hasattr(getattr(recipe, name), key)]
    if len(sections) != 1:
        found = f"is in {' and '.join(sections)}" if sections else "is in no section of a recipe"
        raise UserError(
            f"--array-over {key}: {key} {found}; write section.key, such as "
            "truncation.keep_fraction"
        )
    return sections[0]


def _check_inputs_reach_the_job(recipe: Recipe) -> None:
    """A job looks for inputs in the same current directory, but in the copy of the code, not in the
    repository.
    """
    for field, value in inputs(recipe).items():
        path = Path(value).expanduser()
        is_there = path.exists() or glob.glob(str(path), recursive=True)
        is_in_repository = (ROOT / path).exists() or glob.glob(str(path), root_dir=ROOT)
        if not is_there and is_in_repository and path.parts[0] not in COPIED:
            raise UserError(
                f"{field} = {value!r} is in {ROOT}, but jobs run from a copy that does not hold "
                f"it: submit from {ROOT}, or write {str(ROOT / path)!r}"
            )


def _check_fits(recipe: Recipe, request: JobRequest) -> str:
    """What depends on nodes and ranks: the batch, and the memory of the GPUs."""
    from kd.plan import memory_plan  # imports torch
    from kd.plan.gpus import Site, named_gpu
    from kd.plan.placement import settle

    sizes = request.num_nodes, request.tasks_per_node
    try:
        if request.gpu:
            gpu = named_gpu(request.gpu)
            recipe, _ = settle(recipe, *sizes, gpu.gib, Site(gpu, *sizes))
        plan = memory_plan(recipe, *sizes)
    except UserError as error:
        if request.gpu:
            raise
        # Nothing is known here of the model.
        return f"{recipe.run.name}: could not plan the memory: {error}"
    problem = plan.verdict(gpu.gib) if request.gpu else None
    if problem:
        raise UserError(f"--gpu {request.gpu}: {problem}")
    return (
        f"{recipe.run.name}: {plan.total_gib:.1f} GiB per rank planned, {plan.checkpoint_gib:.1f} "
        f"GiB per checkpoint, {plan.disk_gib:.0f} GiB on disk"
    )


def _check_filler_fits(recipe: Recipe, request: JobRequest, kind: str) -> str:
    """The memory of the GPUs, of which a filler's ranks hold only the teacher."""
    from kd.plan.gpus import named_gpu  # imports torch
    from kd.plan.memory import RESERVED_GIB, plan_filler
    from kd.training.fill_cache import TOKENS_PER_MICRO_BATCH

    budget = recipe.training.max_tokens_per_micro_batch or TOKENS_PER_MICRO_BATCH
    try:
        gib = plan_filler(recipe, request.num_nodes, request.tasks_per_node, budget, kind)
    except UserError as error:
        if request.gpu:
            raise
        # Nothing is known here of the model.
        return f"the teacher's cache: could not plan the memory: {error}"
    if request.gpu and gib + RESERVED_GIB > named_gpu(request.gpu).gib:
        raise UserError(
            f"--gpu {request.gpu}: filling the cache takes {gib:.1f} GiB per GPU, and CUDA "
            f"{RESERVED_GIB:.0f} GiB, but a GPU has {named_gpu(request.gpu).gib:.1f} GiB: use "
            'more nodes with teacher.shard = "world", or lower '
            "training.max_tokens_per_micro_batch or truncation.max_full_tokens"
        )
    return f"the teacher's cache: {gib:.1f} GiB per rank planned"


def _check_limit(request: JobRequest) -> None:
    """Without --time a partition's own limit holds: one below --signal-seconds would have the job
    told to save at once, and again after each requeue. Unknown where SLURM is not.
    """
    if request.time is not None:
        return
    try:
        partitions = _slurm("scontrol", "--oneliner", "show", "partition")
    except UserError:  # sbatch will say what is wrong
        return
    for line in partitions.splitlines():
        facts = dict(word.split("=", 1) for word in line.split() if "=" in word)
        is_meant = (
            facts.get("PartitionName") in request.partition.split(",")
            if request.partition
            else facts.get("Default") == "YES"
        )
        limit = facts.get("DefaultTime", "NONE")
        limit = facts.get("MaxTime", "UNLIMITED") if limit == "NONE" else limit
        if is_meant and limit != "UNLIMITED":
            seconds = seconds_of(limit)
            if seconds <= request.signal_seconds + EARLY_SECONDS:
                raise UserError(
                    f"partition {facts['PartitionName']} ends a job after {limit}, but the signal "
                    f"to save comes {request.signal_seconds} s before that (--signal-seconds): "
                    "lower --signal-seconds to the time of a checkpoint, or give --time or "
                    "--partition"
                )


def why_pending(job: str) -> str:
    """SLURM's reason why a job cannot start; empty if it only waits for its turn."""
    reason = _slurm("squeue", "--noheader", f"--jobs={job}", "--format=%r").partition("\n")[0]
    waits = ("None", "Priority", "Resources", "BeginTime", "Dependency", "JobHeldUser", "")
    return "" if reason in waits else reason


def _check_run(recipe: Recipe) -> None:
    from kd.runs.folder import check_same_run  # imports torch

    others = "choose others with --set run.output_dir=FOLDER or --set run.name=NAME"
    _check_path(recipe.run_dir, "run folder", others)
    check_same_run(recipe)


def _check_path(folder: Path, what: str, remedy: str) -> None:
    unsafe = sorted(set(str(folder.absolute())) & set(":\\\n"))
    if unsafe:
        raise UserError(
            f"{what} {str(folder)!r} has {' and '.join(map(repr, unsafe))} in it, which Python or "
            f"SLURM cannot use in a path: {remedy}"
        )


def _check_not_queued(run: Path) -> None:
    path = run / "slurm.json"
    if path.exists():
        job = json.loads(path.read_text(encoding="utf-8"))["jobs"][0]
        state = _state_of(job)
        if state:
            raise UserError(
                f"{run}: its job {job} is {state}: wait for it, or `scancel {job}` first"
            )


def _state_of(job: str) -> str:
    """PENDING, RUNNING and so on; empty for a job that has left the queue. Raises UserError when
    SLURM does not say.
    """
    try:
        return _slurm("squeue", "--noheader", f"--jobs={job}", "--format=%T")
    except UserError as error:
        if "Invalid job id" in str(error):
            return ""  # so long gone that SLURM has forgotten it
        raise


def _next_folder(parent: Path) -> Path:
    numbers = [int(path.name) for path in parent.glob("*") if path.name.isdecimal()]
    return parent / str(max(numbers, default=0) + 1)


def _freeze(submission: Submission) -> None:
    job = submission.job
    for part in COPIED:
        shutil.copytree(
            ROOT / part, job.folder / "code" / part, ignore=shutil.ignore_patterns("__pycache__")
        )
    if file := os.environ.get("DS_ENV_FILE"):
        shutil.copyfile(file, job.folder / "code" / "launch" / "nodes.env")
    for path, recipe in zip(job.recipes, submission.recipes, strict=True):
        write_json(path, recipe.as_file())
    write_text(job.folder / f"{submission.kind}.sbatch", submission.script)
    if submission.evaluate:
        write_text(job.folder / "evaluate.sbatch", submission.evaluate)


def _sbatch_all(submission: Submission, after: str | None) -> list[str]:
    folder = submission.job.folder
    first = _sbatch(folder / f"{submission.kind}.sbatch", after and f"afterok:{after}")
    if submission.evaluate is None:
        return [first]
    each = "aftercorr" if len(submission.recipes) > 1 else "afterok"
    try:
        return [first, _sbatch(folder / "evaluate.sbatch", f"{each}:{first}")]
    except BaseException:
        cancel(first)
        raise


def _sbatch(script: Path, dependency: str | None) -> str:
    """Cancelled where what it depends on fails."""
    options = [f"--dependency={dependency}", "--kill-on-invalid-dep=yes"] if dependency else []
    return _slurm("sbatch", "--parsable", *options, str(script)).partition(";")[0]


def _slurm(*command: str) -> str:
    """What a command of SLURM prints. Raises UserError with what it says when it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise UserError(
            f"{command[0]} is not installed here: submit on a machine with SLURM, or print the "
            "script with --dry-run"
        ) from None
    if done.returncode:
        raise UserError(f"{shlex.join(command)}: {done.stderr.strip()}")
    return done.stdout.strip()
