"""Problems read from a file, and what is said of a bad one."""

import gzip
from pathlib import Path

import pytest
import zstandard

from kd.errors import UserError
from kd.evaluate.problems import Problem, load_problems

GOOD = '{"prompt": "1+1", "answer": 2}\n\n{"id": "b", "prompt": "2+2", "answer": "4"}\n'


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "problems.jsonl"


def test_ids_default_to_row_numbers_and_numbers_become_text(path: Path) -> None:
    path.write_text(GOOD)
    assert load_problems("evaluation.path", str(path)) == [
        Problem("1", "1+1", "2"),
        Problem("b", "2+2", "4"),
    ]
    assert len(load_problems("evaluation.path", str(path), limit=1)) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD + '{"prompt": "3+3"}\n', "row 4 has no 'answer'; its columns are prompt"),
        (GOOD + '{"answer": "3"}\n', "row 4 has no 'prompt'"),
        (GOOD + '{"prompt": " ", "answer": "3"}\n', "row 4 has no 'prompt'"),
        (GOOD + '{"prompt": "3+', "row 4: not valid JSON"),
        (GOOD + "[1]\n", "row 4 is not an object"),
        (GOOD + '{"id": "b", "prompt": "x", "answer": "3"}\n', "id 'b' is on two rows"),
        (GOOD + '{"prompt": "\\ud800", "answer": "3"}\n', "row 4 is not valid Unicode"),
        ("\n", "it holds no problems"),
    ],
)
def test_a_bad_file_is_an_error_that_names_field_file_and_row(
    path: Path, text: str, message: str
) -> None:
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_problems("evaluation.path", str(path))
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"evaluation.path = {str(path)!r}")


@pytest.mark.parametrize("name", ["p.jsonl", "p.jsonl.gz", "p.jsonl.zst"])
def test_a_byte_order_mark_blank_lines_and_compression_change_no_problem(
    tmp_path: Path, name: str
) -> None:
    content = b"\xef\xbb\xbf  \n" + GOOD.encode()
    if name.endswith(".gz"):
        content = gzip.compress(content)
    if name.endswith(".zst"):
        content = zstandard.ZstdCompressor().compress(content)
    (tmp_path / name).write_bytes(content)
    assert load_problems("--problems", str(tmp_path / name)) == [
        Problem("2", "1+1", "2"),
        Problem("b", "2+2", "4"),
    ]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"prompt": "\xff", "answer": 1}', "byte 0xff is not UTF-8"),
        (b'{"prompt": "1", "answer": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'{"prompt": "1", "answer": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "too deeply"),
    ],
)
def test_text_that_no_parser_takes_is_an_error_that_names_field_file_and_row(
    path: Path, line: bytes, problem: str
) -> None:
    path.write_bytes(GOOD.encode() + line)
    with pytest.raises(UserError) as caught:
        load_problems("evaluation.path", str(path))
    assert str(caught.value).startswith(f"evaluation.path = {str(path)!r}: row 4")
    assert problem in str(caught.value)


def test_a_missing_file_is_an_error_that_names_the_field() -> None:
    with pytest.raises(UserError, match=r"--problems = 'nowhere.jsonl': no such file"):
        load_problems("--problems", "nowhere.jsonl")


def test_a_limit_below_one_is_an_error(path: Path) -> None:
    path.write_text(GOOD)
    with pytest.raises(UserError, match="--limit = 0"):
        load_problems("evaluation.path", str(path), limit=0)


def test_answers_are_not_needed_where_they_are_not_used(path: Path) -> None:
    path.write_text('{"prompt": "1+1"}\n')
    assert load_problems("--problems", str(path), need_answers=False) == [Problem("1", "1+1", "")]
