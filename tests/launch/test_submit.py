"""What launch/submit.py finds before it submits, and the scripts that it writes; tests/slurm runs
them.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import forked
import pytest
from tiny import ROOT, write_tiny_recipe

from kd.cache.cache_records import CachedModel, CachedTokens, CacheManifest
from kd.cache.kinds import HiddenKind, parameters_of
from kd.cluster.sbatch import (
    Job,
    JobRequest,
    cache_script,
    evaluate_script,
    generate_script,
    seconds_of,
    train_script,
)
from kd.cluster.submit import prepare, read_recipes
from kd.engine.ds_config import read_ds_config
from kd.errors import UserError
from kd.recipe import load_recipe

pytestmark = pytest.mark.process

ON_CPUS = ("--gpus-per-node=0", "--tasks-per-node=2")
THREE_GPUS = "--generate-arg=--tensor-parallel=3"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    return write_tiny_recipe(tmp_path_factory.mktemp("submit"), num_rows=30)


def submit(
    recipe: Path | str, *arguments: str, cwd: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    return forked.run([ROOT / "launch" / "submit.py", recipe, *arguments], cwd=cwd, timeout=60)


def assert_refused(done: subprocess.CompletedProcess[str], message: str) -> None:
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count(message) == 1, done.stderr
    assert "Traceback" not in done.stderr


def shell_values(script: str, name: str) -> list[str]:
    """What bash makes of a variable that stands above the first line of train.sbatch itself."""
    prologue = script[: script.index("\nsource --")]
    show = f'{prologue}\nprintf "%s\\0" "${{{name}[@]}}"'
    return subprocess.run(
        ["bash", "-c", show], capture_output=True, text=True, check=True
    ).stdout.split("\0")[:-1]


def test_a_kd_without_a_checkout_submits_nothing_and_says_what_to_do(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("kd.cluster.submit.ROOT", tmp_path)
    (tmp_path / "kd").mkdir()
    folder, recipes = read_recipes(str(recipe), [], None)
    message = f"{tmp_path} has no launch, recipes, ds_configs.* clone the repository"
    with pytest.raises(UserError, match=message):
        prepare(folder, recipes, request=None, evaluate=False)


def test_a_dry_run_prints_both_scripts_of_an_array_and_writes_nothing(recipe, tmp_path):
    folder = tmp_path / "it's $HOME & 50 %j; `x`"
    folder.mkdir()
    (folder / "problems.jsonl").write_text('{"prompt": "1+1", "answer": "2"}\n')
    arguments = (
        "--nodes=2",
        "--gpus-per-node=2",
        "--time=1-0",
        "--evaluate",
        "--array-over=keep_fraction=0.25,1.0",
    )
    settings = ("--set=run.output_dir=my runs", "--set=evaluation.path=problems.jsonl")
    done = submit(recipe, *arguments, *settings, "--dry-run", "--", "--mem=0", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in folder.iterdir()] == ["problems.jsonl"]
    train, evaluate = done.stdout.split("\n\n#!", 1)
    escaped = f"{folder}/my runs/tiny_test/slurm/1".replace("%", "%%")
    for line in (
        '--nodes="2"',
        '--ntasks-per-node="2"',
        '--gpus-per-node="2"',
        '--time="1-0"',
        '--signal="B:USR1@600"',
        '--array="0-1"',
        f'--output="{escaped}/train-%A_%a.out"',
        "--requeue",
        '--open-mode="append"',
        '--mem="0"',
    ):
        assert f"#SBATCH {line}\n" in train
    for line in (
        '--nodes="1"',
        '--ntasks="1"',
        '--gpus-per-node="1"',
        '--array="0-1"',
        '--mem="0"',
    ):
        assert f"#SBATCH {line}\n" in evaluate
    runs = [f"{folder}/my runs/tiny_test-keep_fraction={value}" for value in ("0.25", "1.0")]
    assert shell_values(train, "runs") == runs
    assert shell_values(train, "work_dir") == [str(folder)]
    assert shell_values(train, "recipes") == [
        f"{folder}/my runs/tiny_test/slurm/1/recipe_{i}.json" for i in (0, 1)
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--gpus-per-node=0",),
            "--gpus-per-node 0: a node has a rank per GPU; give --tasks-per-node",
        ),
        (
            ("--gpus-per-node=2", "--tasks-per-node=2"),
            "--gpus-per-node 2: a node has a rank per GPU",
        ),
        ((*ON_CPUS, "--nodes=0"), "--nodes 0: write at least 1"),
        (
            (*ON_CPUS, "--time=11"),
            "--time 11 ends before the signal to save, which comes 600 s (--signal-seconds)",
        ),
        (
            (*ON_CPUS, "--time=soon"),
            "--time soon: write minutes, hours:minutes:seconds or days-hours",
        ),
        ((*ON_CPUS, "--setup=no file"), "--setup no file: no such file"),
        ((*ON_CPUS, "--container=image.sif"), "--container image.sif: no such image"),
        ((*ON_CPUS, "--evaluate"), "neither evaluation.path nor evaluation.tasks is set"),
        ((*ON_CPUS, "--keep=2"), "--keep 2: write a fraction above 0 and at most 1"),
        (
            (*ON_CPUS, "--keep=0.5", "--array-over=seed=1,2"),
            "--array-over seed=1,2 with axes of a study",
        ),
        (
            (*ON_CPUS, "--array-over=keep_fraction"),
            "write FIELD=VALUE,VALUE, such as keep_fraction=0.25,0.5",
        ),
        (
            (*ON_CPUS, "--array-over=keep=0.5"),
            "keep is in no section of a recipe; write section.key",
        ),
        (
            (*ON_CPUS, "--array-over=model=a,b"),
            "model is in teacher and student; write section.key",
        ),
        ((*ON_CPUS, "--array-over=keep_fraction=0.5,2"), "truncation.keep_fraction = 2"),
        ((*ON_CPUS, "--array-over=data.path=a/b,a-b"), "two values would share a run"),
        (
            (*ON_CPUS, "--set=teacher.model=no/such/model"),
            "teacher.model = 'no/such/model': no such file or folder",
        ),
        ((*ON_CPUS, "--set=run.name=a:b"), "a:b' has ':' in it"),
        (
            (*ON_CPUS, "--", "--mem", "0"),
            "'0', after --, is not an option of sbatch: write --name=value",
        ),
        ((*ON_CPUS, "--", "--comment=a\nb"), "an option of sbatch must be one line"),
        (
            (*ON_CPUS, "--cache"),
            "--cache hidden needs a study: add an axis",
        ),
        (
            (*ON_CPUS, "--fill-cache=c", "--keep=0.5"),
            "--fill-cache c with axes of a study",
        ),
        ((*ON_CPUS, "--fill-cache=c", "--evaluate"), "--fill-cache c with --evaluate: "),
        ((*ON_CPUS, "--keep=0.5", "--cache", "--preflight"), "--cache hidden with --preflight, "),
        (
            (*ON_CPUS, "--dtype=fp32"),
            "--cache-dtype fp32 needs a teacher's cache: add --fill-cache",
        ),
        ((*ON_CPUS, "--fill-cache=a:b"), "the cache's folder 'a:b' has ':' in it"),
        (
            (*ON_CPUS, "--fill-cache=/dev/null/c"),
            "the cache's folder '/dev/null/c': /dev/null is not a folder: name another folder",
        ),
        (
            (*ON_CPUS, "--fill-cache=c", "--num-tokens=3"),
            "--num-tokens 3: --kind hidden holds no tokens",
        ),
        (
            (*ON_CPUS, "--fill-cache=c", "--kind=sampled", "--set=loss.divergence=reverse_kl"),
            "the cache c is of kind sampled, which serves only forward_kl",
        ),
        (
            (*ON_CPUS, "--keep=0.5", "--kind=vector"),
            "cache is of kind vector, made with the student's head, but this recipe trains",
        ),
        ((*ON_CPUS, "--generate=t"), "--generate t needs the problems: add --problems FILE"),
        ((*ON_CPUS, "--problems=p"), "--problems p needs launch/generate.py: add --generate FILE"),
        ((*ON_CPUS, "--generate=t", "--problems=/nowhere"), "--problems = '/nowhere'"),
        ((*ON_CPUS, "--generate=t", "--problems=p", "--evaluate"), "--generate t with --evaluate"),
        ((*ON_CPUS, "--generate=t", "--problems=p", "--seeds=2"), "t with an axis of a study"),
        (
            (*ON_CPUS, "--generate=t", "--problems=p", "--generate-arg=4"),
            "--generate-arg 4: write an option",
        ),
        (
            (*ON_CPUS, "--generate=t", "--problems=ONE", "--generate-arg=--num-sample=x"),
            "launch/generate.py says: argument --num-samples: invalid int value: 'x'",
        ),
        (
            (*ON_CPUS, "--generate=t", "--problems=ONE"),
            "WORLD_SIZE = 2, but there are only 1 batches of 16 responses: start fewer ranks",
        ),
        (
            (*ON_CPUS, "--evaluate", "--evaluate-ranks=2", "--set=evaluation.path=ONE"),
            "WORLD_SIZE = 2, but there are only 1 batches of 16 responses: start fewer ranks",
        ),
        (
            (
                "--gpus-per-node=8",
                "--generate=t",
                "--problems=ONE",
                "--generate-arg=--tensor-parallel=3",
            ),
            "--tensor-parallel=3: a rank would have 3 of the 8 GPUs of a node",
        ),
        ((*ON_CPUS, "--evaluate-ranks=1"), "--evaluate-ranks 1 is of an evaluation: add"),
        (
            (*ON_CPUS, "--evaluate", "--evaluate-ranks=3"),
            "--evaluate-ranks 3: an evaluation runs on one node, which has 2 ranks",
        ),
    ],
)
def test_what_cannot_run_is_refused_before_it_waits_in_a_queue(recipe, arguments, message):
    """ONE: a file of one problem."""
    one = recipe.parent / "one.jsonl"
    one.write_text('{"prompt": "1+1", "answer": "2"}\n')
    words = [argument.replace("=ONE", f"={one}") for argument in arguments]
    assert_refused(submit(recipe, *words), message)
    assert not (recipe.parent / "runs").exists()


def test_an_input_that_only_the_repository_has_does_not_reach_a_copy_of_it(recipe, tmp_path):
    assert_refused(
        submit(recipe, *ON_CPUS, "--set=evaluation.path=README.md", cwd=tmp_path),
        f"evaluation.path = 'README.md' is in {ROOT}, but jobs run from a copy",
    )
    assert submit(recipe, *ON_CPUS, "--set=evaluation.path=README.md", "--dry-run").returncode == 0
    # Which are copied
    models = (
        "--set=student.model=recipes/assets/tiny/student_base",
        "--dry-run",
    )
    assert submit(recipe, *ON_CPUS, *models, cwd=tmp_path).returncode == 0


def test_a_run_that_is_finished_or_of_another_recipe_is_refused(recipe, tmp_path):
    settings = (f"--set=run.output_dir={tmp_path}", "--dry-run")
    run = tmp_path / "tiny_test"
    (run / "checkpoints" / "step_10").mkdir(parents=True)
    resolved = load_recipe(str(recipe))
    (run / "recipe.json").write_text(resolved.model_dump_json())
    configs = {role: read_ds_config(resolved, role) for role in ("student", "teacher")}
    (run / "ds_config.json").write_text(json.dumps(configs))
    assert submit(recipe, *ON_CPUS, *settings).returncode == 0
    other = submit(recipe, *ON_CPUS, *settings, "--set=loss.temperature=2.0")
    assert_refused(other, "loss.temperature: 1.0 there, 2.0 here")
    (run / "SUCCESS").write_text("{}")
    assert_refused(submit(recipe, *ON_CPUS, *settings), "is finished (SUCCESS")


def test_the_cells_of_a_study_that_are_not_trained_yet_are_tasks_of_an_array(recipe, tmp_path):
    study = tmp_path / "studies" / "tiny_test"
    trained = study / "keep1_prompt+cot+answer_head_seed0"
    trained.mkdir(parents=True)
    (trained / "SUCCESS").write_text("{}")
    axes = ("--keep=0.5,1.0", "--seeds=2", f"--set=run.output_dir={tmp_path}", "--dry-run")
    done = submit(recipe, *ON_CPUS, *axes)
    assert done.returncode == 0, done.stderr
    assert '#SBATCH --job-name="tiny_test"\n' in done.stdout
    assert '#SBATCH --array="0-2"\n' in done.stdout
    cells = ("keep0.5_prompt+cot+answer_head_seed0", "keep0.5_prompt+cot+answer_head_seed1")
    assert shell_values(done.stdout, "runs") == [
        *(str(study / cell) for cell in cells),
        str(study / "keep1_prompt+cot+answer_head_seed1"),
    ]


def test_a_job_fills_a_cache_in_the_words_of_launch_cache_in_the_place_of_training(
    recipe, tmp_path
):
    words = ("--fill-cache=a cache", "--kind=top_k", "--num-tokens=7", "--time=1-0", "--dry-run")
    done = submit(recipe, *ON_CPUS, *words, "--set=teacher.cache=/nowhere", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []
    for line in ('--job-name="tiny_test-cache"', '--signal="B:USR1@600"', '--time="1-0"'):
        assert f"#SBATCH {line}\n" in done.stdout
    assert f'--output="{tmp_path}/a cache/slurm/1/cache-%j.out"' in done.stdout
    assert shell_values(done.stdout, "runs") == [f"{tmp_path}/a cache"]
    assert shell_values(done.stdout, "script_options") == [
        *("--kind", "top_k", "--dtype", "bf16"),
        *("--num-tokens", "7"),
    ]


def test_a_job_generates_with_the_flags_that_it_is_given(recipe, tmp_path):
    problems = tmp_path / "my problems.jsonl"
    problems.write_text('{"prompt": "1+1", "answer": "2"}\n')
    words = ("--generate=my traces", f"--problems={problems.name}", "--dry-run")
    flags = ("--generate-arg=--num-samples=4", "--generate-arg=--keep=correct")
    flags += ("--generate-arg=--batch-size=1",)
    done = submit(recipe, *ON_CPUS, *words, *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == [problems.name]
    assert '#SBATCH --job-name="my-traces-generate"\n' in done.stdout
    assert shell_values(done.stdout, "runs") == [f"{tmp_path}/my traces.jobs"]
    assert shell_values(done.stdout, "script_options") == [
        *("--problems", str(problems)),
        *("--num-samples=4", "--keep=correct", "--batch-size=1"),
    ]
    shared = ("--gpus-per-node=8", *words, *flags, "--generate-arg=--tensor-parallel=4")
    done = submit(recipe, *shared, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert '#SBATCH --ntasks-per-node="2"\n#SBATCH --gpus-per-node="8"\n' in done.stdout


def test_the_cells_of_a_study_have_a_job_before_them_until_their_cache_is_filled(recipe, tmp_path):
    cache = tmp_path / "studies" / "tiny_test" / "cache"
    arguments = [*ON_CPUS, "--keep=0.5,1.0", f"--set=run.output_dir={tmp_path}", "--dry-run"]
    arguments += ["--cache", "--cache-dtype=fp32"]
    done = submit(recipe, *arguments)
    assert done.returncode == 0, done.stderr
    scripts = done.stdout.split("#!/usr/bin/env bash\n")[1:]
    assert [shell_values(script, "runs")[0] for script in scripts] == [
        str(cache),
        str(cache.parent / "keep0.5_prompt+cot+answer_head_seed0"),
    ]
    assert shell_values(scripts[0], "script_options") == ["--kind", "hidden", "--dtype", "fp32"]
    assert list(tmp_path.iterdir()) == []
    cache.mkdir(parents=True)
    teacher = CachedModel(model="a", weights_sha256="b", hidden_size=1, vocab_size=1)
    manifest = CacheManifest(
        kind="hidden",
        parameters=parameters_of(HiddenKind("fp32")),
        vocab_size=1,
        teacher=teacher,
        tokens=CachedTokens(tokenizer_sha256="c"),
    )
    (cache / "manifest.json").write_text(manifest.model_dump_json())
    (cache / "filled.json").write_text("{}")
    done = submit(recipe, *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("#!/usr/bin/env bash\n") == 1
    assert '#SBATCH --array="0-1"\n' in done.stdout
    done = submit(recipe, *arguments, "--cache-dtype=bf16")
    assert_refused(done, "'fp32', 'group': 32} there, {'dtype': 'bf16', 'group': 32} here")


class End(NamedTuple):
    """What srun does where `more` adds to what is on the disk; what the job says and does then."""

    srun: str
    says: str
    is_requeued: bool = False
    is_success: bool = False


FILLS = {
    "filled": End('touch "$RUN/filled.json"; exit 1', "filled: ", is_success=True),
    "of a signal": End("kill -USR1 $PPID; sleep 1; more", "2 shards are saved: requeued", True),
    "of a signal, and no further": End("kill -USR1 $PPID; sleep 1; exit 85", "not requeued"),
    "of TERM": End("kill -TERM $PPID; sleep 1; more; exit 85", "told to end by TERM"),
    "failed": End("more; exit 1", "left a new shard: restart 1 of at most 3", True),
    "failed, and no further": End("exit 1", "no filled.json; 1 shards are whole"),
    "refused": End("more; exit 2", "srun returned status 2, and there is no filled.json"),
}
# Of a run with one response; a task dies of USR1, which it does not expect
EVALUATIONS = {
    "evaluated": End("more; exit 0", "evaluated: ", is_success=True),
    "of a signal": End("kill -USR1 $PPID; sleep 1; more; exit 138", "2 responses are saved", True),
    "of a signal, and no further": End("kill -USR1 $PPID; sleep 1; exit 138", "not requeued"),
    "of TERM": End("kill -TERM $PPID; sleep 1; exit 138", "told to end by TERM"),
    "failed": End("more; exit 1", "left a new batch: restart 1 of at most 3", True),
    "refused": End("more; exit 2", "srun returned status 2, and there is no score"),
}
# Of an output of which one batch is there, and next to one whose name begins alike
GENERATIONS = {
    "written": End('touch "${RUN%.jobs}"; exit 1', "written: ", is_success=True),
    "of a signal": End("kill -USR1 $PPID; sleep 1; more; exit 138", "2 batches are saved", True),
    "of a signal, and no further": End(
        """kill -USR1 $PPID; sleep 1; echo {} >>"${RUN%.jobs}.v2.0-of-2.progress"; exit 138""",
        "not requeued",
    ),
}


def run_job(folder: Path, run: Path, script: str, end: End, more: str) -> None:
    """Run a job's script, with what its cluster would do, and look at how it ends."""
    programs = folder / "programs"
    programs.mkdir()
    stubs = {
        "srun": f"more() {{ {more}; }}; trap '' USR1; {end.srun}",
        "scontrol": f'if [ "$1" = requeue ]; then touch {folder}/requeued; else echo n; fi',
        "python": "exit 0",
    }
    for name, text in stubs.items():
        (programs / name).write_text(f"#!/bin/bash\n{text}\n")
        (programs / name).chmod(0o755)
    (folder / "code" / "launch").mkdir(parents=True)
    shutil.copytree(ROOT / "launch" / "slurm", folder / "code" / "launch" / "slurm")
    (folder / "code" / "launch" / "nodes.env").touch()
    variables = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n", "RUN": str(run)}
    script = script.replace(f"python_dir={Path(sys.executable).parent}", f"python_dir={programs}")
    done = subprocess.run(
        ["bash", "-c", script],
        env=variables | {"PATH": f"{programs}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert end.says in done.stdout, done.stdout + done.stderr
    assert (done.returncode == 0) == end.is_success
    assert (folder / "requeued").exists() == end.is_requeued


def job_of(folder: Path, run: Path, *options: str) -> Job:
    return Job("a job", folder, (run,), (folder / "recipe.json",), "", options)


@pytest.mark.parametrize("end", FILLS)
def test_a_cache_and_its_shards_decide_how_a_job_that_fills_it_ends(tmp_path, end):
    cache = tmp_path / "a cache"
    (cache / "shards").mkdir(parents=True)
    (cache / "shards" / "0.json").touch()
    (cache / "filled.json").touch()  # of an earlier start: it says nothing of this one
    script = cache_script(job_of(tmp_path, cache, "--kind", "hidden"), JobRequest(1, 0, 2, 60))
    run_job(tmp_path, cache, script, FILLS[end], 'touch "$RUN/shards/1.json"')


@pytest.mark.parametrize("end", EVALUATIONS)
def test_the_responses_on_the_disk_decide_how_a_job_that_evaluates_ends(tmp_path, end):
    run = tmp_path / "a run"
    (run / "evaluation" / "task").mkdir(parents=True)
    (run / "evaluation" / "task" / "m.0123456789ab.0-of-2.partial").write_text("{}\n")
    script = evaluate_script(job_of(tmp_path, run), JobRequest(1, 0, 2, 60, evaluate_ranks=2))
    assert '#SBATCH --ntasks="2"\n' in script
    more = 'echo {} >>"$RUN/evaluation/m.responses.jsonl"; echo {} >"$RUN/evaluation/m.json"'
    run_job(tmp_path, run, script, EVALUATIONS[end], more)


@pytest.mark.parametrize("end", GENERATIONS)
def test_the_batches_on_the_disk_decide_how_a_job_that_generates_ends(tmp_path, end):
    run = tmp_path / "traces.jobs"
    (tmp_path / "traces.0-of-2.progress").write_text("{}\n{}\n")
    (tmp_path / "traces.v2.0-of-2.progress").write_text("{}\n{}\n")
    script = generate_script(job_of(tmp_path, run), JobRequest(1, 0, 2, 60))
    more = 'printf "{}\\n{}\\n" >"${RUN%.jobs}.1-of-2.progress"'
    run_job(tmp_path, run, script, GENERATIONS[end], more)


def test_a_cell_that_is_trained_and_not_scored_is_evaluated_alone(recipe, tmp_path):
    study, problems = tmp_path / "studies" / "tiny_test", tmp_path / "problems.jsonl"
    for keep, marker in ((1, "SUCCESS"), (0.25, "NOTHING_TO_LEARN")):
        cell = study / f"keep{keep}_prompt+cot+answer_head_seed0"
        cell.mkdir(parents=True)
        (cell / marker).write_text("{}")
    arguments = [*ON_CPUS, "--keep=0.25,0.5,1.0", f"--set=run.output_dir={tmp_path}"]
    arguments += [f"--set=evaluation.path={problems}", "--evaluate", "--dry-run"]
    problems.write_text('{"prompt": "1+1", "answer"')
    assert_refused(submit(recipe, *arguments), "evaluation.path = ")
    problems.write_text('{"prompt": "1+1", "answer": "2"}\n')
    done = submit(recipe, *arguments)
    assert done.returncode == 0, done.stderr
    scripts = done.stdout.split("#!/usr/bin/env bash\n")[1:]
    names = [line for s in scripts for line in s.splitlines() if "--job-name" in line]
    assert names == [
        '#SBATCH --job-name="tiny_test"',
        '#SBATCH --job-name="tiny_test-evaluate"',
        '#SBATCH --job-name="tiny_test-evaluate"',
    ]
    half, whole = (str(study / f"keep{k}_prompt+cot+answer_head_seed0") for k in (0.5, 1))
    assert [shell_values(script, "runs") for script in scripts] == [[half], [half], [whole]]


@pytest.mark.parametrize(
    ("argument", "line"),
    [
        ("--srun-arg=--mpi=pmix", "srun_options=(--mpi=pmix)"),
        ("--restarts=7", "restarts=7"),
        ("--cpus-per-task=9", '#SBATCH --cpus-per-task="9"'),
    ],
)
def test_what_srun_and_the_scheduler_are_asked_for(recipe, argument, line):
    done = submit(recipe, *ON_CPUS, argument, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert f"{line}\n" in done.stdout
    assert "cpus-per-task" not in submit(recipe, *ON_CPUS, "--dry-run").stdout
    assert '--cpus-per-task="4"' in submit(recipe, "--gpus-per-node=1", "--dry-run").stdout


def test_what_does_not_fit_is_refused_with_what_would(recipe, tmp_path):
    where = ("--nodes=1", "--gpus-per-node=1", f"--set=run.output_dir={tmp_path}", "--dry-run")
    large = ["qwen3_8b_to_4b_trunc50", *where]
    done = submit(*large, "--gpu=a100-40gb")
    assert_refused(done, "--gpu a100-40gb: ")
    assert "do not fit in 39.4 GiB: use " in done.stderr
    assert submit(*large).returncode == 0
    # The teacher alone fits there, until its micro-batches are too long
    assert submit(*large, "--gpu=a100-40gb", f"--fill-cache={tmp_path}/c").returncode == 0
    budget = "--set=training.max_tokens_per_micro_batch=200000"
    done = submit(*large, "--gpu=a100-40gb", f"--fill-cache={tmp_path}/c", budget)
    assert_refused(done, "--gpu a100-40gb: filling the cache takes 56.9 GiB per GPU")
    assert_refused(
        submit(recipe, "--gpus-per-node=1", "--gpu=abacus", "--dry-run"),
        "--gpu abacus: choose from a100",
    )


def test_without_slurm_nothing_is_left_behind(recipe, tmp_path):
    command = [sys.executable, str(ROOT / "launch" / "submit.py"), str(recipe), *ON_CPUS]
    command += [f"--set=run.output_dir={tmp_path}/runs"]
    done = subprocess.run(
        command, env={"PATH": ""}, capture_output=True, text=True, timeout=60, check=False
    )
    assert_refused(
        done,
        "sbatch is not installed here: submit on a machine with SLURM",
    )
    assert not (tmp_path / "runs" / "tiny_test").exists()


def test_a_container_sees_the_current_directory_and_the_runs(recipe, tmp_path):
    image = tmp_path / "an image.sif"
    image.touch()
    done = submit(
        recipe,
        "--gpus-per-node=4",
        f"--container={image}",
        f"--set=run.output_dir={tmp_path}",
        "--dry-run",
    )
    assert shell_values(done.stdout, "container") == [
        "apptainer",
        "exec",
        "--nv",
        "--bind",
        str(ROOT),
        "--bind",
        str(tmp_path),
        str(image),
    ]


def begin(job: Job, setup: Path, then: str) -> subprocess.CompletedProcess[str]:
    """The script of the second task of an array as far as job.sh, and something after it."""
    script = train_script(job, JobRequest(1, 0, 2, 60, setup=setup))
    beginning = script[: script.index("\nnewest_step()")]
    variables = {
        "SLURM_ARRAY_TASK_ID": "1",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "n",
        "PATH": os.environ["PATH"],
    }
    return subprocess.run(
        ["bash", "-c", f"{beginning}\n{then}"],
        cwd="/",
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("commit", ["abc+", ""], ids=["checkout", "archive"])
def test_a_job_begins_with_its_own_code_recipe_and_environment(tmp_path, commit):
    folder = tmp_path / "it's $HOME"
    (folder / "code" / "launch" / "slurm").mkdir(parents=True)
    shutil.copy(ROOT / "launch" / "slurm" / "job.sh", folder / "code" / "launch" / "slurm")
    (folder / "code" / "launch" / "nodes.env").write_text("NAME=a $(b) 'c'\nLAST=1")
    setup = tmp_path / "set up.sh"
    setup.write_text("export FROM_SETUP=$NOT_SET-yes\n")
    recipes = tuple(folder / f"recipe_{index}.json" for index in range(2))
    job = Job("sweep", folder, (tmp_path / "run a", tmp_path / "run b"), recipes, commit)
    names = ("run", "recipe", "PYTHONPATH", "KD_COMMIT", "NAME", "LAST", "FROM_SETUP", "PWD")
    done = begin(job, setup, then="printf '%s\\0' " + " ".join(f'"${name}"' for name in names))
    assert done.returncode == 0, done.stdout + done.stderr
    code, run = str(folder / "code"), str(tmp_path / "run b")
    values = done.stdout.split("\n", 1)[1].split("\0")[:-1]
    assert values == [
        run,
        str(recipes[1]),
        code,
        commit,
        "a $(b) 'c'",
        "1",
        "-yes",
        str(Path.cwd()),
    ]


@pytest.mark.parametrize(
    ("nodes_env", "setup", "message"),
    [
        ("A=1\nexport B=2\n", "true\n", "failed: launch/nodes.env: export B=2: write KEY=VALUE"),
        ("A=1\n", "module load cuda/13\n", "or its last command, returned status 127"),
    ],
)
def test_a_job_that_cannot_begin_says_why(tmp_path, nodes_env, setup, message):
    launch = tmp_path / "code" / "launch"
    (launch / "slurm").mkdir(parents=True)
    shutil.copy(ROOT / "launch" / "slurm" / "job.sh", launch / "slurm")
    (launch / "nodes.env").write_text(nodes_env)
    (tmp_path / "setup.sh").write_text(setup)
    two = (tmp_path / "a", tmp_path / "b")
    done = begin(Job("sweep", tmp_path, two, two, ""), tmp_path / "setup.sh", then="echo went on")
    assert done.returncode != 0
    assert message in done.stdout
    assert "went on" not in done.stdout


def test_an_array_gives_each_value_a_run_of_its_own(recipe):
    folder, recipes = read_recipes(str(recipe), ["run.name=sweep"], "student.model=org/a,org/b")
    assert folder.name == "sweep"
    assert [(r.run.name, r.student.model) for r in recipes] == [
        ("sweep-model=org-a", "org/a"),
        ("sweep-model=org-b", "org/b"),
    ]


def test_options_of_sbatch_are_quoted_as_sbatch_reads_them():
    request = JobRequest(
        1, 0, 2, 60, constraint='[a&b] "c" \\d', more_options=("--exclusive", "--comment=it's #1")
    )
    job = Job(
        "a name/'$x",
        Path("/runs/a name"),
        (Path("/runs/a"),),
        (Path("/runs/a/recipe.json"),),
        "abc",
    )
    script = train_script(job, request)
    for line in (
        '--constraint="[a&b] \\"c\\" \\\\d"',
        "--exclusive",
        '--comment="it\'s #1"',
        '--job-name="a-name-x"',
    ):
        assert f"#SBATCH {line}\n" in script
    assert "gpus-per-node" not in script


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        ("90", 5400),
        ("1:30", 90),
        ("2:00:05", 7205),
        ("1-2", 93600),
        ("1-2:3", 93780),
        ("1-2:3:4", 93784),
    ],
)
def test_time_limits_are_read_as_slurm_reads_them(time: str, seconds: int):
    assert seconds_of(time) == seconds


def test_a_frozen_recipe_is_the_resolved_one(recipe, tmp_path):
    path = tmp_path / "recipe.json"
    resolved = load_recipe(str(recipe), ["truncation.keep_fraction=0.25"])
    path.write_text(json.dumps(resolved.model_dump(mode="json")))
    assert load_recipe(str(path)) == resolved


def test_a_time_limit_that_is_not_one_says_how_to_write_it():
    with pytest.raises(UserError, match="such as 90 or 24:00:00"):
        seconds_of("1h")
