"""Shares of several ranks, killed at any point, against the file of one."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from kd.errors import UserError
from kd.generation import shares
from kd.generation.journal import TraceFile
from kd.generation.shares import join_shares, open_share

SETTINGS = {"seed": 0}
NUM_BATCHES = 7


def fill(output: Path, rank: int, num_ranks: int, stop: int = NUM_BATCHES) -> TraceFile:
    """A rank's share of seven batches, batch b of b % 3 rows, up to `stop`."""
    traces = open_share(output, SETTINGS, rank, num_ranks)
    if traces.complete:
        return traces
    for batch in range(NUM_BATCHES)[rank::num_ranks][traces.num_batches :]:
        if batch >= stop:
            return traces
        rows = [{"id": f"{batch}-{row}", "text": "\u2028é" * batch} for row in range(batch % 3)]
        traces.append(rows, Counter({"kept": len(rows), "unclosed": 2}))
    traces.finish()
    return traces


@pytest.fixture
def whole(tmp_path_factory: pytest.TempPathFactory) -> TraceFile:
    return fill(tmp_path_factory.mktemp("whole") / "traces.jsonl", 0, 1)


def check_is(output: Path, whole: TraceFile) -> None:
    assert output.read_bytes() == whole.output.read_bytes() != b""
    journal = output.with_name("traces.jsonl.progress")
    assert journal.read_bytes() == whole.journal.read_bytes()
    names = {path.name for path in output.parent.iterdir()} - {".traces.jsonl.lock"}
    assert names == {"traces.jsonl", "traces.jsonl.progress"}


@pytest.mark.parametrize("num_ranks", [2, 3, 7])
def test_joined_shares_are_the_file_and_the_journal_of_one_rank(
    num_ranks: int, tmp_path: Path, whole: TraceFile
) -> None:
    output = tmp_path / "traces.jsonl"
    for rank in reversed(range(num_ranks)):
        assert join_shares(output, SETTINGS, num_ranks) is None
        fill(output, rank, num_ranks)
        assert not output.exists()
    joined = join_shares(output, SETTINGS, num_ranks)
    assert joined is not None
    assert joined.counts == whole.counts == Counter(kept=6, unclosed=14)
    check_is(output, whole)
    for rank in range(num_ranks):
        assert open_share(output, SETTINGS, rank, num_ranks).complete
    assert open_share(output, SETTINGS, 0, 1).complete, "whole is whole on any number of ranks"


def test_a_killed_rank_continues_its_share(tmp_path: Path, whole: TraceFile) -> None:
    output = tmp_path / "traces.jsonl"
    fill(output, 0, 2)
    begun = fill(output, 1, 2, stop=4)
    with begun.partial.open("a") as file:
        file.write('{"id": "torn')
    assert join_shares(output, SETTINGS, 2) is None
    assert open_share(output, SETTINGS, 1, 2).num_batches == 2
    fill(output, 1, 2)
    assert join_shares(output, SETTINGS, 2) is not None
    check_is(output, whole)


@pytest.mark.parametrize("function", ["write_lines", "os.replace"])
def test_a_join_that_was_killed_is_done_again(
    function: str, tmp_path: Path, whole: TraceFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "traces.jsonl"
    for rank in range(2):
        fill(output, rank, 2)

    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(f"kd.generation.shares.{function}", die)
        with pytest.raises(KeyboardInterrupt):
            join_shares(output, SETTINGS, 2)
    assert not output.exists()
    for rank in range(2):
        assert open_share(output, SETTINGS, rank, 2).complete
    assert join_shares(output, SETTINGS, 2) is not None
    check_is(output, whole)


def test_shares_that_a_killed_join_left_are_removed(tmp_path: Path, whole: TraceFile) -> None:
    output = tmp_path / "traces.jsonl"
    for rank in range(2):
        fill(output, rank, 2)
    shares._join(output, SETTINGS, [open_share(output, SETTINGS, rank, 2) for rank in range(2)])
    assert (tmp_path / "traces.jsonl.1-of-2").exists()
    assert open_share(output, SETTINGS, 1, 2).complete
    assert join_shares(output, SETTINGS, 2) is not None
    check_is(output, whole)


@pytest.mark.parametrize(("before", "now"), [(1, 2), (2, 1), (2, 3), (10, 2)])
def test_another_number_of_ranks_is_refused_with_both(
    before: int, now: int, tmp_path: Path
) -> None:
    output = tmp_path / "traces.jsonl"
    fill(output, 0, before, stop=1)
    with pytest.raises(UserError) as caught:
        open_share(output, SETTINGS, 0, now)
    assert f"was begun with {before} ranks, but there are {now} now" in str(caught.value)
    assert open_share(output, SETTINGS, 0, before).num_batches == 1


def test_other_settings_are_refused_in_a_share_too(tmp_path: Path) -> None:
    output = tmp_path / "traces.jsonl"
    fill(output, 0, 2, stop=1)
    with pytest.raises(UserError, match="seed: 0 before, 1 now"):
        open_share(output, {"seed": 1}, 0, 2)


def test_what_an_earlier_version_did_not_say_is_as_it_was_then(tmp_path: Path) -> None:
    output = tmp_path / "traces.jsonl"
    fill(output, 0, 1, stop=1)
    now = {**SETTINGS, "backend": "transformers", "num_samples": 1}
    assert open_share(output, now, 0, 1).num_batches == 1
    with pytest.raises(UserError, match="num_samples: 1 before, 2 now"):
        open_share(output, now | {"num_samples": 2}, 0, 1)


def test_an_output_whose_name_begins_alike_keeps_its_shares(
    tmp_path: Path, whole: TraceFile
) -> None:
    longer = tmp_path / "traces.jsonl.v2"
    fill(longer, 0, 2, stop=4)
    output = tmp_path / "traces.jsonl"
    fill(output, 0, 1)
    assert join_shares(output, SETTINGS, 1) is not None
    shares.remove_shares(output)
    assert not output.exists()
    for rank in range(2):
        fill(output, rank, 2)
    assert join_shares(output, SETTINGS, 2) is not None
    assert output.read_bytes() == whole.output.read_bytes()
    assert open_share(longer, SETTINGS, 0, 2).num_batches == 2
    fill(longer, 0, 2)
    fill(longer, 1, 2)
    joined = join_shares(longer, SETTINGS, 2)
    assert joined is not None
    assert joined.output.read_bytes() == whole.output.read_bytes()
