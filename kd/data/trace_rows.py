"""The rows of a data file or hub dataset: what identifies their content, and how to read them."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
from datasets.table import InMemoryTable

from kd.data.sources import Row, Source
from kd.errors import UserError
from kd.hub import hub_errors, resolve


@dataclass(frozen=True)
class TraceRows:
    """`fingerprint` changes with the content. read() raises UserError for an unreadable file.

    A JSON Lines file is read as text, one column "line"; see `parse`.
    """

    name: str
    fingerprint: str
    read: Callable[[], datasets.Dataset]


def find_rows(field: str, name: str, source: Source, revision: str | None) -> TraceRows:
    """Rows of the .jsonl or .parquet file, or hub dataset, that the recipe's `field` names.

    A file is hashed and not read: most processes find its tokens in the cache. Raises UserError for
    a missing file, one of another kind, and for a hub dataset that cannot be had.
    """
    path = Path(resolve(field, name))
    if not path.exists():
        return _find_hub_rows(field, name, source, revision)
    if not path.is_file() or path.suffix not in _READERS:
        raise UserError(f"{field} = {name!r}: name a .jsonl or a .parquet file")
    with path.open("rb") as file:
        return TraceRows(
            name,
            hashlib.file_digest(file, "sha256").hexdigest(),
            partial(_read_file, field, name, path),
        )


def parse(row: dict[str, Any]) -> Row:
    """A row that TraceRows.read() gave, as a mapping of columns. Raises UserError where a line is
    not a JSON object.

    Lines are parsed one by one, and not to one Arrow table, which would fill missing columns with
    nulls and refuse a column whose type varies.
    """
    if row.keys() != {"line"}:
        return row
    try:
        parsed = json.loads(row["line"])
    except json.JSONDecodeError as error:
        raise UserError(f"not valid JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise UserError(
            f"a JSON object is needed, with columns as keys, and not {row['line'][:40]!r}"
        )
    return parsed


def _find_hub_rows(field: str, name: str, source: Source, revision: str | None) -> TraceRows:
    with hub_errors(field, name):
        table = datasets.load_dataset(name, source.config, split=source.split, revision=revision)
    if len(table) == 0:
        raise UserError(f"{field} = {name!r}: split {source.split!r} is empty")
    # .../owner___name/config/version/COMMIT/file.arrow: the same with and without a network.
    return TraceRows(name, Path(table.cache_files[0]["filename"]).parent.name, lambda: table)


def _read_file(field: str, name: str, path: Path) -> datasets.Dataset:
    try:
        table = _READERS[path.suffix](path)
    except (UnicodeDecodeError, pyarrow.ArrowInvalid) as error:
        raise UserError(f"{field} = {name!r}: not a {path.suffix} file: {error}") from None
    if len(table) == 0:
        raise UserError(f"{field} = {name!r}: the file is empty")
    return table


def _read_jsonl(path: Path) -> datasets.Dataset:
    # Not splitlines(): JSON strings may hold U+2028 and the like, which it takes for the end of a
    # line.
    text = path.read_text(encoding="utf-8").rstrip()
    return datasets.Dataset.from_dict({"line": text.split("\n") if text else []})


def _read_parquet(path: Path) -> datasets.Dataset:
    return datasets.Dataset(InMemoryTable(pyarrow.parquet.read_table(path)))


_READERS = {".jsonl": _read_jsonl, ".parquet": _read_parquet}
