"""Responses batch by batch, through interruptions and changes of settings."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from kd.generation.backends import Request
from kd.generation.responses import fingerprint, in_order, open_progress, respond
from kd.generation.sampling import Response
from kd.generation.shares import join_shares, remove_shares

SETTINGS = {"model": "a", "seed": 0}
REQUESTS = [Request(f"{index}/0", "x" * (index % 5)) for index in range(11)]


class Interrupted(Exception):
    pass


class Generator:
    """Responses that tell request and batch; ends by an exception at batch `stop`."""

    def __init__(self, stop: int = 99) -> None:
        self.stop = stop
        self.batches: list[int] = []

    def __call__(self, requests: Sequence[Request], batch_index: int) -> list[Response]:
        if batch_index == self.stop:
            raise Interrupted
        self.batches.append(batch_index)
        return [
            Response(f"{request.key} in {batch_index}\n\u2028", len(request.prompt), True)
            for request in requests
        ]


def run(
    folder: Path, generator: Generator, settings: dict[str, object] = SETTINGS
) -> list[Response]:
    output = folder / f"label.{fingerprint(settings)}"
    progress = open_progress(output, settings)
    respond(REQUESTS, 3, lambda: generator, progress)
    return in_order(progress)


def test_responses_are_in_the_order_of_the_requests_and_batches_hold_similar_lengths(
    tmp_path: Path,
) -> None:
    responses = run(tmp_path, Generator())
    assert [response.text.split()[0] for response in responses] == [
        request.key for request in REQUESTS
    ]
    batches = [response.text.split()[2] for response in responses]
    assert {len(REQUESTS[index].prompt) for index in range(11) if batches[index] == "0"} == {3, 4}


def test_an_interrupted_evaluation_goes_on_and_gives_the_responses_of_an_uninterrupted_one(
    tmp_path: Path,
) -> None:
    whole = run(tmp_path / "whole", Generator())
    with pytest.raises(Interrupted):
        run(tmp_path / "cut", Generator(stop=2))
    with next((tmp_path / "cut").glob("*.partial")).open("a") as file:
        file.write('{"position": 7, "text": "to')
    second = Generator()
    assert run(tmp_path / "cut", second) == whole
    assert second.batches == [2, 3]


def test_a_model_whose_responses_are_all_there_is_not_loaded(tmp_path: Path) -> None:
    whole = run(tmp_path, Generator())
    output = tmp_path / f"label.{fingerprint(SETTINGS)}"
    progress = open_progress(output, SETTINGS)
    respond(REQUESTS, 3, lambda: pytest.fail("loaded"), progress)
    assert in_order(progress) == whole
    (tmp_path / f"label.{'0' * 12}.progress").touch()
    remove_shares(output)
    assert [path.name for path in tmp_path.iterdir()] == [f"label.{'0' * 12}.progress"]


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_shares_of_several_ranks_hold_the_responses_of_one(num_ranks: int, tmp_path: Path) -> None:
    whole = run(tmp_path / "one", Generator())
    output = tmp_path / f"label.{fingerprint(SETTINGS)}"
    for rank in reversed(range(num_ranks)):
        assert join_shares(output, SETTINGS, num_ranks) is None
        generator, share = Generator(), open_progress(output, SETTINGS, rank, num_ranks)
        respond(REQUESTS, 3, lambda generator=generator: generator, share, rank, num_ranks)
        assert generator.batches == list(range(4))[rank::num_ranks]
    joined = join_shares(output, SETTINGS, num_ranks)
    assert joined is not None
    assert in_order(joined) == whole


def test_responses_of_other_settings_are_neither_mixed_in_nor_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Interrupted):
        run(tmp_path, Generator(stop=2))
    other = Generator()
    run(tmp_path, other, {**SETTINGS, "seed": 1})
    assert other.batches == [0, 1, 2, 3]
    assert (
        f"label: an earlier one with other settings is kept: "
        f"label.{fingerprint(SETTINGS)}.progress" in (capsys.readouterr().out)
    )
    first = Generator()
    run(tmp_path, first)
    assert first.batches == [2, 3]
