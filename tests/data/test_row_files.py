"""Rows of files as people have them: compressed, in folders and shards, large, or damaged."""

import gzip
import json
import random
import sys
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from data_samples import good_rows
from transformers import PreTrainedTokenizerFast

from kd.data.dataset import load_data
from kd.data.sources import SOURCES
from kd.data.trace_rows import TraceRows, find_rows, parse
from kd.errors import UserError
from kd.recipe import Recipe
from kd.runs.check import check_recipe

MakeRecipe = Callable[..., Recipe]


def lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def zstd(content: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(content)


def rows_at(path: Path) -> TraceRows:
    return find_rows("data.path", str(path), SOURCES["local"], None)


def read(path: Path) -> list[Any]:
    rows = rows_at(path)
    return [parse(raw.content, {}, rows.place(raw.file, raw.number)) for raw in rows.read()]


ROWS = good_rows(6)
FORMS = {
    "plain.jsonl": lines(ROWS),
    "mark.jsonl": b"\xef\xbb\xbf" + lines(ROWS),
    "blank.jsonl": b"\n" + lines(ROWS[:2]) + b"   \r\n\n" + lines(ROWS[2:]) + b"\n",
    "crlf.jsonl": lines(ROWS).replace(b"\n", b"\r\n"),
    "whole.jsonl.gz": gzip.compress(lines(ROWS)),
    "members.jsonl.gz": gzip.compress(lines(ROWS[:3])) + gzip.compress(lines(ROWS[3:])),
    "whole.jsonl.zst": zstd(lines(ROWS)),
    "frames.jsonl.zst": zstd(lines(ROWS[:3])) + zstd(lines(ROWS[3:])),
    "UPPER.JSONL.GZ": gzip.compress(lines(ROWS)),
    "list.json": b"\xef\xbb\xbf\n" + json.dumps(ROWS, indent=1).encode(),
    "list.json.gz": gzip.compress(json.dumps(ROWS).encode()),
    "lines.json": lines(ROWS),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_a_file_holds_the_same_rows(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(FORMS[name])
    assert read(tmp_path / name) == ROWS


def test_a_row_is_named_by_its_line_also_behind_blank_ones(
    recipe: MakeRecipe, tiny: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b"\n\n" + lines(ROWS) + b'\n{"prompt": 1')
    with pytest.raises(UserError, match=r"rows\.jsonl: line 10: not valid JSON"):
        load_data(recipe(), tiny)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A folder of two shards, one of them deeper, and what is not read."""
    folder = tmp_path / "shards"
    (folder / "deeper").mkdir(parents=True)
    (folder / "a.jsonl").write_bytes(lines(ROWS[:2]))
    (folder / "deeper" / "b.jsonl").write_bytes(lines(ROWS[2:]))
    (folder / ".hidden.jsonl").write_bytes(lines(ROWS))
    (folder / "README.md").write_text("text")
    return folder


@pytest.mark.parametrize("name", ["", "**/*.jsonl", "**"])
def test_a_folder_or_a_glob_is_all_of_its_files_by_name(shards: Path, name: str) -> None:
    assert read(shards / name) == ROWS
    assert read(shards / "*.jsonl") == ROWS[:2]


def test_rows_of_several_files_are_tokenised_and_named_by_their_file(
    recipe: MakeRecipe, tiny: PreTrainedTokenizerFast, shards: Path
) -> None:
    made = recipe(data={"path": str(shards)})
    assert len(load_data(made, tiny).train) == 6
    (shards / "deeper" / "b.jsonl").write_bytes(lines([ROWS[0], {"prompt": "?"}]))
    with pytest.raises(UserError, match=r"deeper/b\.jsonl: line 2: no column 'reasoning'"):
        load_data(made, tiny)


def test_content_names_and_order_of_files_are_in_the_fingerprint(shards: Path) -> None:
    found = {rows_at(shards).fingerprint}
    (shards / "a.jsonl").write_bytes(lines(ROWS[:1]))
    found.add(rows_at(shards).fingerprint)
    (shards / "a.jsonl").rename(shards / "c.jsonl")
    found.add(rows_at(shards).fingerprint)
    (shards / "c.jsonl").rename(shards / "deeper" / "c.jsonl")
    found.add(rows_at(shards).fingerprint)
    assert len(found) == 4


def test_the_fingerprint_of_one_file_is_that_of_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"abc")
    assert rows_at(tmp_path / "a.jsonl").fingerprint.startswith("ba7816bf8f01cfea414140de")


@pytest.mark.parametrize(
    ("files", "value", "problem"),
    [
        (["a.jsonl", "b.parquet"], ".", "files of several kinds, 1 .jsonl and 1 .parquet"),
        (["a.jsonl", "a.jsonl.gz"], "*", "files of several kinds, 1 .jsonl and 1 .jsonl.gz"),
        (["a.txt"], ".", "no file of rows"),
        (["a.parquet.gz"], "a.parquet.gz", "no file of rows"),
        ([], "*.jsonl", "no file of rows"),
        ([], "*.gz", "no file of rows"),
    ],
)
def test_what_holds_no_rows_or_several_kinds_is_refused_before_anything_is_read(
    recipe: MakeRecipe, tmp_path: Path, files: list[str], value: str, problem: str
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in files:
        (folder / name).write_bytes(b"")
    models = {role: {"model": str(folder)} for role in ("student", "teacher")}
    made = recipe(data={"path": str(folder / value)}, **models)
    with pytest.raises(UserError, match=problem) as caught:
        check_recipe(made)
    assert str(caught.value).startswith("data.path = ")


@pytest.mark.parametrize("value", ["", " ", "a\0b", "*\0"])
def test_a_path_that_cannot_be_one_is_refused(value: str) -> None:
    with pytest.raises(UserError, match=r"data\.path = "):
        find_rows("data.path", value, SOURCES["local"], None)


SNAPPY = pyarrow.Table.from_pylist(good_rows(300))
DAMAGED = {
    "cut.jsonl.gz": gzip.compress(lines(ROWS))[:-9],
    "no.jsonl.gz": lines(ROWS),
    "cut.jsonl.zst": zstd(lines(ROWS))[:-9],
    "tail.jsonl.zst": zstd(lines(ROWS)) + b"xxxxxxxx",
    "no.jsonl.zst": lines(ROWS),
    "cut.json": b"[" + lines(ROWS[:1]),
    "no.parquet": b"PAR1" * 20,
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_one_error_that_names_it(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(DAMAGED[name])
    with pytest.raises(UserError) as caught:
        read(tmp_path / name)
    assert str(caught.value).startswith(str(tmp_path / name))


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_a_file_that_was_cut_between_two_rows_is_not_taken_for_a_shorter_one(
    tmp_path: Path, suffix: str
) -> None:
    if suffix == "gz":
        packer: Any = zlib.compressobj(wbits=31)
        cut = packer.compress(lines(ROWS)) + packer.flush(zlib.Z_FULL_FLUSH)
    else:
        packer = zstandard.ZstdCompressor().compressobj()
        cut = packer.compress(lines(ROWS)) + packer.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    (tmp_path / f"cut.jsonl.{suffix}").write_bytes(cut)
    with pytest.raises(UserError, match=rf"cut\.jsonl\.{suffix}: damaged or incomplete"):
        read(tmp_path / f"cut.jsonl.{suffix}")


def test_without_zstandard_the_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    (tmp_path / "a.jsonl.zst").write_bytes(b"")
    with pytest.raises(UserError, match=r"a\.jsonl\.zst: .* pip install zstandard"):
        read(tmp_path / "a.jsonl.zst")


def test_parquet_that_is_damaged_in_its_middle_is_one_error(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(SNAPPY, path)
    content = bytearray(path.read_bytes())
    content[10:400] = b"\xff" * 390
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"rows\.parquet: not a Parquet file, or a damaged one"):
        read(path)


TEXTS = pyarrow.array(["x", "y"])
TWICE = pyarrow.StructArray.from_arrays([TEXTS, TEXTS], names=["role", "role"])


@pytest.mark.parametrize(
    ("arrays", "names", "column"),
    [
        ([TEXTS, TEXTS, TEXTS], ["prompt", "answer", "answer"], "'answer' appears 2 times"),
        ([TWICE], ["turn"], "'turn.role' appears 2 times"),
        (
            [pyarrow.ListArray.from_arrays([0, 1, 2], TWICE)],
            ["messages"],
            r"'messages\.\w+\.role' appears 2 times",
        ),
    ],
)
def test_two_columns_of_one_name_are_refused_by_name(
    tmp_path: Path, arrays: list[Any], names: list[str], column: str
) -> None:
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays(arrays, names=names), path)
    with pytest.raises(UserError, match=rf"rows\.parquet: the column {column}"):
        read(path)


@pytest.mark.parametrize("value", [1, '{"prompt": "1?"}', None, [1], {"a": None}])
def test_a_parquet_column_named_line_is_a_column(
    recipe: MakeRecipe, tiny: PreTrainedTokenizerFast, tmp_path: Path, value: Any
) -> None:
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"line": value}]), path)
    assert read(path) == [{"line": value}]
    with pytest.raises(UserError, match=r"rows\.parquet: row 1: no column 'prompt'; the row has l"):
        load_data(recipe(data={"path": str(path)}), tiny)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_a_file_of_40_mb_is_read_in_15_at_most(tmp_path: Path, name: str) -> None:
    path, draw = tmp_path / name, random.Random(0)
    rows = [{"prompt": str(i), "reasoning": draw.randbytes(50_000).hex()} for i in range(400)]
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=50)
    else:
        pack = {"gz": gzip.compress, "zst": zstd}.get(name.rpartition(".")[2], bytes)
        path.write_bytes(pack(lines(rows)))
    del rows
    tracemalloc.start()
    num_rows = sum(1 for _ in rows_at(path).read())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert num_rows == 400
    assert peak < 15e6


MAPPED = [
    {"problem": row["prompt"], "thought": row["reasoning"], "answer": row["answer"], "messages": []}
    for row in ROWS
]


def test_columns_of_other_names_serve_as_the_fields_of_the_source(
    recipe: MakeRecipe, tiny: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    (tmp_path / "mapped.jsonl").write_bytes(lines(MAPPED))
    columns = {"prompt": "problem", "reasoning": "thought"}
    plain = load_data(recipe(), tiny).train
    made = recipe(data={"path": str(tmp_path / "mapped.jsonl"), "columns": columns})
    mapped = load_data(made, tiny).train
    by_row = {plain[i].row: plain[i].input_ids.tolist() for i in range(len(plain))}
    assert len(mapped) == 6
    assert all(mapped[i].input_ids.tolist() == by_row[mapped[i].row] for i in range(6))


def test_two_columns_may_change_places() -> None:
    columns = {"prompt": "answer", "answer": "prompt"}
    assert parse({"prompt": 1, "answer": 2}, columns, "") == {"prompt": 2, "answer": 1}


def test_a_column_that_is_not_there_is_named_with_those_found(
    recipe: MakeRecipe, tiny: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(
        UserError,
        match=r"line 1: data\.columns\.prompt = 'problem': no such column; the row has prompt, rea",
    ):
        load_data(recipe(data={"columns": {"prompt": "problem"}}), tiny)


@pytest.mark.parametrize(
    ("source", "field"), [("local", "question"), ("nemotron_math", "prompt"), ("sky_t1", "system")]
)
def test_a_field_that_the_source_does_not_read_is_refused(
    recipe: MakeRecipe, source: str, field: str
) -> None:
    with pytest.raises(ValueError, match=rf"columns\.{field}: source '{source}' reads no such"):
        recipe(data={"source": source, "columns": {field: "x"}})
