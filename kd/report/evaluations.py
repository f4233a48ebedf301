"""Evaluations as the report reads them: the run's own student, or a reference beside it."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd.errors import UserError
from kd.report.fields import field, flatten, read_json

# What a reference's file says of it -> how the report calls it.
ROLES = {"teacher": "teacher", "student-before": "student before training"}


@dataclass(frozen=True)
class Evaluation:
    """num_samples responses to each problem; num_correct counts responses."""

    path: Path
    label: str
    model: str
    task: str
    num_problems: int
    num_samples: int
    num_correct: int
    ci95: tuple[float, float]
    mean_response_tokens: float
    unclosed_fraction: float
    settings: dict[str, str]

    @property
    def num_responses(self) -> int:
        return self.num_problems * self.num_samples

    @property
    def accuracy(self) -> float:
        return self.num_correct / self.num_responses


def read_evaluations(folder: Path) -> list[Evaluation]:
    """LABEL.json, and TASK/LABEL.json."""
    paths = [*sorted(folder.glob("*.json")), *sorted(folder.glob("*/*.json"))]
    return [evaluation for path in paths for evaluation in _read_evaluation(path)]


def own_scores(
    evaluations: list[Evaluation], folder: Path, run_name: str
) -> tuple[dict[str, Evaluation], list[str]]:
    """Task -> evaluation of export/best, else of export/last, of most responses; a note where
    others are left out.
    """
    scores: dict[str, Evaluation] = {}
    notes = []
    by_size = sorted(evaluations, key=lambda evaluation: -evaluation.num_responses)
    for export in ("best", "last"):
        for evaluation in by_size:
            if not _is_export(evaluation.model, export, folder, run_name):
                continue
            taken = scores.setdefault(evaluation.task, evaluation)
            if taken is not evaluation and Path(taken.model).name == export:
                notes.append(
                    f"{evaluation.path.name} evaluates what {taken.path.name} does, which is what "
                    "counts"
                )
    return scores, notes


def _is_export(model: str, export: str, folder: Path, run_name: str) -> bool:
    """Also where the run folder has been moved or renamed since."""
    path = Path(model)
    if path.name != export or path.parent.name != "export":
        return False
    return path.parent.parent.name == run_name or path.parent.resolve() == folder / "export"


def role_of(evaluation: Evaluation, recipe: dict[str, Any]) -> str | None:
    if evaluation.label in ROLES:
        return ROLES[evaluation.label]
    models = {
        "teacher": (recipe.get("teacher") or {}).get("model"),
        "student-before": recipe["student"]["model"],
    }
    return next(
        (ROLES[label] for label, model in models.items() if model == evaluation.model), None
    )


def _read_evaluation(path: Path) -> Iterator[Evaluation]:
    """Nothing for a JSON that is no evaluation: one has a label and a model."""
    content = read_json(path)
    if not {"label", "model"} <= content.keys():
        return
    num_problems, num_correct = (
        field(path, content, key) for key in ("num_problems", "num_correct")
    )
    num_samples = content.get("num_samples", 1)
    num_responses = num_problems * num_samples
    if not 0 <= num_correct <= num_responses or num_responses == 0:
        raise UserError(
            f"{path}: num_correct = {num_correct} of {num_responses} responses: evaluate the model "
            "again"
        )
    settings: dict[str, Any] = {
        key: content[key] for key in ("problems", "judge", "backend") if key in content
    }
    settings |= {"num_problems": num_problems, "num_samples": num_samples}
    sampling = {key: value for key, value in content.get("sampling", {}).items() if key != "seed"}
    yield Evaluation(
        path,
        content["label"],
        content["model"],
        content.get("task") or field(path, content, "problems"),
        num_problems,
        num_samples,
        num_correct,
        tuple(field(path, content, "ci95")),
        field(path, content, "mean_response_tokens"),
        field(path, content, "unclosed_fraction"),
        dict(flatten("", {**settings, "sampling": sampling})),
    )
