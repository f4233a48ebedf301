"""The rows of local files or of a hub dataset: what identifies their content, and how to read them
one by one.
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pyarrow
import pyarrow.parquet

from kd.compressed import open_bytes, uncompressed_suffix
from kd.data.sources import Row, Source
from kd.errors import UserError
from kd.files import parse_json, read_lines, read_text
from kd.hub import find_data_files, hub_errors

log = logging.getLogger(__name__)

PARQUET_ROWS = 64  # in memory at a time


class RawRow(NamedTuple):
    """A row that is not yet parsed: `number`, from 1, is its line in JSON Lines, else its row."""

    file: int  # of TraceRows.files
    number: int
    content: Any  # bytes: a line of JSON; else what the file holds there


@dataclass(frozen=True)
class TraceRows:
    """`fingerprint` changes with the content, and with the names and the order of several files."""

    name: str
    fingerprint: str
    files: tuple[str, ...]
    unit: str  # what a row is called in its file
    hub_rows: datasets.Dataset | None = None

    def place(self, file: int, number: int) -> str:
        """A row as messages name it."""
        return f"{self.files[file]}: {self.unit} {number}"

    def read(self) -> Iterator[RawRow]:
        """All rows in their order, a few of them in memory at a time. Raises UserError that names
        the file: one that cannot be read, and when there is no row in any.
        """
        num_empty = 0
        for file, name in enumerate(self.files):
            number = 0
            for number, content in self._read_file(name):
                yield RawRow(file, number, content)
            if not number:
                num_empty += 1
                log.warning("%s: the file is empty", name)
        if num_empty == len(self.files):
            raise UserError(f"{self.name}: the file is empty: add rows, or name another file")

    def _read_file(self, name: str) -> Iterator[tuple[int, Any]]:
        if self.hub_rows is not None:
            return enumerate(self.hub_rows, start=1)
        path = Path(name)
        return _READERS[uncompressed_suffix(path)](path)


def find_rows(field: str, name: str, source: Source, revision: str | None) -> TraceRows:
    """Rows of the files or the hub dataset that the recipe's `field` names (kd.hub).

    Files are hashed and not read: most processes find their tokens in the cache. Raises UserError
    for a missing file, one of another kind, and for a hub dataset that cannot be had.
    """
    files = find_data_files(field, name)
    if not files:
        return _find_hub_rows(field, name, source, revision)
    digests = [_sha256(path) for path in files]
    fingerprint = digests[0]
    if len(files) > 1:
        named = [(path.name, digest) for path, digest in zip(files, digests, strict=True)]
        fingerprint = hashlib.sha256(json.dumps(named).encode()).hexdigest()
    unit = "line" if uncompressed_suffix(files[0]) == ".jsonl" else "row"
    return TraceRows(name, fingerprint, tuple(map(str, files)), unit)


def parse(content: Any, columns: Mapping[str, str], where: str) -> Row:
    """A row that TraceRows.read() gave, as a mapping of the fields that a source reads.

    columns: {field: its column}, of data.columns. A question that it names is the only one: a file
        with a column `problem` and a conversation of the same is read as the recipe says. Raises
        UserError, which begins with `where`, for what is not a JSON object, and for a column that
        is not there.

    Lines are parsed one by one, and not to one Arrow table, which would fill missing columns with
    nulls and refuse a column whose type varies.
    """
    row = parse_json(content, where) if isinstance(content, bytes) else content
    if not isinstance(row, Mapping):
        raise UserError(
            f"{where}: found {str(row)[:40]!r} instead of a JSON object with columns as keys"
        )
    for field, column in columns.items():
        if column not in row:
            raise UserError(
                f"{where}: data.columns.{field} = {column!r}: no such column; the row has "
                f"{', '.join(row)}"
            )
    others = _QUESTIONS if _QUESTIONS & columns.keys() else set()
    unnamed = {field: value for field, value in row.items() if field not in others}
    return {**unnamed, **{field: row[column] for field, column in columns.items()}}


_QUESTIONS = {"prompt", "messages", "conversations"}  # fields that hold one, each in its form


def _find_hub_rows(field: str, name: str, source: Source, revision: str | None) -> TraceRows:
    with hub_errors(field, name):
        table = datasets.load_dataset(name, source.config, split=source.split, revision=revision)
    if len(table) == 0:
        raise UserError(f"{field} = {name!r}: split {source.split!r} is empty")
    # .../owner___name/config/version/COMMIT/file.arrow: the same with and without a network.
    fingerprint = Path(table.cache_files[0]["filename"]).parent.name
    return TraceRows(name, fingerprint, (name,), "row", hub_rows=table)


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def _read_json(path: Path) -> Iterator[tuple[int, Any]]:
    """The entries of one list, read whole, or an object on each line."""
    with open_bytes(path) as file:
        start = file.read(2**16).removeprefix(b"\xef\xbb\xbf").lstrip()
    if not start.startswith(b"["):
        yield from enumerate((line for _, line in read_lines(path)), start=1)
        return
    yield from enumerate(parse_json(read_text(path), str(path)), start=1)


def _read_parquet(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _check_names(path, file.schema_arrow)
            number = 0
            for batch in file.iter_batches(PARQUET_ROWS):
                columns = {name: _values(path, name, batch[name]) for name in batch.schema.names}
                for i in range(batch.num_rows):
                    number += 1
                    yield number, {name: values[i] for name, values in columns.items()}
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a Parquet file, or a damaged one: {error}") from None


def _values(path: Path, name: str, column: pyarrow.Array) -> list[Any]:
    try:
        values: list[Any] = column.to_pylist()
    except (ArithmeticError, ImportError, NotImplementedError, ValueError) as error:
        raise UserError(
            f"{path}: column {name!r} of type {column.type} cannot be read ({error}): remove it "
            "from the file, or write it as another type"
        ) from None
    return values


def _check_names(path: Path, schema: pyarrow.Schema) -> None:
    """Of two columns with one name it is not known which is meant; of two fields neither."""
    levels: list[tuple[str, Any]] = [("", schema)]
    while levels:
        prefix, level = levels.pop()
        fields = [level.field(i) for i in range(_num_fields(level))]
        names = [field.name for field in fields]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise UserError(
                f"{path}: the column {prefix + twice[0]!r} appears {names.count(twice[0])} times: "
                "rename or remove all but one"
            )
        levels += [(f"{prefix}{field.name}.", field.type) for field in fields]


def _num_fields(level: Any) -> int:
    return len(level) if isinstance(level, pyarrow.Schema) else int(level.num_fields)


_READERS = {".jsonl": read_lines, ".json": _read_json, ".parquet": _read_parquet}
