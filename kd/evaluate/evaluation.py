"""One model on one set of problems: responses, verdicts, and the two files that keep them."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd.errors import UserError
from kd.evaluate.problems import Problem, load_problems, make_requests
from kd.evaluate.results import (
    read_content,
    read_responses,
    read_results,
    response_rows,
    results,
    write_evaluation,
)
from kd.evaluate.score import score
from kd.evaluate.tasks import TASKS, load_task, parse_tasks
from kd.generation.backends import Backend, Request, Subject, batch_size_of
from kd.generation.generator import weights_sha256
from kd.generation.responses import fingerprint, in_order, open_progress, respond
from kd.generation.sampling import Response, sampling_of
from kd.generation.shares import check_num_batches, join_shares, remove_shares, share_name
from kd.recipe import EvaluationSection, Recipe
from kd.runs.lock import hold, holding
from kd.runs.records import EvaluationRecord

# How long a rank waits while another one judges: some answers take math-verify to its time limit
JUDGING_SECONDS = 3600.0


@dataclass(frozen=True)
class ProblemSet:
    """task: its name, or None for the local file. source: that file or the hub dataset.
    num_samples: per problem.
    """

    task: str | None
    source: str
    problems: list[Problem]
    num_samples: int


def local_problems(
    evaluation: EvaluationSection, num_samples: int | None, limit: int | None
) -> ProblemSet:
    """The problems of evaluation.path, each answered once unless num_samples says otherwise."""
    assert evaluation.path is not None
    problems = load_problems("evaluation.path", evaluation.path, limit)
    return ProblemSet(None, evaluation.path, problems, num_samples or 1)


def task_problems(
    tasks: Iterable[str], evaluation: EvaluationSection, num_samples: int | None, limit: int | None
) -> list[ProblemSet]:
    """tasks: names from TASKS. num_samples: the task's own when None, and 1 where all is greedy."""
    sets = []
    for name in parse_tasks(tasks):
        usual = TASKS[name].num_samples if evaluation.temperature else 1
        sets.append(
            ProblemSet(name, TASKS[name].hub_id, load_task(name, limit), num_samples or usual)
        )
    return sets


def result_files(recipe: Recipe, folder: Path, label: str) -> list[Path]:
    """Where launch/evaluate.py leaves a model's results on all that the recipe names."""
    local = [folder] if recipe.evaluation.path is not None else []
    tasks = parse_tasks(recipe.evaluation.tasks) if recipe.evaluation.tasks else []
    return [place / f"{label}.json" for place in (*local, *(folder / task for task in tasks))]


def is_scored(recipe: Recipe, files: Sequence[Path]) -> bool:
    """Whether these results are there, of the recipe's present [evaluation], problems and seed 0.
    Raises UserError for a damaged file.
    """
    sampling = vars(sampling_of(recipe.evaluation, seed=0))
    for file in files:
        found = read_results(file)
        if found is None:
            return False
        task = TASKS.get(found.task) if found.task else None
        source = task.hub_id if task else recipe.evaluation.path
        expected = (recipe.evaluation.judge, sampling, source)
        if (found.judge, found.sampling, found.problems) != expected:
            return False
        if task is None and not _is_judged_so(found, recipe):
            return False
    return True


def check_ranks(
    recipe: Recipe, backend: Backend, sets: Iterable[ProblemSet], num_ranks: int
) -> None:
    """Raises UserError where a rank would have no batch of one of the sets."""
    for found in sets:
        num_requests = len(found.problems) * found.num_samples
        size = batch_size_of(backend, recipe.evaluation, num_requests, num_ranks)
        check_num_batches(num_ranks, num_requests, size, "set a lower evaluation.batch_size")


def evaluate(
    recipe: Recipe,
    subject: Subject,
    problem_set: ProblemSet,
    output: Path,
    rank: int = 0,
    num_ranks: int = 1,
) -> dict[str, Any] | None:
    """Generate what is missing, judge, write LABEL.json and its responses; returns results.

    They are written to output, and those of a task to output/TASK. Of several ranks, which never
    meet, each generates a share of the batches, and the last to finish judges and writes; None on
    the others. Called again, it returns the results once they are there.
    """
    problems, folder = problem_set.problems, output / (problem_set.task or "")
    requests = make_requests(subject.tokenizer, problems, problem_set.num_samples, recipe.data)
    batch_size = batch_size_of(subject.backend, recipe.evaluation, len(requests), num_ranks)
    settings = settings_of(subject, requests, batch_size)
    label, key = subject.label, fingerprint(settings)
    judging = judging_sha256(problems, recipe.evaluation.judge, recipe.data.think_close)
    shares, lock = folder / f"{label}.{key}", f".{label}.lock"
    hold(folder, f".{share_name(label, rank, num_ranks)}.lock")
    share = None
    with holding(folder, lock, JUDGING_SECONDS):  # no other rank joins meanwhile
        responses = read_responses(folder, label, key)
        if responses is None:
            share = open_progress(shares, settings, rank, num_ranks)
    if share is not None:
        respond(requests, batch_size, subject.load, share, rank, num_ranks)

    with holding(folder, lock, JUDGING_SECONDS):
        done = read_content(folder, label, key, judging) if num_ranks > 1 else None
        if done is not None:
            remove_shares(shares)  # of a rank that was killed when it had written
            return done
        if responses is None:  # others may have joined and written them since
            responses = read_responses(folder, label, key)
        if responses is None:
            whole = join_shares(shares, settings, num_ranks)
            if whole is None:
                return None
            responses = in_order(whole)
        facts = {"judging_sha256": judging, "backend": settings["backend"], "fingerprint": key}
        content, rows = _judge(recipe, subject, problem_set, responses, facts)
        write_evaluation(folder, content, rows)
        remove_shares(shares)
    return content


def _judge(
    recipe: Recipe,
    subject: Subject,
    problem_set: ProblemSet,
    responses: Sequence[Response],
    facts: dict[str, str],
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The content of LABEL.json, and the rows of its responses. facts: for the first."""
    problems, evaluation = problem_set.problems, recipe.evaluation
    answers = [problem.answer for problem in problems]
    verdicts, summary = score(responses, answers, evaluation, recipe.data.think_close)
    content = results(
        recipe,
        subject,
        summary,
        task=problem_set.task,
        problems=problem_set.source,
        judge=evaluation.judge,
        **facts,
    )
    return content, response_rows(problems, responses, verdicts)


def _is_judged_so(found: EvaluationRecord, recipe: Recipe) -> bool:
    """Results on a file that is gone, or can no longer be read, are taken as they are."""
    assert recipe.evaluation.path is not None
    try:
        problems = load_problems("evaluation.path", recipe.evaluation.path)
    except UserError:
        return True
    think_close = recipe.data.think_close
    return found.judging_sha256 == judging_sha256(problems, recipe.evaluation.judge, think_close)


def judging_sha256(problems: Sequence[Problem], judge: str, think_close: str) -> str:
    """Of all that verdicts depend on, beyond the responses and the code."""
    facts = [judge, think_close.strip(), [problem.answer for problem in problems]]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def settings_of(subject: Subject, requests: Sequence[Request], batch_size: int) -> dict[str, Any]:
    """All that responses depend on: template, system prompt and instruction are in the requests, as
    rendered.
    """
    digest = hashlib.sha256()
    for request in requests:
        digest.update(f"{request.key}\t{request.prompt}\n".encode())
    return {
        "model": subject.section.model,
        "revision": subject.section.revision,
        "weights_sha256": weights_sha256(subject.section.model),
        "end_token": subject.tokenizer.eos_token,
        "num_requests": len(requests),
        "requests_sha256": digest.hexdigest(),
        **vars(subject.sampling),
        "backend": str(subject.backend),
        "batch_size": batch_size,
    }
