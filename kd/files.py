"""Reading and writing text, JSON and TOML, with a size limit, and the file and line in each error.

Files are written whole or not at all: to a temporary name, synced to the disk, then renamed.
"""

import errno
import json
import os
import re
import stat
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from kd.compressed import open_bytes
from kd.errors import UserError

# Far above what people write by hand and what a run writes; below what exhausts a host.
MAX_BYTES = 2**30
MAX_DEPTH = 100  # of nested objects and lists


def read_text(path: Path, *, max_bytes: int = MAX_BYTES) -> str:
    """A text in UTF-8, with or without a byte order mark; .gz and .zst are decompressed.

    Raises UserError that names the file, and the line where that is the cause: for what is not
    there or not a regular file (a named pipe would wait for ever), is larger than max_bytes, is
    damaged, or is not UTF-8.
    """
    num_bytes, content = _size_of(path), b""
    if num_bytes <= max_bytes:
        with open_bytes(path) as file:
            content = file.read(max_bytes + 1)
        num_bytes = len(content)
    if num_bytes > max_bytes:
        raise UserError(
            f"{path}: it has {num_bytes} bytes, but at most {max_bytes} are read: check that it "
            "is the right file"
        )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}: line {line}: byte 0x{content[error.start]:02x} is not UTF-8: save the file "
            "as UTF-8"
        ) from None


def read_json(path: Path, *, max_bytes: int = MAX_BYTES) -> Any:
    """The value in a JSON file. Raises UserError as read_text and parse_json (strict) do."""
    return parse_json(read_text(path, max_bytes=max_bytes), str(path), strict=True)


def read_toml(path: Path, *, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """The tables of a TOML file. Raises UserError that names the file and the line."""
    text = read_text(path, max_bytes=max_bytes)
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        # tomllib points at the end of the offending line, but does not quote it: "duplicate key"
        # needs the key.
        # At the end of the document there is no line in the message.
        place = re.search(r"at line (\d+)", str(error))
        lineno = int(place[1]) if place else len(text.splitlines())
        line = text.splitlines()[lineno - 1].strip() if 0 < lineno <= len(text.splitlines()) else ""
        duplicate = "Cannot overwrite" in str(error) or "Cannot declare" in str(error)
        problem = "duplicate key" if duplicate else "not valid TOML"
        raise UserError(f"{path}: {problem} in {line[:200]!r}: {error}") from None
    except RecursionError:
        raise UserError(f"{path}: nested too deeply: at most {MAX_DEPTH} levels") from None
    except ValueError as error:  # a number of thousands of digits
        raise UserError(f"{path}: not valid TOML: {error}") from None
    _check_depth(content, str(path))
    return content


def read_json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """(line number from 1, value) of each line that is not blank, one line in memory at a time.

    Raises UserError that names the file and the line. NaN and a repeated key are let pass, as in
    parse_json; a byte order mark is not part of the first line; .gz and .zst are decompressed.
    """
    for number, line in read_lines(path):
        yield number, parse_json(line, f"{path}: line {number}")


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, its bytes) as read_json_lines reads them, and no line parsed."""
    _size_of(path)
    with open_bytes(path) as lines:
        for number, line in enumerate(lines, start=1):
            content = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if content.strip():
                yield number, content


def _size_of(path: Path) -> int:
    """In bytes, as it lies on the disk. Raises UserError for what is not a regular file."""
    try:
        status = path.stat()
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read: {reason}") from None
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{path}: not a regular file: name a file that holds text")
    return status.st_size


def parse_json(text: str | bytes, where: str, *, strict: bool = False) -> Any:
    """The value of a JSON text. strict refuses what parsers disagree on: NaN, infinity and a key
    that is there twice.

    Raises UserError that begins with `where`: not UTF-8, not JSON, a number of thousands of digits,
    or objects and lists nested more than MAX_DEPTH deep.
    """
    options: dict[str, Any] = {}
    if strict:
        options = {"object_pairs_hook": _unique, "parse_constant": _no_constant}
    try:
        decoded = text.decode("utf-8") if isinstance(text, bytes) else text
        value = json.loads(decoded, **options)
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise UserError(
            f"{where}: byte 0x{byte:02x} is not UTF-8: save the file as UTF-8"
        ) from None
    except RecursionError:
        raise UserError(f"{where}: nested too deeply: at most {MAX_DEPTH} levels") from None
    except ValueError as error:
        raise UserError(f"{where}: not valid JSON: {error}") from None
    if decoded.count("[") + decoded.count("{") > MAX_DEPTH:
        _check_depth(value, where)
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} appears twice")
        found[key] = value
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _check_depth(value: Any, where: str) -> None:
    containers = [value] if isinstance(value, dict | list) else []
    for _ in range(MAX_DEPTH):
        parts = (item.values() if isinstance(item, dict) else item for item in containers)
        containers = [part for some in parts for part in some if isinstance(part, dict | list)]
    if containers:
        raise UserError(f"{where}: nested too deeply: at most {MAX_DEPTH} levels")


def write_json(path: Path, value: Any) -> None:
    """Raises ValueError for NaN and infinity, which JSON does not have."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_text(path: Path, text: str) -> None:
    """Readers see the old file or the new one, never half of it. Makes a missing folder.

    Raises FileExistsError for what is there and no regular file: /dev/null would be replaced.
    """
    if path.exists() and not path.is_file():
        raise FileExistsError(errno.EEXIST, "not a regular file", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
