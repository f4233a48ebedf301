"""Jobs of launch/submit.py on a real SLURM: time limit, requeue, scancel, arrays, evaluation,
failures.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
from slurm_cluster import SECRETS, Cluster
from tiny import ROOT, wait_until, write_tiny_recipe

from kd.runs.records import read_metrics

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]

# Losses that do not depend on the number of steps to come, so that runs of unequal length can be
# compared.
STEADY = (
    "training.schedule=constant",
    "training.warmup_fraction=0.0",
    "training.learning_rate=1e-3",
)
ENDLESS = ("training.max_steps=100000", "training.checkpoint_every=100000")
COMPARED = ("step", "loss", "kd", "ce", "lr", "grad_norm", "num_supervised_tokens", "diagnostics")


class Submitted(NamedTuple):
    ids: list[str]
    folder: Path
    run: Path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the recipe and its runs: a shell, SLURM and srun would each read something into its
    name.
    """
    folder = tmp_path_factory.mktemp("jobs") / "it's $HOME & 50 %j; `x`"
    folder.mkdir()
    write_tiny_recipe(folder)
    problem = {"prompt": "1+2-3", "answer": "0"}
    (folder / "problems.jsonl").write_text(json.dumps(problem) + "\n")
    return folder


def submit(cluster: Cluster, folder: Path, name: str, *arguments: str) -> Submitted:
    """From the recipe's folder, to which runs and problems are relative."""
    settings = [
        f"run.name={name}",
        "run.output_dir=runs",
        "evaluation.path=problems.jsonl",
        *STEADY,
    ]
    settings += ["evaluation.max_new_tokens=8", "evaluation.judge=exact"]
    # One job after another
    alone = ("--exclusive",) if "--" in arguments else ("--", "--exclusive")
    done = cluster.submit(
        "tiny_test.toml", *(f"--set={text}" for text in settings), *arguments, *alone, cwd=folder
    )
    assert done.returncode == 0, done.stderr
    ids = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("job ")]
    return Submitted(ids, folder / "runs" / name / "slurm" / "1", folder / "runs" / name)


def num_steps(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    return len(read_metrics(metrics)) if metrics.exists() else 0


def log_of(submitted: Submitted) -> str:
    return "\n".join(path.read_text() for path in sorted(submitted.folder.glob("*.out")))


class Interrupted(NamedTuple):
    submitted: Submitted
    state: dict[str, str]  # of the job, once requeued
    marker: dict[str, int]
    first_steps: int
    cancelled: dict[str, str]  # the job, after scancel


@pytest.fixture(scope="module")
def interrupted(cluster: Cluster, folder: Path) -> Interrupted:
    """A run on two nodes without end: it meets its time limit, is requeued, goes on, and is
    cancelled.
    """
    endless = [f"--set={text}" for text in ENDLESS]
    submitted = submit(cluster, folder, "endless", *endless, "--time=2", "--signal-seconds=59")
    (job,), run = submitted.ids, submitted.run
    told = "USR1: telling the ranks"
    wait_until(lambda: num_steps(run) > 5 or told in log_of(submitted), "the first steps", 120)
    # A long step, so that the run to compare with can be short
    cluster.run("scancel", "--signal=STOP", job)
    wait_until(lambda: told in log_of(submitted), "the signal", 90)
    cluster.run("scancel", "--signal=CONT", job)
    wait_until(lambda: cluster.job(job)["Restarts"] == "1", "the job to be requeued", 150)
    cluster.wait_for_state(job, "PENDING", "RUNNING")  # and no longer COMPLETING
    state = cluster.job(job)
    first_steps = num_steps(run)
    marker = json.loads((run / "INTERRUPTED").read_text())
    cluster.start_now(job)
    wait_until(lambda: num_steps(run) >= first_steps + 4, "the job to go on", 150)
    cluster.run("scancel", job)
    cluster.wait_for_state(job, "CANCELLED")
    wait_until(
        lambda: "told to end by TERM" in log_of(submitted), "the end of the batch script", 60
    )
    return Interrupted(submitted, state, marker, first_steps, cluster.job(job))


class Array(NamedTuple):
    submitted: Submitted
    runs: list[Path]
    restarts: list[str]
    evaluation_states: list[str]


@pytest.fixture(scope="module")
def array(cluster: Cluster, folder: Path, interrupted: Interrupted) -> Array:
    """Two runs, as long as the cancelled one, and their evaluation; the second is interrupted and
    requeued.
    """
    size = [
        f"--set=training.max_steps={interrupted.first_steps + 4}",
        "--set=training.checkpoint_every=100000",
    ]
    problems = [{"prompt": f"{n}+2-3", "answer": "0"} for n in range(300)]
    (folder / "many.jsonl").write_text("".join(json.dumps(p) + "\n" for p in problems))
    size += ["--set=evaluation.path=many.jsonl", "--set=evaluation.batch_size=1"]
    submitted = submit(
        cluster, folder, "sweep", *size, "--array-over=keep_fraction=0.5,0.25", "--evaluate"
    )
    runs = [folder / "runs" / f"sweep-keep_fraction={value}" for value in ("0.5", "0.25")]
    train, evaluation = submitted.ids
    wait_until(lambda: num_steps(runs[1]) > 2, "the second run's steps", 300)
    cluster.run("scancel", "--batch", "--signal=USR1", f"{train}_1")
    wait_until(
        lambda: cluster.job(f"{train}_1")["Restarts"] == "1", "the second run to be requeued", 60
    )
    cluster.start_now(f"{train}_1")
    responses = runs[1] / "evaluation"
    wait_until(lambda: any(p.stat().st_size for p in responses.glob("*.partial")), "responses", 200)
    cluster.run("scancel", "--batch", "--signal=USR1", f"{evaluation}_1")
    wait_until(
        lambda: cluster.job(f"{evaluation}_1")["Restarts"] == "1",
        "the evaluation to be requeued",
        60,
    )
    cluster.start_now(f"{evaluation}_1")
    for task in (f"{train}_0", f"{train}_1", f"{evaluation}_0", f"{evaluation}_1"):
        cluster.wait_for_state(task, "COMPLETED", "FAILED", "CANCELLED")
    restarts = [cluster.job(f"{train}_{index}")["Restarts"] for index in range(2)]
    return Array(
        submitted,
        runs,
        restarts,
        [cluster.job(f"{evaluation}_{index}")["JobState"] for index in range(2)],
    )


def test_a_job_that_nears_its_time_limit_saves_and_is_requeued(interrupted: Interrupted):
    assert interrupted.state["JobState"] == "PENDING"
    assert interrupted.marker["step"] == interrupted.first_steps > 0
    log = log_of(interrupted.submitted)
    assert f"interrupted, step {interrupted.first_steps} is saved: requeued" in log
    assert "DUE TO TIME LIMIT" not in log


def test_the_requeued_job_goes_on_with_the_losses_of_an_uninterrupted_run(
    interrupted: Interrupted, array: Array
):
    there, here = (
        read_metrics(run / "metrics.jsonl") for run in (interrupted.submitted.run, array.runs[0])
    )
    compared = [
        [[record[field] for field in COMPARED] for record in records] for records in (there, here)
    ]
    assert len(here) == interrupted.first_steps + 4
    assert compared[0][: len(here)] == compared[1]


def test_a_cancelled_job_saves_and_is_not_requeued_but_may_be_submitted_again(
    cluster: Cluster, folder: Path, interrupted: Interrupted
):
    assert interrupted.cancelled["JobState"] == "CANCELLED"
    assert interrupted.cancelled["Restarts"] == "1"
    run = interrupted.submitted.run
    saved = json.loads((run / "INTERRUPTED").read_text())["step"]
    assert saved > interrupted.first_steps
    assert (run / "checkpoints" / f"step_{saved}" / "manifest.json").exists()
    settings = [
        f"--set={text}" for text in ("run.name=endless", "run.output_dir=runs", *STEADY, *ENDLESS)
    ]
    again = cluster.submit("tiny_test.toml", *settings, "--", "--hold", cwd=folder)
    assert again.returncode == 0, again.stderr
    assert json.loads((run / "slurm.json").read_text())["submission"] == str(run / "slurm" / "2")


@pytest.fixture(scope="module")
def told(cluster: Cluster, folder: Path) -> Submitted:
    """A rank is killed as by ECC or for memory, after a checkpoint; then the job is told to end by
    the command that launch/submit.py prints (scancel alone kills after KillWait).
    """
    endless = [f"--set={text}" for text in ENDLESS]
    settings = [*endless, "--set=training.checkpoint_every=5", "--restarts=1"]
    submitted = submit(cluster, folder, "told", *settings)
    (job,), run = submitted.ids, submitted.run
    wait_until(lambda: num_steps(run) > 6, "the first checkpoint", 120)
    kill_a_rank(job)
    wait_until(lambda: cluster.job(job)["Restarts"] == "1", "the job to be requeued", 60)
    steps = num_steps(run)
    cluster.start_now(job)
    wait_until(lambda: num_steps(run) > steps + 2, "the job to go on", 120)
    cluster.run("scancel", "--batch", "--signal=TERM", job)
    cluster.wait_for_state(job, "FAILED", "COMPLETED", "CANCELLED", "TIMEOUT")
    return submitted


def kill_a_rank(job: str) -> None:
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            variables = process.environ()
            is_rank_1 = (variables.get("SLURM_JOB_ID"), variables.get("SLURM_PROCID")) == (job, "1")
            if is_rank_1 and "launch/train.py" in " ".join(process.cmdline()):
                process.kill()


def test_a_job_told_to_end_has_the_time_that_its_save_takes(cluster: Cluster, told: Submitted):
    (job,), run = told.ids, told.run
    saved = json.loads((run / "INTERRUPTED").read_text())["step"]
    assert (run / "checkpoints" / f"step_{saved}" / "manifest.json").exists()
    assert f"told to end by TERM (scancel, preemption, or a node that failed), step {saved} is" in (
        log_of(told)
    )
    assert cluster.job(job)["Restarts"] == "1", "the TERM requeues nothing"


def test_a_job_whose_rank_was_killed_goes_on_from_its_new_checkpoint(told: Submitted):
    log = log_of(told)
    assert "requeued, since it left a new checkpoint: restart 1 of at most 1" in log
    assert "resuming from" in log


def test_no_file_of_a_job_holds_a_secret_of_whoever_submitted_it(told: Submitted):
    files = [path for path in told.run.rglob("*") if path.is_file()]
    assert any(path.name == "train.sbatch" for path in files)
    for path in files:
        content = path.read_bytes()
        assert not any(secret.encode() in content for secret in SECRETS.values()), path


def test_the_tasks_of_a_job_are_on_two_nodes(interrupted: Interrupted):
    assert "start 2, on 127.0.0.[1-2]" in log_of(interrupted.submitted)


def test_an_array_trains_each_value_and_requeues_one_task_alone(array: Array):
    assert array.restarts == ["0", "1"]
    for run, fraction in zip(array.runs, (0.5, 0.25), strict=True):
        assert (run / "SUCCESS").exists()
        assert (
            json.loads((run / "recipe.json").read_text())["truncation"]["keep_fraction"] == fraction
        )


def test_a_study_is_an_array_whose_cells_the_study_then_finds_done(cluster: Cluster, folder: Path):
    settings = [
        f"--set={text}"
        for text in ("run.output_dir=runs", "training.max_steps=4", "evaluation.judge=exact")
    ]
    settings += ["--set=evaluation.path=problems.jsonl", "--set=evaluation.max_new_tokens=8"]
    study = ["tiny_test.toml", "--keep=0.5,1.0", *settings]
    done = cluster.submit(*study, "--evaluate", "--", "--exclusive", cwd=folder)
    assert done.returncode == 0, done.stderr
    ids = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("job ")]
    for job in ids:
        for task in range(2):
            cluster.wait_for_state(f"{job}_{task}", "COMPLETED", "FAILED", "CANCELLED", timeout=300)
    content = json.loads((folder / "runs" / "studies" / "tiny_test" / "study.json").read_text())
    assert [cell["status"] for cell in content["cells"]] == ["done", "done"]  # by the jobs
    command = [sys.executable, str(ROOT / "launch" / "study.py"), "--recipe", *study]
    done = cluster.run(*command, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads((folder / "runs" / "studies" / "tiny_test" / "study.json").read_text())
    assert [cell["status"] for cell in content["cells"]] == ["done", "done"]
    logs = sorted(
        path.name for path in (folder / "runs" / "studies" / "tiny_test" / "logs").iterdir()
    )
    assert logs == ["student-before.log", "teacher.log"]  # no cell was trained or scored again


def test_evaluation_follows_success(array: Array):
    assert array.evaluation_states == ["COMPLETED", "COMPLETED"]
    for run in array.runs:
        results = json.loads((run / "evaluation" / "export-best.json").read_text())
        assert (results["recipe"], results["num_problems"]) == (run.name, 300)


def test_a_submission_of_a_finished_run_is_refused(cluster: Cluster, folder: Path, array: Array):
    done = cluster.submit(
        "tiny_test.toml",
        "--set=run.output_dir=runs",
        f"--set=run.name={array.runs[0].name}",
        cwd=folder,
    )
    assert done.returncode == 2
    assert "is finished (SUCCESS" in done.stderr


class Failed(NamedTuple):
    submitted: Submitted
    again: subprocess.CompletedProcess[str]  # submitted a second time, with the first in the queue


@pytest.fixture(scope="module")
def failed(cluster: Cluster, folder: Path) -> Failed:
    """One rank fails, in the copy of the code that the job has: it was broken there while the job
    waited.
    """
    submitted = submit(cluster, folder, "broken", "--evaluate", "--", "--hold")
    again = cluster.submit(
        "tiny_test.toml", "--set=run.output_dir=runs", "--set=run.name=broken", cwd=folder
    )
    script = submitted.folder / "code" / "kd" / "training" / "loop.py"
    script.write_text(
        f"import os, sys\nif os.environ['SLURM_PROCID'] == '1': sys.exit(7)\n{script.read_text()}"
    )
    cluster.run("scontrol", "release", submitted.ids[0])
    cluster.wait_for_state(submitted.ids[0], "FAILED", "COMPLETED")
    return Failed(submitted, again)


def test_a_failing_rank_ends_the_job_at_once_and_without_success(cluster: Cluster, failed: Failed):
    state = cluster.job(failed.submitted.ids[0])
    assert (state["JobState"], state["Restarts"]) == ("FAILED", "0")
    assert "there is no SUCCESS; the newest checkpoint is of step 0" in log_of(failed.submitted)


def test_a_run_whose_job_is_in_the_queue_is_not_submitted_again(failed: Failed):
    assert failed.again.returncode == 2
    assert f"its job {failed.submitted.ids[0]} is PENDING" in failed.again.stderr
    assert [path.name for path in failed.submitted.folder.parent.iterdir()] == ["1"]


@pytest.mark.parametrize(
    ("python", "message"),
    [
        ("exit 0", "srun returned status 0, and there is no SUCCESS"),
        (
            'touch "$run/INTERRUPTED"; exit 85',
            "interrupted at step 0, where it began: not requeued",
        ),
    ],
    ids=["nothing done", "never further"],
)
def test_neither_a_status_nor_an_interruption_passes_for_success(
    cluster: Cluster, folder: Path, tmp_path: Path, python: str, message: str
):
    # What --setup puts first in PATH is what the job runs.
    (tmp_path / "python").write_text(f"#!/bin/sh\n{python}\n")
    (tmp_path / "python").chmod(0o755)
    setup = tmp_path / "an environment's setup"
    run = shlex.quote(f"{folder}/runs/{tmp_path.name}")
    setup.write_text(f"export PATH={tmp_path}:$PATH run={run}\necho $NOT_SET\n")
    submitted = submit(cluster, folder, tmp_path.name, f"--setup={setup}")
    cluster.wait_for_state(submitted.ids[0], "FAILED", "COMPLETED", timeout=60)
    state = cluster.job(submitted.ids[0])
    assert (state["JobState"], state["Restarts"]) == ("FAILED", "0")
    assert message in log_of(submitted)


def test_a_refused_submission_leaves_nothing_behind(cluster: Cluster, folder: Path):
    done = cluster.submit(
        "tiny_test.toml",
        "--set=run.output_dir=runs",
        "--set=run.name=refused",
        "--partition=nowhere",
        cwd=folder,
    )
    assert done.returncode == 2
    assert "invalid partition specified: nowhere" in done.stderr
    assert not (folder / "runs" / "refused").exists()


@pytest.mark.parametrize(
    ("gpus", "answer"), [(2, "on nodes 127.0.0.[1-2]"), (3, "configuration is not available")]
)
def test_slurm_grants_the_gpus_that_a_script_asks_for(
    cluster: Cluster, folder: Path, tmp_path: Path, gpus: int, answer: str
):
    arguments = (
        "--nodes=2",
        f"--gpus-per-node={gpus}",
        "--cpus-per-task=2",
        "--set=training.global_batch_size=24",
        "--dry-run",
    )
    done = cluster.submit("tiny_test.toml", *arguments, cwd=folder)
    assert done.returncode == 0, done.stderr
    (tmp_path / "train.sbatch").write_text(done.stdout)
    assert answer in cluster.run("sbatch", "--test-only", str(tmp_path / "train.sbatch")).stderr


def test_evaluation_is_cancelled_when_training_fails(cluster: Cluster, failed: Failed):
    cluster.wait_for_state(failed.submitted.ids[1], "CANCELLED", timeout=60)


def test_a_signal_while_the_environment_is_set_up_is_told(
    cluster: Cluster, folder: Path, tmp_path: Path
):
    setup = tmp_path / "setup"
    setup.write_text("kill -USR1 $$\n")
    submitted = submit(cluster, folder, "early", f"--setup={setup}")
    cluster.wait_for_state(submitted.ids[0], "FAILED", "COMPLETED", timeout=60)
    assert "failed: USR1 came before the job had begun" in log_of(submitted)


def test_of_two_submissions_while_sbatch_takes_its_time_one_is_refused(
    cluster: Cluster, folder: Path, tmp_path: Path
):
    sbatch = shutil.which("sbatch")
    (tmp_path / "sbatch").write_text(f'#!/bin/sh\nsleep 5\nexec {sbatch} "$@"\n')
    (tmp_path / "sbatch").chmod(0o755)
    command = [sys.executable, str(ROOT / "launch" / "submit.py"), "tiny_test.toml", "--nodes=2"]
    command += ["--gpus-per-node=0", "--tasks-per-node=1", "--set=run.output_dir=runs"]
    command += ["--set=run.name=twice", "--", "--hold"]
    path = os.pathsep.join([str(tmp_path), cluster.environment["PATH"]])
    environment = cluster.environment | {"PATH": path}
    both = [
        subprocess.Popen(
            command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=100) for process in both]
    assert sorted(process.returncode for process in both) == [0, 2]
    refused = next(o[1].decode() for p, o in zip(both, outputs, strict=True) if p.returncode)
    assert "is in use by process" in refused or "is PENDING" in refused
    assert [path.name for path in (folder / "runs" / "twice" / "slurm").iterdir()] == ["1"]


def test_a_job_that_cannot_start_is_told_with_slurms_reason(cluster: Cluster, folder: Path):
    arguments = ("--set=run.output_dir=runs", "--set=run.name=closed", "--partition=closed")
    done = cluster.submit("tiny_test.toml", *arguments, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "SLURM cannot start it as requested: PartitionDown" in done.stdout


def test_a_partition_whose_limit_comes_before_the_signal_is_refused(cluster: Cluster, folder: Path):
    arguments = ("--set=run.output_dir=runs", "--set=run.name=short", "--partition=short")
    done = cluster.submit("tiny_test.toml", *arguments, cwd=folder)
    assert done.returncode == 2
    assert (
        "partition short ends a job after 00:05:00, but the signal to save comes 600 s"
        in done.stderr
    )
    shorter = cluster.submit(
        "tiny_test.toml", *arguments, "--signal-seconds=60", "--dry-run", cwd=folder
    )
    assert shorter.returncode == 0, shorter.stderr


def submit_cached_study(cluster: Cluster, folder: Path, *arguments: str) -> tuple[str, str]:
    """Two cells that read a cache: the ids of the job that fills it, and of the cells' array."""
    settings = [f"--set={text}" for text in ("run.output_dir=cached", "training.max_steps=4")]
    study = ["tiny_test.toml", "--keep=0.5,1.0", "--cache", "--cache-dtype=fp32", *settings]
    done = cluster.submit(*study, *arguments, cwd=folder)
    assert done.returncode == 0, done.stderr
    filler, cells = [line.split()[1] for line in done.stdout.splitlines() if line[:4] == "job "]
    return filler, cells


def test_cells_wait_for_the_job_that_fills_their_cache_and_go_with_it(
    cluster: Cluster, folder: Path, tmp_path: Path
):
    (tmp_path / "python").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "python").chmod(0o755)
    setup = tmp_path / "setup"
    setup.write_text(f"export PATH={tmp_path}:$PATH\n")
    study = folder / "cached" / "studies" / "tiny_test"

    filler, cells = submit_cached_study(cluster, folder, f"--setup={setup}")
    cluster.wait_for_state(filler, "FAILED", "COMPLETED", timeout=60)
    cluster.wait_for_state(cells, "CANCELLED", "COMPLETED", "FAILED", timeout=60)
    assert [cluster.job(job)["JobState"] for job in (filler, cells)] == ["FAILED", "CANCELLED"]
    log = (study / "cache" / "slurm" / "1" / f"cache-{filler}.out").read_text()
    assert "srun returned status 1, and there is no filled.json; 0 shards are whole" in log

    filler, cells = submit_cached_study(cluster, folder)
    assert f"afterok:{filler}" in cluster.job(cells)["Dependency"]
    for task in range(2):
        cluster.wait_for_state(f"{cells}_{task}", "COMPLETED", "FAILED", "CANCELLED")
    states = [cluster.job(f"{cells}_{task}")["JobState"] for task in range(2)]
    assert states == ["COMPLETED", "COMPLETED"]
    cache = json.loads((study / "cache" / "filled.json").read_text())
    assert cache["num_rows"] == 80
    for log in (study / "slurm" / "2").glob("train-*.out"):
        text = log.read_text()
        assert "teacher   teacher.cache = " in text
        assert "teacher   loading" not in text
    assert len(list(study.glob("keep*/SUCCESS"))) == 2


def test_a_job_on_two_nodes_writes_the_file_of_one_process(cluster: Cluster, folder: Path):
    problems = [{"id": str(n), "prompt": f"{n}+2-3", "answer": "0"} for n in range(4)]
    path = folder / "to answer.jsonl"
    path.write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    words = ["--num-samples=2", "--temperature=3.0", "--max-new-tokens=12", "--batch-size=2"]
    words += ["--keep=closed", "--set=data.think_open=''"]
    common = ["tiny_test.toml", "--generate=written.jsonl", f"--problems={path.name}"]
    done = cluster.submit(*common, *(f"--generate-arg={word}" for word in words), cwd=folder)
    assert done.returncode == 0, done.stderr
    (job,) = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("job ")]
    cluster.wait_for_state(job, "COMPLETED", "FAILED", "CANCELLED")
    log = folder / "written.jsonl.jobs" / "slurm" / "1" / f"generate-{job}.out"
    assert cluster.job(job)["JobState"] == "COMPLETED", log.read_text()
    assert f"written: {folder / 'written.jsonl'}" in log.read_text()

    arguments = [str(ROOT / "launch" / "generate.py"), "--recipe=tiny_test.toml", *words]
    arguments += [f"--problems={path}", "--output=alone.jsonl"]
    alone = subprocess.run(
        [sys.executable, *arguments], cwd=folder, capture_output=True, text=True, check=False
    )
    assert alone.returncode == 0, alone.stderr
    both = [folder / f"{name}.jsonl.progress" for name in ("written", "alone")]
    batches = [path.read_text().splitlines()[1:] for path in both]
    assert batches[0] == batches[1]
    assert len(batches[0]) == 4
    assert (folder / "written.jsonl").read_bytes() == (folder / "alone.jsonl").read_bytes()
    again = cluster.submit(*common, cwd=folder)
    assert again.returncode == 2
    assert "--generate written.jsonl: it exists already" in again.stderr
