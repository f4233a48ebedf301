"""The rows of a data file or hub dataset as they stand, and what identifies their content."""

import hashlib
import json
from dataclasses import dataclass
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
class Rows:
    """`fingerprint` changes with the content. A JSON Lines file is kept as text, one column "line"; see `parse`."""

    name: str
    table: datasets.Dataset
    fingerprint: str


def load_rows(field: str, name: str, source: Source, revision: str | None) -> Rows:
    """Rows of the .jsonl or .parquet file, or else the hub dataset, that the recipe's `field` names.

    Raises UserError for a missing, empty or unreadable file, and for a hub dataset that cannot be had.
    """
    path = Path(resolve(field, name))
    if not path.exists():
        return _load_hub_rows(field, name, source, revision)
    readers = {".jsonl": _read_jsonl, ".parquet": _read_parquet}
    if not path.is_file() or path.suffix not in readers:
        raise UserError(f"{field} = {name!r}: name a .jsonl or a .parquet file")
    try:
        table = readers[path.suffix](path)
    except (UnicodeDecodeError, pyarrow.ArrowInvalid) as error:
        raise UserError(f"{field} = {name!r}: not a {path.suffix} file: {error}") from None
    if len(table) == 0:
        raise UserError(f"{field} = {name!r}: the file is empty")
    with path.open("rb") as file:
        return Rows(name, table, hashlib.file_digest(file, "sha256").hexdigest())


def parse(row: dict[str, Any]) -> Row:
    """A row of Rows.table as a mapping of columns. Raises UserError where a line is not a JSON object.

    Lines are parsed one by one, and not to one Arrow table, which would fill missing columns with nulls and refuse
    a column whose type varies.
    """
    if row.keys() != {"line"}:
        return row
    try:
        parsed = json.loads(row["line"])
    except json.JSONDecodeError as error:
        raise UserError(f"not valid JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise UserError(f"a JSON object is needed, with columns as keys, and not {row['line'][:40]!r}")
    return parsed


def _load_hub_rows(field: str, name: str, source: Source, revision: str | None) -> Rows:
    with hub_errors(field, name):
        table = datasets.load_dataset(name, source.config, split=source.split, revision=revision)
    if len(table) == 0:
        raise UserError(f"{field} = {name!r}: split {source.split!r} is empty")
    # .../owner___name/config/version/COMMIT/file.arrow: the same with and without a network.
    return Rows(name, table, Path(table.cache_files[0]["filename"]).parent.name)


def _read_jsonl(path: Path) -> datasets.Dataset:
    # Not splitlines(): JSON strings may hold U+2028 and the like, which it takes for the end of a line.
    text = path.read_text(encoding="utf-8").rstrip()
    return datasets.Dataset.from_dict({"line": text.split("\n") if text else []})


def _read_parquet(path: Path) -> datasets.Dataset:
    return datasets.Dataset(InMemoryTable(pyarrow.parquet.read_table(path)))
