"""Typed records of the files of a run or a study. A damaged file is one error that names the file,
the field and the value.

Unknown keys are kept, since a later version may have written them.
"""

import os
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from kd.constants import FORMAT_VERSION
from kd.errors import UserError
from kd.files import parse_json, read_json, read_text
from kd.names import shortened
from kd.recipe import SectionName, check_format_version

# Sums over a run stay finite, and counts are exact as floats.
Number = Annotated[float, Field(ge=-1e100, le=1e100)]
Amount = Annotated[float, Field(ge=0.0, le=1e100)]
Count = Annotated[int, Field(ge=0, le=2**53)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Text = Annotated[str, Field(min_length=1)]


class Record(BaseModel):
    """Strict: no text or bool is taken for a number, and no number is infinite or NaN."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False, strict=True)

    def as_read(self) -> dict[str, Any]:
        """The content of the file, unknown keys among it, and no defaults."""
        return self.model_dump(exclude_unset=True)


class RecordedRun(Record):
    name: Text
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)]


class RecordedModel(Record):
    """cache: of a teacher."""

    model: Text
    cache: str | None = None


class RecordedLora(Record):
    rank: Count
    alpha: Amount


class RecordedStudent(RecordedModel):
    lora: RecordedLora | None = None


class RecordedRollout(Record):
    fraction: Share
    source: Text
    max_new_tokens: Count


class RecordedSource(Record):
    source: Text
    path: str | None = None


class RecordedData(RecordedSource):
    sources: list[RecordedSource] = Field(default_factory=list)
    loss_sections: Annotated[list[SectionName], Field(min_length=1)]


class RecordedTruncation(Record):
    keep_fraction: Annotated[float, Field(gt=0.0, le=1.0)]
    max_tokens: Count | None = None
    window: str = "head"
    window_context: str = "drop"


class RecordedRecipe(Record):
    """recipe.json, of this version or an earlier one; further sections are objects or null."""

    __pydantic_extra__: dict[str, dict[str, Any] | None]
    format_version: int = 1
    run: RecordedRun
    teacher: RecordedModel | None = None
    student: RecordedStudent
    data: RecordedData
    truncation: RecordedTruncation
    rollout: RecordedRollout | None = None


class RecordedEngines(Record):
    """ds_config.json."""

    student: dict[str, Any]
    teacher: dict[str, Any] | None = None


class DataRecord(Record):
    """data.json."""

    format_version: int = 1
    fingerprint: Text
    report: str


FILLED = "filled.json"


class FilledRecord(Record):
    """FILLED of a teacher's cache: while it is there, the cache held all rows of the recipe
    that filled it last.

    rank_seconds: summed over ranks. flops: one pass over every row that is there; None where the
    teacher's shapes are not known.
    """

    num_rows: Count
    num_tokens: Count
    bytes: Count
    rank_seconds: Amount
    flops: Amount | None = None


class EnvironmentRecord(Record):
    """environment.json."""

    packages: dict[str, str | None] = Field(default_factory=dict)


class SuccessRecord(Record):
    """SUCCESS. best_step: None where no validation was saved."""

    best_step: Count | None = None


class PositionPart(Record):
    forward_kl: Number | None = None


class DiagnosticsRecord(Record):
    """by_position: parts of the whole trace; None where no token is supervised."""

    by_position: Annotated[list[PositionPart | None], Field(min_length=1)]


class StepRecord(Record):
    """A line of metrics.jsonl. loss: None where it was not finite."""

    step: Annotated[int, Field(ge=1, le=2**53)]
    loss: Number | None
    step_ms: Amount
    peak_memory_gib: Amount
    num_input_tokens: Amount
    num_supervised_tokens: Amount
    flops: Amount | None = None
    flops_spared: Amount | None = None
    flops_of_sampling: Amount | None = None
    val_loss: Number | None = None
    diagnostics: DiagnosticsRecord | None = None
    val_diagnostics: DiagnosticsRecord | None = None


class EvaluationRecord(Record):
    """LABEL.json of an evaluation: num_samples responses to each problem, num_correct of them
    right.
    """

    label: Text
    model: Text
    task: str | None = None
    problems: Text
    judge: str | None = None
    judging_sha256: str | None = None
    backend: str | None = None
    fingerprint: str = "unknown"
    accuracy: Share
    ci95: Annotated[list[Share], Field(min_length=2, max_length=2)]
    num_problems: Annotated[int, Field(ge=1, le=2**53)]
    num_samples: Annotated[int, Field(ge=1, le=2**53)] = 1
    num_correct: Count
    mean_response_tokens: Amount
    unclosed_fraction: Share
    # None where another program says nothing of it
    sampling: dict[str, int | float | str | bool | None] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _numbers_agree(self) -> Self:
        num_responses = self.num_problems * self.num_samples
        if self.num_correct > num_responses:
            raise ValueError(
                f"num_correct = {self.num_correct}, but there are {num_responses} responses"
            )
        share, (low, high) = self.num_correct / num_responses, self.ci95
        if abs(self.accuracy - share) > 1e-6:
            raise ValueError(
                f"accuracy = {self.accuracy}, but num_correct = {self.num_correct} of "
                f"{num_responses} responses"
            )
        # What a report computes from the interval of several samples needs it to be proper.
        is_proper = 0.0 < low < share if share else 0.0 < high < 1.0
        if low > high or (self.num_samples > 1 and not is_proper):
            raise ValueError(f"ci95 = {self.ci95} is not an interval around {share}")
        return self


class ResponseRecord(Record):
    """A line of LABEL.responses.jsonl."""

    response: str
    num_tokens: Count
    ended: bool


class CellRecord(Record):
    name: Text
    axes: dict[str, str | int | float] = Field(default_factory=dict)
    status: Text
    text: str = ""


class StudyRecord(Record):
    """study.json."""

    cells: list[CellRecord]


R = TypeVar("R", bound=Record)


def read_record(path: Path, kind: type[R], remedy: str) -> R:
    """The content of a JSON file. Raises UserError that names the file, the field, its value and
    the remedy; also where there is no such file.
    """
    try:
        content = read_json(path)
    except UserError as error:
        raise UserError(f"{error}: {remedy}") from None
    if isinstance(content, dict):
        check_format_version(path, content)
    return to_record(content, kind, str(path), remedy)


def to_record(content: Any, kind: type[R], where: str, remedy: str) -> R:
    """Raises UserError that begins with `where` and names the field and its value."""
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(map(str, problem["loc"]))
        if problem["type"] == "missing":
            what = f"{field} is missing"
        elif not isinstance(content, dict):
            what = f"it holds {shortened(content)}, not an object"
        else:
            message = problem["msg"].removeprefix("Value error, ")
            shown = f"{field} = {shortened(problem['input'])}: " if field else ""
            what = f"{shown}{message}"
        raise UserError(f"{where}: {what}: {remedy}") from None


def read_steps(path: Path) -> list[StepRecord]:
    """The records of a metrics.jsonl, typed. Raises UserError as read_metrics does."""
    return [step for _, step in _lines(path)]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl as they are, to be written again; none where there is none. A
    last line torn by a crash is left out, and records of version 1 are given today's names.

    Raises UserError for a line that is not JSON or no record of a step, and for a version that is
    not known here.
    """
    return [record for record, _ in _lines(path)]


def _lines(path: Path) -> list[tuple[dict[str, Any], StepRecord]]:
    if not os.path.lexists(path):
        return []
    found = []
    remedy = "restore it, or leave the run out"
    for number, line in enumerate(read_text(path).split("\n")[:-1], start=1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        try:
            record = parse_json(line, where, strict=True)
        except UserError as error:
            raise UserError(f"{error}: {remedy}") from None
        if isinstance(record, dict):
            check_format_version(path, record)
            record = _upgraded(record)
        found.append((record, to_record(record, StepRecord, where, remedy)))
    return found


def _upgraded(record: dict[str, Any]) -> dict[str, Any]:
    """Version 1 says num_tokens for num_supervised_tokens, of a step and of parts of it."""
    if "format_version" in record:
        return record
    names = {"num_tokens": "num_supervised_tokens"}
    return {"format_version": FORMAT_VERSION, **_renamed(record, names)}


def _renamed(value: Any, names: dict[str, str]) -> Any:
    """Keys renamed at any depth."""
    if isinstance(value, dict):
        return {names.get(key, key): _renamed(part, names) for key, part in value.items()}
    if isinstance(value, list):
        return [_renamed(part, names) for part in value]
    return value
