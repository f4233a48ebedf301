"""Files that are whole or absent, whatever happens while they are written."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kd.files import write_json, write_jsonl, write_text


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
