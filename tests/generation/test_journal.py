"""Splitting responses, and the file of traces through crashes."""

import json
from collections import Counter
from pathlib import Path

import pytest

from kd.errors import UserError
from kd.generation.journal import TraceFile, split_response
from kd.generation.sampling import Response
from kd.recipe import DataSection

DATA = DataSection(path="rows.jsonl")
SETTINGS = {"seed": 0, "batch_size": 2}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>\na b\n</think>\n\n4", ("a b", "4")),
        ("a b\n</think>\n4\n", ("a b", "4")),
        ("a b</think>4", ("a b", "4")),
        ("<think>a b", "unclosed"),
        ("", "unclosed"),
        ("a</think>b</think>c", "reopened"),
        ("a</think>4<think>b", "reopened"),
        ("a</think> \n", "no answer"),
        ("<think></think>4", "no answer"),
    ],
)
def test_a_response_is_split_at_its_markers_or_dropped_for_a_reason(
    text: str, expected: object
) -> None:
    assert split_response(Response(text, 9, True), DATA, "ended") == expected


def test_an_answer_that_was_cut_off_is_kept_only_on_demand() -> None:
    response = Response("a</think>4", 9, False)
    assert split_response(response, DATA, "ended") == "unended"
    assert split_response(response, DATA, "closed") == ("a", "4")


def batch(index: int) -> tuple[list[dict[str, str]], Counter[str]]:
    return [{"id": f"{index}-{row}", "reasoning": "r" * 9} for row in range(2)], Counter(
        kept=2, unclosed=index
    )


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    output = tmp_path / "deep" / "traces.jsonl"
    traces = TraceFile(output, SETTINGS)
    for index in range(3):
        traces.append(*batch(index))
    return output


def test_a_file_goes_on_where_it_stopped_and_appears_when_it_is_whole(begun: Path) -> None:
    assert not begun.exists()
    traces = TraceFile(begun, SETTINGS)
    assert (traces.num_batches, traces.complete) == (3, False)
    assert traces.counts == Counter(kept=6, unclosed=3)
    traces.append(*batch(3))
    traces.finish()
    rows = [json.loads(line) for line in begun.read_text().splitlines()]
    assert rows == [row for index in range(4) for row in batch(index)[0]]
    assert TraceFile(begun, SETTINGS).complete


@pytest.mark.parametrize("torn", ['{"id": "3-0", "reas', '{"id": "3-0"}\n{"id": "3-1"}\n'])
def test_rows_of_an_unfinished_batch_are_cut(begun: Path, torn: str) -> None:
    partial = begun.with_name("traces.jsonl.partial")
    whole = partial.read_text()
    partial.write_text(whole + torn)
    assert TraceFile(begun, SETTINGS).num_batches == 3
    assert partial.read_text() == whole


def test_a_batch_whose_journal_line_is_torn_is_done_again(begun: Path) -> None:
    journal = begun.with_name("traces.jsonl.progress")
    journal.write_bytes(journal.read_bytes()[:-5])
    traces = TraceFile(begun, SETTINGS)
    assert traces.num_batches == 2
    traces.append(*batch(2))
    traces.finish()
    assert len(begun.read_text().splitlines()) == 6


def test_other_settings_are_an_error_that_names_the_change(begun: Path) -> None:
    with pytest.raises(UserError, match=r"(?s)begun with other settings:\n  seed: 0 before, 1 now"):
        TraceFile(begun, {**SETTINGS, "seed": 1})


def test_settings_from_before_a_key_was_there_had_its_default(begun: Path) -> None:
    later = {**SETTINGS, "template_kwargs": {}, "date": "2024-07-26"}
    assert TraceFile(begun, later).num_batches == 3
    with pytest.raises(UserError, match="date: '2024-07-26' before, '2025-01-01' now"):
        TraceFile(begun, {**later, "date": "2025-01-01"})


def test_a_run_that_finished_no_batch_leaves_nothing_to_agree_with(tmp_path: Path) -> None:
    TraceFile(tmp_path / "traces.jsonl", SETTINGS)
    other = TraceFile(tmp_path / "traces.jsonl", {**SETTINGS, "seed": 1})
    other.append(*batch(0))
    assert TraceFile(tmp_path / "traces.jsonl", {**SETTINGS, "seed": 1}).num_batches == 1


def test_a_file_of_other_origin_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "traces.jsonl").write_text("mine\n")
    with pytest.raises(UserError, match="exists already"):
        TraceFile(tmp_path / "traces.jsonl", SETTINGS)
    assert (tmp_path / "traces.jsonl").read_text() == "mine\n"


def test_rows_that_went_missing_are_an_error(begun: Path) -> None:
    begun.with_name("traces.jsonl.partial").write_text("")
    with pytest.raises(UserError, match="shorter than"):
        TraceFile(begun, SETTINGS)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("garbage", "line 3: not valid JSON"),
        ('{"num_bytes": -1, "counts": {}}', "line 3: num_bytes = -1"),
        ('{"num_bytes": true, "counts": {}}', "line 3: num_bytes = True"),
        ('{"num_bytes": 9, "counts": 5}', "line 3: counts = 5"),
        ("[]", "line 3"),
    ],
)
def test_a_damaged_journal_is_named_with_its_line_and_nothing_is_cut(
    begun: Path, line: str, message: str
) -> None:
    journal, rows = (begun.with_name(f"traces.jsonl.{end}") for end in ("progress", "partial"))
    lines, size = journal.read_text().splitlines(), rows.stat().st_size
    journal.write_text("\n".join([*lines[:2], line, *lines[3:]]) + "\n")
    with pytest.raises(UserError, match=f"traces.jsonl.progress: {message}"):
        TraceFile(begun, SETTINGS)
    assert rows.stat().st_size == size
