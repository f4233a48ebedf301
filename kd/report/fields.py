"""Fields of JSON files as the report compares them."""

import json
from collections.abc import Iterator
from typing import Any

REMEDY = "restore it, or leave the run out"


def flatten(prefix: str, value: Any) -> Iterator[tuple[str, str]]:
    """Every leaf of nested objects, as ("training.learning_rate", "0.0001")."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield from flatten(f"{prefix}{key}.", part)
    else:
        yield prefix.removesuffix("."), value if isinstance(value, str) else json.dumps(value)
