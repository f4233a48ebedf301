"""Files that are whole or absent, whatever happens while they are written."""

import errno
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kd.errors import UserError
from kd.files import (
    MAX_DEPTH,
    parse_json,
    read_json,
    read_json_lines,
    read_text,
    read_toml,
    write_json,
    write_jsonl,
    write_text,
)


def full_disk(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def disk_full_on(name: str) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda monkeypatch: monkeypatch.setattr(os, name, full_disk)


@pytest.mark.parametrize("old", ["old\n", None], ids=["an old file", "no file"])
@pytest.mark.parametrize(
    ("text", "break_something", "error"),
    [
        ("new \ud800", lambda _: None, UnicodeEncodeError),
        ("new" * 100_000, disk_full_on("fsync"), OSError),
        ("new", disk_full_on("replace"), OSError),
    ],
    ids=["text that cannot be written", "a full disk", "a rename that fails"],
)
def test_an_error_while_writing_leaves_what_was_there(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    old: str | None,
    text: str,
    break_something: Callable[[pytest.MonkeyPatch], None],
    error: type[Exception],
) -> None:
    path = tmp_path / "file.txt"
    if old is not None:
        path.write_text(old)
    with monkeypatch.context() as patch:
        break_something(patch)
        with pytest.raises(error):
            write_text(path, text)
    assert (path.read_text() if path.exists() else None) == old
    write_text(path, "new\n")  # what the failure left aside is in nobody's way
    assert [file.read_text() for file in tmp_path.iterdir()] == ["new\n"]


def test_what_is_no_regular_file_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/null")):
        with pytest.raises(FileExistsError):
            write_text(path, "text")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)


def test_a_value_that_is_not_json_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        write_json(tmp_path / "value.json", {"path": tmp_path})
    with pytest.raises(TypeError):
        write_jsonl(tmp_path / "rows.jsonl", [{"row": 1}, {"row": {1}}])
    assert list(tmp_path.iterdir()) == []


def test_json_lines_are_one_row_each_in_a_folder_that_is_made(tmp_path: Path) -> None:
    rows = [{"text": "a\nb\u2028c"}, {"text": "\u00e9"}]
    path = tmp_path / "new" / "rows.jsonl"
    write_jsonl(path, rows)
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]] == rows


READERS: dict[str, Callable[[Path], Any]] = {
    "json": read_json,
    "jsonl": lambda path: list(read_json_lines(path)),
    "toml": read_toml,
}
NESTED = {"json": "[" * 100_000, "jsonl": "[" * 100_000, "toml": "a = " + "[" * 100_000}
DIGITS = {"json": "1" * 5000, "jsonl": "1" * 5000, "toml": "a = " + "1" * 5000}


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "byte order mark"])
def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path: Path, kind: str, mark: str) -> None:
    path = tmp_path / f"file.{kind}"
    path.write_text(mark + ("a = 1\n" if kind == "toml" else '{"a": 1}\n'), encoding="utf-8")
    expected = [(1, {"a": 1})] if kind == "jsonl" else {"a": 1}
    assert READERS[kind](path) == expected


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"\n\n\xff\xfe", r"line 3: byte 0xff"),
        (NESTED, "nested too deeply"),
        (DIGITS, "digits"),
        (b'{"a": ]', "not valid"),
    ],
    ids=["not UTF-8", "nested", "digits", "not of the kind"],
)
def test_what_cannot_be_read_is_one_error_that_names_the_file(
    tmp_path: Path, kind: str, content: Any, what: str
) -> None:
    path = tmp_path / f"file.{kind}"
    path.write_bytes(content if isinstance(content, bytes) else content[kind].encode())
    with pytest.raises(UserError, match=what) as caught:
        READERS[kind](path)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize("kind", READERS)
def test_what_is_no_regular_file_is_refused_and_not_waited_for(tmp_path: Path, kind: str) -> None:
    pipe, loop = tmp_path / "pipe", tmp_path / "loop"
    os.mkfifo(pipe)
    loop.symlink_to(loop)
    for path in (pipe, loop, tmp_path, tmp_path / "missing", tmp_path / "nul\0"):
        with pytest.raises(UserError):
            READERS[kind](path)


def test_a_file_larger_than_the_bound_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "large").write_text("12345")
    assert read_text(tmp_path / "large", max_bytes=5) == "12345"
    with pytest.raises(UserError, match="5 bytes, but at most 4"):
        read_text(tmp_path / "large", max_bytes=4)


def test_depth_is_bounded_and_counted(tmp_path: Path) -> None:
    deepest = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    assert parse_json(deepest, "text") is not None
    with pytest.raises(UserError, match="text: nested"):
        parse_json(f"[{deepest}]", "text")
    assert len(parse_json("[" + "[]," * 200 + "[]]", "wide and not deep")) == 201


@pytest.mark.parametrize("text", ['{"a": NaN}', "[Infinity]", '{"a": 1, "a": 2}'])
def test_what_parsers_disagree_on_is_refused_where_it_is_configuration(text: str) -> None:
    parse_json(text, "a row of data")
    with pytest.raises(UserError, match="not valid JSON"):
        parse_json(text, "configuration", strict=True)


def test_blank_lines_are_no_rows_and_keep_their_number(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": "\xe2\x80\xa8"}\r\n\n  \n{"a": 2}')
    assert list(read_json_lines(path)) == [(1, {"a": "\u2028"}), (4, {"a": 2})]
