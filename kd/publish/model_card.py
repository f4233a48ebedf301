"""The model card of a finished run: its models and data, scores, cost, and how to train it again.
Everything except the licence is read from the run's folder.
"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from huggingface_hub import ModelCard, ModelCardData

from kd.data.sources import SOURCES
from kd.errors import UserError
from kd.recipe import find_input, is_hub_id
from kd.report.evaluations import (
    Evaluation,
    evaluation_files,
    own_scores,
    read_evaluations,
)
from kd.report.fields import REMEDY
from kd.report.read_runs import NOT_RECORDED, Run, read_runs
from kd.report.render import escape_markdown
from kd.report.report_tables import COSTS, told_costs
from kd.runs.records import (
    DataRecord,
    EnvironmentRecord,
    RecordedModel,
    RecordedRecipe,
    RecordedSource,
    SuccessRecord,
    read_record,
)

TEMPLATE = Path(__file__).with_name("templates") / "model_card.md.j2"


class FinishedRun(NamedTuple):
    run: Run
    recipe: RecordedRecipe
    environment: dict[str, Any]
    data_report: str
    best_step: int | None

    @property
    def base(self) -> RecordedModel | None:
        """None where the student began with random weights."""
        student = self.recipe.student
        return None if student.as_read().get("init") == "random" else student


def read_finished(folder: Path) -> FinishedRun:
    """Raises UserError for a folder that holds no run or several, a damaged file, and a run that is
    not finished.
    """
    found = read_runs([folder])
    for damaged in found.damaged:
        raise UserError(damaged.reason)
    if len(found.runs) != 1:
        raise UserError(f"RUN = {str(folder)!r} holds {len(found.runs)} runs: name one of them")
    run = found.runs[0]
    if not run.is_finished:
        raise UserError(
            f"RUN = {str(folder)!r}: {run.state}: only a finished run can be exported; finish it "
            "with launch/train.py --resume auto"
        )
    recipe = read_record(run.folder / "recipe.json", RecordedRecipe, REMEDY)
    environment = read_record(run.folder / "environment.json", EnvironmentRecord, REMEDY)
    path = run.folder / "data.json"
    report = read_record(path, DataRecord, REMEDY).report if os.path.lexists(path) else ""
    best_step = read_record(run.folder / "SUCCESS", SuccessRecord, REMEDY).best_step
    return FinishedRun(run, recipe, environment.as_read(), report, best_step)


def model_card(finished: FinishedRun, which: str, licence: Mapping[str, str]) -> str:
    """The README.md of export/WHICH, metadata first. licence: as find_licence returns it."""
    run, recipe = finished.run, finished.recipe
    data = ModelCardData(
        base_model=_hub_id(finished.base.model) if finished.base else None,
        datasets=[name for name, _ in _datasets(recipe) if _hub_id(name)] or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["knowledge-distillation", "distill-trunc"],
        license=licence["license"],
        license_name=licence.get("license_name"),
        license_link=licence.get("license_link"),
    )
    jinja = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True)
    jinja.filters["md"] = lambda value: escape_markdown(str(value))
    body = jinja.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        which=which,
        step=finished.best_step if which == "best" and finished.best_step else run.num_steps,
        run=run,
        models=list(_models(finished)),
        datasets=[
            _linked(name, "datasets/") + _at(revision) for name, revision in _datasets(recipe)
        ],
        data_report=finished.data_report,
        has_adapter=(run.folder / "export" / which / "adapter").is_dir(),
        scores=list(_scores(finished, which)),
        costs=list(_costs(run)),
        hardware=_hardware(finished.environment),
        commit=finished.environment.get("commit") or NOT_RECORDED,
        versions=_versions(finished.environment),
        recipe=json.dumps(recipe.as_read(), indent=2),
    )
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}"))


def _hub_id(name: str) -> str | None:
    """None for what is a folder or file here, whatever its form."""
    return name if find_input(name) is None and is_hub_id(name) else None


def _linked(name: str, kind: str = "") -> str:
    if _hub_id(name):
        return f"[{name}](https://huggingface.co/{kind}{name})"
    return f"{escape_markdown(name)} (a local path)"


def _at(revision: str | None) -> str:
    return f", revision {escape_markdown(revision)}" if revision else ""


def _models(finished: FinishedRun) -> Iterator[tuple[str, str]]:
    """(role, model)."""
    sections = {"base model": finished.recipe.student, "teacher": finished.recipe.teacher}
    for role, section in sections.items():
        if section is None:
            yield role, "none: fine-tuned without a teacher"
        else:
            only = "" if role == "teacher" or finished.base else "; shape only, random weights"
            revision = section.as_read().get("revision")
            yield role, f"{_linked(section.model)}{_at(revision)}{only}"


def _datasets(recipe: RecordedRecipe) -> Iterator[tuple[str, str | None]]:
    """(hub id or path, revision)."""
    tables: list[RecordedSource] = recipe.data.sources or [recipe.data]
    for table in tables:
        known = SOURCES.get(table.source)
        name = table.path or (known and known.hub_id) or table.source
        yield name, table.as_read().get("revision")


def _scores(finished: FinishedRun, which: str) -> Iterator[tuple[str, Evaluation]]:
    """(whose, evaluation): of this export, and of its teacher and its base where they answered the
    same problems in the same way.
    """
    run = finished.run
    evaluations = read_evaluations(evaluation_files(run.folder / "evaluation"))
    name = Path(finished.recipe.run.name).name
    scores, _ = own_scores(evaluations, run.folder, name, exports=(which,))
    for task, own in scores.items():
        yield "this model", own
        others = {
            role: other
            for role, other in run.references
            if other.task == task and other.settings == own.settings
        }
        yield from others.items()


def _costs(run: Run) -> Iterator[tuple[str, str]]:
    for name in told_costs([run.costs]):
        label, spec = COSTS[name]
        value = getattr(run.costs, name)
        yield label, NOT_RECORDED if value is None else format(value, spec)


def _hardware(environment: Mapping[str, Any]) -> str:
    """What rank 0 saw: GPUs of other nodes are not in environment.json."""
    gpus = environment.get("gpus") or []
    if not gpus:
        return f"no GPU; {environment.get('num_cpus', 'an unknown number of')} CPU cores"
    counts = {name: gpus.count(name) for name in dict.fromkeys(gpus)}
    return ", ".join(f"{count} x {name}" for name, count in counts.items())


def _versions(environment: Mapping[str, Any]) -> str:
    versions = {key: environment.get(key) for key in ("python", "cuda")}
    versions |= environment.get("packages", {})
    return ", ".join(f"{name} {version}" for name, version in versions.items() if version)
