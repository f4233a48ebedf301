"""Problems from a local JSONL file (.gz and .zst too), checked before any model is loaded."""

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerFast

from kd.data.prompt import render_prompt
from kd.data.turns import BadRow
from kd.errors import UserError
from kd.files import parse_json, read_lines
from kd.generation.backends import Request
from kd.hub import find_file
from kd.recipe import DataSection


@dataclass(frozen=True)
class Problem:
    id: str
    prompt: str
    answer: str


def load_problems(
    field: str, value: str, limit: int | None = None, need_answers: bool = True
) -> list[Problem]:
    """The first `limit` problems of {"prompt", "answer", "id"}; id: the row when absent.

    Raises UserError that names the field, the file, the row (from 1) and the column. An answer may
    be a number; without need_answers it may be absent.
    """
    check_limit(limit)
    path = find_file(field, value)
    columns = ("prompt", "answer") if need_answers else ("prompt",)
    where = f"{field} = {value!r}: row"
    problems = []
    for number, line in itertools.islice(read_lines(path), limit):
        row = parse_json(line, f"{where} {number}")
        problems.append(_problem(f"{where} {number}", row, number, columns))
    if not problems:
        raise UserError(f"{field} = {value!r}: it holds no problems")
    _check_ids(f"{field} = {value!r}", problems)
    return problems


def check_limit(limit: int | None) -> None:
    if limit is not None and limit < 1:
        raise UserError(f"--limit = {limit}: write at least 1")


def render_prompts(
    tokenizer: PreTrainedTokenizerFast, problems: Sequence[Problem], data: DataSection
) -> list[str]:
    """The problems as training renders them. Raises UserError that names the problem when the
    template refuses it.
    """
    prompts = []
    for problem in problems:
        try:
            prompts.append(
                render_prompt(tokenizer, [{"role": "user", "content": problem.prompt}], data)
            )
        except BadRow as error:
            raise UserError(f"problem {problem.id!r}: {error}") from None
    return prompts


def make_requests(
    tokenizer: PreTrainedTokenizerFast,
    problems: Sequence[Problem],
    num_samples: int,
    data: DataSection,
) -> list[Request]:
    """num_samples of each problem, one problem after another."""
    return [
        Request(f"{problem.id}/{sample}", prompt)
        for problem, prompt in zip(problems, render_prompts(tokenizer, problems, data), strict=True)
        for sample in range(num_samples)
    ]


def _problem(where: str, row: Any, number: int, columns: Sequence[str]) -> Problem:
    if not isinstance(row, dict):
        raise UserError(f'{where} is not an object: write {{"prompt": ..., "answer": ...}}')
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:  # half of a pair, as "\ud800", which no tokenizer takes
        raise UserError(f"{where} is not valid Unicode: {error}") from None
    for column in columns:
        if not isinstance(row.get(column), str | int | float) or not str(row[column]).strip():
            raise UserError(
                f"{where} has no {column!r}; its columns are {', '.join(row) or 'none'}"
            )
    return Problem(str(row.get("id", number)), str(row["prompt"]), str(row.get("answer", "")))


def _check_ids(where: str, problems: list[Problem]) -> None:
    seen: set[str] = set()
    for problem in problems:
        if problem.id in seen:
            raise UserError(
                f"{where}: id {problem.id!r} is on two rows: make ids unique, or leave them out"
            )
        seen.add(problem.id)
