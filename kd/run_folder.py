"""A run's folder: whose run it is, whether it may be continued, and where everything lands.

recipe.json        the resolved recipe          metrics.jsonl     one line per optimizer step
environment.json   versions, commit, hardware   checkpoints/      step_N, whole or absent
data.json          what the data filters did    export/last, best the student, as from_pretrained loads it
SUCCESS            written last
"""

import json
from typing import Any

from kd.engine.checkpoint import remove_partial
from kd.errors import UserError
from kd.files import write_json
from kd.metrics import environment
from kd.recipe import Recipe

# What may differ between a run and its continuation: nothing that changes a weight.
FREE_TO_CHANGE = {
    ("training", "checkpoint_every"),
    ("training", "keep_last"),
    ("data", "num_proc"),
    ("data", "cache_dir"),
}
FREE_SECTIONS = {"run", "evaluation", "monitor"}


def open_run(recipe: Recipe, resume: str | None) -> None:
    """Make the run's folder, or check that it may be continued. Rank 0 calls it, before anything is allocated.

    Raises UserError when the folder holds a run and --resume is absent, or holds another recipe's run.
    """
    folder = recipe.run_dir
    recipe_file = folder / "recipe.json"
    resolved = recipe.model_dump(mode="json")
    if recipe_file.exists():
        if resume is None:
            raise UserError(
                f"{folder} already holds a run: continue it with --resume auto, "
                "or choose another folder with --set run.name=NAME"
            )
        changed = _differences(json.loads(recipe_file.read_text(encoding="utf-8")), resolved)
        if changed:
            listing = "\n".join(f"  {key}: {old!r} there, {new!r} here" for key, old, new in changed)
            raise UserError(
                f"{folder} holds the run of another recipe:\n{listing}\nUse the same recipe, or --set run.name=NAME"
            )
    try:
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        remove_partial(folder / "checkpoints")
        (folder / "SUCCESS").unlink(missing_ok=True)
        write_json(recipe_file, resolved)
        write_json(folder / "environment.json", environment())
    except OSError as error:
        raise UserError(f"run.output_dir = {recipe.run.output_dir!r}: cannot write to {folder}: {error}") from error


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(key, old, new) of what differs between two resolved recipes and matters."""
    found = []
    for section in new.keys() - FREE_SECTIONS:
        before, after = old.get(section) or {}, new[section] or {}
        for key in sorted(before.keys() | after.keys()):
            if before.get(key) != after.get(key) and (section, key) not in FREE_TO_CHANGE:
                found.append((f"{section}.{key}", before.get(key), after.get(key)))
    return sorted(found, key=lambda difference: difference[0])
