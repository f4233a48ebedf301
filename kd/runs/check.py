"""Checks of a recipe that need no GPU, network or process group, for --check and submissions."""

import os
from pathlib import Path

from kd.engine.ds_config import read_ds_config
from kd.errors import UserError
from kd.hub import find_data_files, find_file, find_model, resolve
from kd.recipe import Recipe


def check_recipe(recipe: Recipe, *, awaits_cache: bool = False) -> None:
    """Raises UserError naming the field and its value when a model, a file or a DeepSpeed JSON
    cannot be what it is. awaits_cache: teacher.cache is filled before the run, and not there yet.
    """
    check_can_write(recipe.run_dir, f"run.output_dir = {recipe.run.output_dir!r}")
    for field, value in inputs(recipe).items():
        if field.startswith("data.") and field.endswith("path"):
            find_data_files(field, value)
        elif field in ("data.chat_template", "evaluation.path", "training.selection_path"):
            find_file(field, value)
        else:
            resolve(field, value)
    for role in ("student", "teacher") if recipe.teacher else ("student",):
        read_ds_config(recipe, role)
    if recipe.teacher and recipe.teacher.cache is not None and not awaits_cache:
        cache = recipe.teacher.cache
        if not os.path.isfile(os.path.join(cache, "manifest.json")):
            raise UserError(
                f"teacher.cache = {cache!r}: no such cache: fill it with launch/cache.py, or "
                "remove the key"
            )
    models = {"student.model": recipe.student, "teacher.model": recipe.teacher}
    if any(section and find_model(field, section) for field, section in models.items()):
        from kd.models.model_folder import check_models  # imports torch and transformers

        check_models(recipe)


def inputs(recipe: Recipe) -> dict[str, str]:
    """{section.key: value} of all that a run reads by path or hub id, except DeepSpeed's JSON."""
    found = {
        "student.model": recipe.student.model,
        "teacher.model": recipe.teacher.model if recipe.teacher else None,
        "data.path": recipe.data.path,
        **{f"data.sources[{i}].path": t.path for i, t in enumerate(recipe.data.sources)},
        "data.validation_path": recipe.data.validation_path,
        "data.chat_template": recipe.data.chat_template,
        "evaluation.path": recipe.evaluation.path,
        "training.selection_path": recipe.training.selection_path,
    }
    return {field: value for field, value in found.items() if value is not None}


def check_can_write(folder: Path, setting: str) -> None:
    """Raise UserError, which begins with the setting, unless the folder is there or can be made."""
    for path in (folder, *folder.parents):
        if os.path.lexists(path):
            problem = None if path.is_dir() else "is not a folder"
            if problem is None and not os.access(path, os.W_OK | os.X_OK):
                problem = "cannot be written to"
            if problem:
                raise UserError(f"{setting}: {path} {problem}: name another folder")
            return
