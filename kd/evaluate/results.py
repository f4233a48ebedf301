"""What an evaluation leaves: one JSON of results per model, every response next to it, and a table
of all models.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kd.evaluate.problems import Problem
from kd.evaluate.score import Summary, Verdict
from kd.files import read_json, read_json_lines, write_json, write_jsonl
from kd.generation.backends import Subject
from kd.generation.sampling import Response
from kd.recipe import Recipe
from kd.runs.environment import environment
from kd.runs.records import EvaluationRecord, ResponseRecord, read_record, to_record

HEADER = ("model", "accuracy", "95 % interval", "problems", "tokens", "unclosed")
REPLACED = "replaced"
REMEDY = "restore it, or remove it and evaluate the model again"


def results(
    recipe: Recipe,
    subject: Subject,
    summary: Summary,
    *,
    task: str | None,
    problems: str,
    judge: str,
    backend: str,
    fingerprint: str,
    judging_sha256: str | None = None,
) -> dict[str, Any]:
    """The content of results JSON: the summary's fields, and all that repeats it.

    task: None for the problems of evaluation.path. problems: that path or a hub id. backend: with
        its version.
    fingerprint: of all that the responses depend on; judging_sha256: of what verdicts do beyond.
    """
    return {
        "label": subject.label,
        "model": subject.section.model,
        "recipe": recipe.run.name,
        "task": task,
        "problems": problems,
        "judge": judge,
        "judging_sha256": judging_sha256,
        **asdict(summary),
        "sampling": asdict(subject.sampling),
        "backend": backend,
        "fingerprint": fingerprint,
        "command": " ".join(sys.argv),
        "environment": environment(),
    }


def response_rows(
    problems: Sequence[Problem], responses: Sequence[Response], verdicts: Sequence[Verdict]
) -> list[dict[str, Any]]:
    """One row per response, the samples of a problem one after another."""
    num_samples = len(responses) // len(problems)
    return [
        {
            "id": problems[index // num_samples].id,
            "sample": index % num_samples,
            "prompt": problems[index // num_samples].prompt,
            "expected": problems[index // num_samples].answer,
            **vars(verdict),
            "ended": response.ended,
            "num_tokens": response.num_tokens,
            "response": response.text,
        }
        for index, (response, verdict) in enumerate(zip(responses, verdicts, strict=True))
    ]


def write_evaluation(folder: Path, content: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    """folder/LABEL.responses.jsonl, then folder/LABEL.json; what another evaluation wrote there
    goes to replaced/.
    """
    label = content["label"]
    _set_aside(folder, label, content["fingerprint"])
    write_jsonl(folder / f"{label}.responses.jsonl", rows)
    write_json(folder / f"{label}.json", content)


def read_responses(folder: Path, label: str, fingerprint: str) -> list[Response] | None:
    """The responses of a finished evaluation with this fingerprint, or None."""
    for place in (folder, folder / REPLACED / fingerprint):
        path = place / f"{label}.responses.jsonl"
        if _fingerprint_of(place / f"{label}.json") == fingerprint and path.exists():
            rows = [
                to_record(row, ResponseRecord, f"{path}: line {number}", REMEDY)
                for number, row in read_json_lines(path)
            ]
            return [Response(row.response, row.num_tokens, row.ended) for row in rows]
    return None


def read_content(
    folder: Path, label: str, fingerprint: str, judging_sha256: str
) -> dict[str, Any] | None:
    """What results() returned when these responses were judged so, by the same commit; or None."""
    path = folder / f"{label}.json"
    found = read_results(path)
    if found is None or (found.fingerprint, found.judging_sha256) != (fingerprint, judging_sha256):
        return None
    content: dict[str, Any] = read_json(path)
    return content if content["environment"] == environment() else None


def read_results(path: Path) -> EvaluationRecord | None:
    """The results in LABEL.json, None where there is none. Raises UserError for a damaged file."""
    return read_record(path, EvaluationRecord, REMEDY) if os.path.lexists(path) else None


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A plain table, one line per results JSON: fractions, and mean tokens of a response.

    With a task or several samples of a problem there are columns for them: samples, and
    pass@samples.
    """
    sampled = any(row["task"] is not None or row["num_samples"] > 1 for row in rows)
    header = (*HEADER, "task", "samples", "pass@") if sampled else HEADER
    cells = [
        header,
        *((*_cells(row), *_sample_cells(row)) if sampled else _cells(row) for row in rows),
    ]
    widths = [max(len(line[column]) for line in cells) for column in range(len(header))]
    lines = [
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
        for line in cells
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    low, high = row["ci95"]
    return (
        row["label"],
        f"{row['accuracy']:.3f}",
        f"{low:.3f}-{high:.3f}",
        str(row["num_problems"]),
        f"{row['mean_response_tokens']:.1f}",
        f"{row['unclosed_fraction']:.3f}",
    )


def _sample_cells(row: dict[str, Any]) -> tuple[str, ...]:
    num_samples = str(row["num_samples"])
    return row["task"] or "-", num_samples, f"{row['pass_at_k'][num_samples]:.3f}"


def _set_aside(folder: Path, label: str, fingerprint: str) -> None:
    found = _fingerprint_of(folder / f"{label}.json")
    if found in (None, fingerprint):
        return
    replaced = folder / REPLACED / found
    replaced.mkdir(parents=True, exist_ok=True)
    # Results last: without them nobody would know what the responses are of
    for name in (f"{label}.responses.jsonl", f"{label}.json"):
        if (folder / name).exists():
            os.replace(folder / name, replaced / name)
    print(
        f"{label}: the results of an earlier evaluation with other settings are now in {replaced}"
    )


def _fingerprint_of(path: Path) -> str | None:
    """None when there is no such file; "unknown" where results have none."""
    found = read_results(path)
    return found.fingerprint if found else None
