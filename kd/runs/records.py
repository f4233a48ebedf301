"""What a run left behind, read back."""

import json
from pathlib import Path
from typing import Any

from kd.constants import FORMAT_VERSION
from kd.errors import UserError
from kd.recipe import check_format_version


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, none where there is none; a last line torn by a crash is left
    out, and records of version 1 are given today's names.

    Raises UserError for a line that is not JSON, and for a version that is not known here.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    try:
        records = [json.loads(line) for line in lines if line]
    except ValueError as error:
        raise UserError(
            f"{path}: a line is not valid JSON ({error}): restore it, or leave the run out"
        ) from None
    for record in records:
        check_format_version(path, record)
    return [_upgraded(record) for record in records]


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
