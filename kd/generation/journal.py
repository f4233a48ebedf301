"""A file of traces that grows batch by batch: after a crash it continues as if nothing happened.

Rows are appended to OUTPUT.partial, which becomes OUTPUT when all batches are done: a file that
exists is whole. OUTPUT.progress is the journal: its first line holds the settings, each further
line one finished batch and the size of the rows file after it. What a crash left behind the last
journal line is cut, so no row is torn or written twice.
"""

import json
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError

from kd.data.thought import split_thought
from kd.errors import UserError
from kd.files import parse_json, read_json_lines
from kd.generation.sampling import Response
from kd.recipe import DataSection, default_of

# What the settings of an earlier version lack, where no key of a recipe says it
BEFORE = {"backend": "transformers", "num_samples": 1}


class FinishedBatch(BaseModel):
    """num_bytes: of the rows file after it. counts: its responses by fate."""

    model_config = ConfigDict(strict=True, frozen=True)
    num_bytes: NonNegativeInt
    counts: dict[str, NonNegativeInt]


class TraceFile:
    """batches: finished ones. counts: responses by fate ("kept" or why it was dropped).
    complete: nothing to do.

    Raises UserError when the file exists without a journal, or the journal holds other settings.
    """

    def __init__(self, output: Path, settings: dict[str, Any]) -> None:
        self.output = output
        self.partial = output.with_name(output.name + ".partial")
        self.journal = output.with_name(output.name + ".progress")
        entries = self._read_journal()
        if len(entries) < 2:  # no batch was finished: whatever was begun, begin anew
            if output.exists():
                raise UserError(
                    f"--output {output} exists already; choose another file, or remove it"
                )
            output.parent.mkdir(parents=True, exist_ok=True)
            self.partial.write_bytes(b"")
            self.journal.write_bytes(b"")
            _append(self.journal, [settings])
        else:
            self._check_settings(entries[0], settings)
        self.complete = output.exists()
        self.batches = [
            self._batch(number, entry) for number, entry in enumerate(entries[1:], start=2)
        ]
        self.counts = sum((Counter(batch.counts) for batch in self.batches), Counter[str]())
        if self.batches and not self.complete:
            self._cut_rows(self.batches[-1].num_bytes)

    def append(self, rows: Iterable[dict[str, Any]], counts: Counter[str]) -> None:
        """Add one batch; it is on disk when this returns."""
        num_bytes = _append(self.partial, rows)
        batch = FinishedBatch(num_bytes=num_bytes, counts=counts)
        _append(self.journal, [batch.model_dump()])
        self.batches.append(batch)
        self.counts.update(counts)

    @property
    def num_batches(self) -> int:
        return len(self.batches)

    def finish(self) -> None:
        os.replace(self.partial, self.output)
        self.complete = True

    def rows(self) -> list[dict[str, Any]]:
        """The rows of the finished batches."""
        return [row for _, row in read_json_lines(self.output if self.complete else self.partial)]

    def _read_journal(self) -> list[Any]:
        """The whole lines of the journal; a torn last line is cut from the file."""
        if not self.journal.exists():
            return []
        content = self.journal.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        os.truncate(self.journal, len(whole))
        try:
            return [
                parse_json(line, f"{self.journal}: line {number}", strict=True)
                for number, line in enumerate(whole.splitlines(), start=1)
            ]
        except UserError as error:
            raise UserError(f"{error}: {self._remedy()}") from None

    def _batch(self, number: int, entry: Any) -> FinishedBatch:
        try:
            return FinishedBatch.model_validate(entry)
        except ValidationError as error:
            problem = error.errors()[0]
            field = ".".join(map(str, problem["loc"]))
            raise UserError(
                f"{self.journal}: line {number}: {field} = {problem['input']!r}: "
                f"{problem['msg']}: {self._remedy()}"
            ) from None

    def _remedy(self) -> str:
        return f"restore it, or remove it and {self.partial} to start over"

    def _check_settings(self, found: Any, settings: dict[str, Any]) -> None:
        if not isinstance(found, dict):
            raise UserError(f"{self.journal}: line 1 holds no settings: {self._remedy()}")
        # What the settings of an earlier version lack was as a recipe without that key has it
        before = {key: default_of(f"data.{key}") for key in settings} | BEFORE | found
        changed = [key for key in settings if before[key] != settings[key]]
        if changed:
            details = "\n".join(
                f"  {key}: {before[key]!r} before, {settings[key]!r} now" for key in changed
            )
            raise UserError(
                f"--output {self.output} was begun with other settings:\n"
                f"{details}\n"
                f"Use those settings again, choose another --output, or remove {self.journal}, "
                f"{self.partial} and {self.output}"
            )

    def _cut_rows(self, num_bytes: int) -> None:
        if not self.partial.exists() or self.partial.stat().st_size < num_bytes:
            raise UserError(
                f"{self.partial} is shorter than {self.journal} says; remove both to start over"
            )
        os.truncate(self.partial, num_bytes)


def split_response(response: Response, data: DataSection, keep: str) -> tuple[str, str] | str:
    """(reasoning, answer), or why not: "unclosed", "reopened", "no answer", "unended".

    A response may begin with the marker that opens the thought or, when the chat template wrote it,
    behind it. keep: "closed" keeps an answer that max_new_tokens cut off; else it is dropped.
    """
    parts = split_thought(response.text, data.think_open.strip(), data.think_close.strip())
    if isinstance(parts, str):
        return "unclosed" if parts == "unclosed" else "reopened"
    reasoning, answer = (part.strip() for part in parts)
    answer = (
        answer.removeprefix(data.answer_open.strip())
        .removesuffix(data.answer_close.strip())
        .strip()
    )
    if not answer or not reasoning:
        return "no answer"
    return "unended" if keep != "closed" and not response.ended else (reasoning, answer)


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """A file of JSON lines in the place of another, as _append writes them, whole or not at all."""
    aside = path.with_name(path.name + ".new")
    aside.write_bytes(b"")
    _append(aside, rows)
    os.replace(aside, path)


def _append(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Append rows as JSON lines, through to the disk. Returns the size of the file in bytes."""
    with path.open("ab") as file:
        file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
        file.flush()
        os.fsync(file.fileno())
        return file.tell()
