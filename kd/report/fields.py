"""Fields of JSON files that others wrote: an error names the file and the field."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kd.errors import UserError


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(
            f"{path}: not valid JSON ({error}): restore it, or leave the run out"
        ) from None
    if not isinstance(content, dict):
        raise UserError(
            f"{path}: holds {str(content)[:40]!r}, not an object: restore it, or leave the run out"
        )
    return content


def field(path: Path, content: Any, name: str) -> Any:
    for key in name.split("."):
        if not isinstance(content, dict) or key not in content:
            raise UserError(f"{path}: {name} is missing: restore it, or leave the run out")
        content = content[key]
    return content


def flatten(prefix: str, value: Any) -> Iterator[tuple[str, str]]:
    """Every leaf of nested objects, as ("training.learning_rate", "0.0001")."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield from flatten(f"{prefix}{key}.", part)
    else:
        yield prefix.removesuffix("."), value if isinstance(value, str) else json.dumps(value)
