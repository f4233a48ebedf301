"""A recipe as a SLURM job: what it trains, whether it can, its files frozen, and the queue.

RUN/slurm/1/            one submission; RUN is the recipe's run, a study, or an array's name
                        without a suffix
  code/                 a copy of what the job runs: edits made while it waits change nothing
  recipe.json           resolved; recipe_0.json and so on for an array
  train.sbatch, evaluate.sbatch, and the logs of both
RUN/slurm.json          of each run: its jobs, and where their submission is
"""

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

from kd.cluster.sbatch import Job, JobRequest, evaluate_script, train_script
from kd.errors import UserError
from kd.evaluate.tasks import check_evaluation
from kd.files import write_json, write_text
from kd.recipe import ROOT, Recipe, load_recipe
from kd.runs.check import check_recipe, inputs

COPIED = ("kd", "launch", "recipes", "ds_configs")


@dataclass(frozen=True)
class Submission:
    """Jobs as they would be submitted; submit() does it."""

    job: Job
    recipes: tuple[Recipe, ...]
    plans: tuple[str, ...]  # a line for each recipe
    train: str
    evaluate: str | None


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
            f"--array-over {array_over}: write FIELD=VALUE,VALUE, as in keep_fraction=0.25,0.5"
        )
    section, _, key = field.rpartition(".")
    section = section or _section_of(base, key)
    names = [
        re.sub(r"[^\w.=-]+", "-", f"{base.run.name}-{key}={value}") for value in values.split(",")
    ]
    if len(set(names)) != len(names):
        raise UserError(
            f"--array-over {array_over}: two values would share a run ({', '.join(names)})"
        )
    return base.run_dir, tuple(
        load_recipe(name, [*overrides, f"{section}.{key}={value}", f"run.name={json.dumps(run)}"])
        for run, value in zip(names, values.split(","), strict=True)
    )


def prepare(
    folder: Path, recipes: tuple[Recipe, ...], request: JobRequest, evaluate: bool
) -> Submission:
    """Check all that can be known before the job starts, and make its scripts; writes nothing.

    folder and recipes: of read_recipes, or of a study. Raises UserError.
    """
    _check_checkout()
    env_file = os.environ.get("DS_ENV_FILE")
    if env_file and not Path(env_file).is_file():
        raise UserError(
            f"DS_ENV_FILE = {env_file!r}: no such file; unset it to take launch/nodes.env"
        )
    plans = []
    for recipe in recipes:
        check_recipe(recipe)
        _check_inputs_reach_the_job(recipe)
        plans.append(_check_fits(recipe, request))
        if evaluate:
            check_evaluation(recipe)
        _check_run(recipe)
    from kd.runs.environment import environment  # after the checks, which import no torch

    submission = _next_folder(folder.absolute() / "slurm")
    files = (
        ["recipe.json"]
        if len(recipes) == 1
        else [f"recipe_{index}.json" for index in range(len(recipes))]
    )
    job = Job(
        name=folder.name,
        folder=submission,
        runs=tuple(recipe.run_dir.absolute() for recipe in recipes),
        recipes=tuple(submission / file for file in files),
        commit=environment()["commit"] or "",
    )
    evaluation = evaluate_script(job, request) if evaluate else None
    return Submission(job, recipes, tuple(plans), train_script(job, request), evaluation)


def submit(submission: Submission) -> list[str]:
    """Freeze the files and submit the jobs: ids of training and, if any, of evaluation.

    Raises UserError, and leaves nothing behind, when a run is still in the queue or sbatch refuses.
    """
    job = submission.job
    for run in job.runs:
        _check_not_queued(run)
    try:
        job.folder.mkdir(parents=True)
    except FileExistsError:
        raise UserError(
            f"{job.folder}: another submission was made just now: look at it, and submit again"
        ) from None
    try:
        _freeze(submission)
        ids = _sbatch_all(submission)
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


def _check_checkout() -> None:
    missing = [part for part in COPIED if not (ROOT / part).is_dir()]
    if missing:
        raise UserError(
            f"{ROOT} has no {', '.join(missing)}: a job runs from a copy of a checkout, and this "
            "kd was installed without one; clone the repository and run its launch/submit.py"
        )


def _section_of(recipe: Recipe, key: str) -> str:
    sections = [name for name in Recipe.model_fields if hasattr(getattr(recipe, name), key)]
    if len(sections) != 1:
        found = f"is in {' and '.join(sections)}" if sections else "is in no section of a recipe"
        raise UserError(
            f"--array-over {key}: {key} {found}; write section.key, as in truncation.keep_fraction"
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
                f"{field} = {value!r} is in {ROOT}, and jobs run from a copy of its code: submit "
                f"from there, or write {str(ROOT / path)!r}"
            )


def _check_fits(recipe: Recipe, request: JobRequest) -> str:
    """What depends on nodes and ranks: the batch, and the memory of the GPUs."""
    from kd.plan import memory_plan  # imports torch
    from kd.plan.gpus import named_gpu

    try:
        plan = memory_plan(recipe, request.num_nodes, request.tasks_per_node)
    except UserError as error:
        if request.gpu:
            raise
        # Nothing is known here of the model.
        return f"{recipe.run.name}: memory not planned: {error}"
    problem = plan.verdict(named_gpu(request.gpu).gib) if request.gpu else None
    if problem:
        raise UserError(f"--gpu {request.gpu}: {problem}")
    return (
        f"{recipe.run.name}: {plan.total_gib:.1f} GiB per rank planned, {plan.checkpoint_gib:.1f} "
        f"GiB a checkpoint, {plan.disk_gib:.0f} GiB on disk"
    )


def _check_run(recipe: Recipe) -> None:
    from kd.runs.folder import SUCCESS, check_same_run  # imports torch

    run = recipe.run_dir
    if (run / SUCCESS).exists():
        raise UserError(
            f"{run} is finished, it has its SUCCESS: begin another run with --set run.name=NAME"
        )
    unsafe = sorted(set(str(run.absolute())) & set(":\\\n"))
    if unsafe:
        raise UserError(
            f"run folder {str(run)!r} has {' and '.join(map(repr, unsafe))} in it, with which "
            "neither Python nor SLURM can name a path: choose others with --set "
            "run.output_dir=FOLDER or --set run.name=NAME"
        )
    check_same_run(recipe)


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
    write_text(job.folder / "train.sbatch", submission.train)
    if submission.evaluate:
        write_text(job.folder / "evaluate.sbatch", submission.evaluate)


def _sbatch_all(submission: Submission) -> list[str]:
    folder = submission.job.folder
    train = _sbatch(folder / "train.sbatch")
    if submission.evaluate is None:
        return [train]
    after = "aftercorr" if len(submission.recipes) > 1 else "afterok"
    # Cancelled when training fails
    options = (
        f"--dependency={after}:{train}",
        "--kill-on-invalid-dep=yes",
    )
    try:
        return [train, _sbatch(folder / "evaluate.sbatch", *options)]
    except BaseException:
        _slurm("scancel", train)
        raise


def _sbatch(script: Path, *options: str) -> str:
    return _slurm("sbatch", "--parsable", *options, str(script)).partition(";")[0]


def _slurm(*command: str) -> str:
    """What a command of SLURM prints. Raises UserError with what it says when it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise UserError(
            f"{command[0]} is not here: submit where SLURM is, or look at the script with --dry-run"
        ) from None
    if done.returncode:
        raise UserError(f"{shlex.join(command)}: {done.stderr.strip()}")
    return done.stdout.strip()
