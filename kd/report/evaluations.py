"""Evaluations as the report reads them: the run's own student, or a reference next to it."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd.files import read_json
from kd.report.fields import REMEDY, flatten
from kd.runs.records import EvaluationRecord, RecordedRecipe, read_record

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


def evaluation_files(folder: Path) -> list[Path]:
    """LABEL.json, and TASK/LABEL.json."""
    return [*sorted(folder.glob("*.json")), *sorted(folder.glob("*/*.json"))]


def read_evaluations(paths: Iterable[Path]) -> list[Evaluation]:
    """Those of the files that are evaluations. Raises UserError for a damaged one."""
    return [evaluation for path in paths for evaluation in _read_evaluation(path)]


def own_scores(
    evaluations: list[Evaluation],
    folder: Path,
    run_name: str,
    exports: Sequence[str] = ("best", "last"),
) -> tuple[dict[str, Evaluation], list[str]]:
    """Task -> evaluation of the first of the exports that has one, of most responses; a note where
    others are left out.
    """
    scores: dict[str, Evaluation] = {}
    notes = []
    by_size = sorted(evaluations, key=lambda evaluation: -evaluation.num_responses)
    for export in exports:
        for evaluation in by_size:
            if not _is_export(evaluation.model, export, folder, run_name):
                continue
            taken = scores.setdefault(evaluation.task, evaluation)
            if taken is not evaluation and Path(taken.model).name == export:
                notes.append(
                    f"{evaluation.path.name} and {taken.path.name} evaluate the same export; only "
                    f"{taken.path.name} counts"
                )
    return scores, notes


def _is_export(model: str, export: str, folder: Path, run_name: str) -> bool:
    """Also where the run folder has been moved or renamed since."""
    path = Path(model)
    if path.name != export or path.parent.name != "export":
        return False
    return path.parent.parent.name == run_name or path.parent.resolve() == folder / "export"


def role_of(evaluation: Evaluation, recipe: RecordedRecipe) -> str | None:
    if evaluation.label in ROLES:
        return ROLES[evaluation.label]
    models = {
        "teacher": recipe.teacher and recipe.teacher.model,
        "student-before": recipe.student.model,
    }
    return next(
        (ROLES[label] for label, model in models.items() if model == evaluation.model), None
    )


def _read_evaluation(path: Path) -> Iterator[Evaluation]:
    """Nothing for a JSON that is no evaluation: one has a label, a model or a count."""
    content = read_json(path)
    if isinstance(content, dict) and not content.keys() & {"label", "model", "num_correct"}:
        return
    found = read_record(path, EvaluationRecord, REMEDY)
    settings: dict[str, Any] = {
        key: content[key] for key in ("problems", "judge", "backend") if key in content
    }
    settings |= {"num_problems": found.num_problems, "num_samples": found.num_samples}
    sampling = {key: value for key, value in found.sampling.items() if key != "seed"}
    yield Evaluation(
        path,
        found.label,
        found.model,
        found.task or found.problems,
        found.num_problems,
        found.num_samples,
        found.num_correct,
        (found.ci95[0], found.ci95[1]),
        found.mean_response_tokens,
        found.unclosed_fraction,
        dict(flatten("", {**settings, "sampling": sampling})),
    )
