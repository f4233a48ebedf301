"""What is made of a server's answers, without a server: the shift by one position, the likeliest K,
and when the numbers are refused.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kd.cache.kinds import HiddenKind, Kind, TopKKind
from kd.data.dataset import Example
from kd.errors import UserError
from kd.recipe import TeacherSection
from kd.training import fill_from_server as module
from kd.training.fill_from_server import Reader, _check_arguments, check_server, mean_distance

IDS = np.array([3, 1, 2])
EXAMPLE = Example(IDS, IDS, 0, np.array([1, 1, 1]), 0)
# Of tokens 1 and 2, and of the one after: a token that is there, however unlikely, comes first
ANSWER = {
    "prompt_logprobs": [
        None,
        {"1": {"logprob": -9.0}, "0": {"logprob": -0.1}, "3": {"logprob": -2.5}},
        {"2": {"logprob": -0.5}, "5": {"logprob": -1.0}, "1": {"logprob": -3.0}},
    ],
    "logprobs": {"top_logprobs": [{"token_id:4": -0.2, "token_id:0": -1.8}]},
}


class Server:
    """Gives the answer, and writes down what it was asked."""

    url = "http://127.0.0.1:8000"

    def __init__(self, *answers: Any) -> None:
        self.answers, self.asked = list(answers), []

    def complete(self, prompt: list[int], **parameters: Any) -> dict[str, Any]:
        self.asked.append({"prompt": prompt, **parameters})
        return self.answers[min(len(self.asked), len(self.answers)) - 1]


def test_what_is_said_of_a_token_belongs_to_the_position_before_it() -> None:
    server = Server(ANSWER)
    fields = Reader(server, TopKKind(2), 6, 6).read(EXAMPLE)
    assert fields["ids"].tolist() == [[0, 3], [2, 5], [4, 0]]
    expected = torch.tensor([[-0.1, -2.5], [-0.5, -1.0], [-0.2, -1.8]])
    torch.testing.assert_close(fields["logprobs"], expected)
    assert fields["ids"].dtype == torch.int32
    (asked,) = server.asked
    assert (asked["prompt"], asked["max_tokens"], asked["temperature"]) == ([3, 1, 2], 1, 1.0)
    assert (asked["prompt_logprobs"], asked["logprobs"]) == (2, 2)


def test_tokens_that_the_student_lacks_are_left_out_and_more_are_asked_for() -> None:
    answer = {**ANSWER, "logprobs": {"top_logprobs": [{"token_id:4": -0.2, "token_id:0": -1.8}]}}
    server = Server(answer)
    reader = Reader(server, TopKKind(1), vocab_size=4, teacher_vocab_size=6)
    assert reader.read(EXAMPLE)["ids"].tolist() == [[0], [2], [0]]
    assert server.asked[0]["prompt_logprobs"] == 3
    with pytest.raises(UserError, match="--num-tokens 2: the student has only"):
        Reader(server, TopKKind(2), vocab_size=4, teacher_vocab_size=6).read(EXAMPLE)
    with pytest.raises(UserError, match="--num-tokens 9: the models share only 4 tokens"):
        Reader(server, TopKKind(9), vocab_size=4, teacher_vocab_size=6)


@pytest.mark.parametrize("answer", [{}, {**ANSWER, "logprobs": None}, {"prompt_logprobs": None}])
def test_an_answer_without_log_probabilities_is_named(answer: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="lacks prompt_logprobs or logprobs"):
        Reader(Server(answer), TopKKind(2), 6, 6).read(EXAMPLE)


def rows(*tokens: tuple[int, float]) -> dict[str, torch.Tensor]:
    ids = torch.tensor([[token for token, _ in tokens]])
    return {"ids": ids, "logprobs": torch.tensor([[p for _, p in tokens]]).log()}


def test_the_distance_is_total_variation_whatever_the_order() -> None:
    left, right = rows((0, 0.6), (1, 0.4)), rows((1, 0.3), (2, 0.7))
    assert mean_distance([left], [left]) == 0.0
    assert mean_distance([left], [rows((1, 0.4), (0, 0.6))]) == pytest.approx(0.0, abs=1e-6)
    assert mean_distance([left], [right]) == pytest.approx((0.6 + 0.1 + 0.7) / 2)
    assert mean_distance([left, left], [left, right]) == pytest.approx(0.35)


def test_readings_that_differ_are_refused_with_both_numbers(tmp_path: Path) -> None:
    other = {**ANSWER, "logprobs": {"top_logprobs": [{"token_id:1": -0.2, "token_id:2": -1.8}]}}
    reader = Reader(Server(ANSWER, other), TopKKind(2), 6, 6)
    teacher = TeacherSection(model=str(tmp_path))
    with pytest.raises(UserError) as caught:
        check_server(reader, teacher, [EXAMPLE])
    assert "http://127.0.0.1:8000 and its second answer differ by 0.328" in str(caught.value)
    assert "more than the 0.01 allowed" in str(caught.value)
    check_server(Reader(Server(ANSWER), TopKKind(2), 6, 6), teacher, [EXAMPLE])


def test_numbers_that_are_not_the_teachers_are_refused_with_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "weights_folder", lambda teacher, role: tmp_path)
    reader, teacher = Reader(Server(ANSWER), TopKKind(2), 6, 6), TeacherSection(model="a/teacher")
    same = reader.read(EXAMPLE)
    for ids, is_refused in ((same["ids"], False), ((same["ids"] + 1) % 6, True)):
        here = {"ids": ids, "logprobs": same["logprobs"]}
        monkeypatch.setattr(module, "_of_teacher", lambda *_, here=here: [here])
        if not is_refused:
            check_server(reader, teacher, [EXAMPLE])
            continue
        with pytest.raises(
            UserError, match=r"and the local teacher differ by 0\.\d+ .* 0.03 allowed"
        ):
            check_server(reader, teacher, [EXAMPLE])


@pytest.mark.parametrize(
    ("kind", "world_size", "message"),
    [
        (HiddenKind(), "1", "--kind hidden with --server URL"),
        (TopKKind(2, 2.0), "1", "loss.temperature = 2.0 with --server URL"),
        (TopKKind(2), "2", "WORLD_SIZE = 2 with --server URL"),
    ],
)
def test_what_a_server_cannot_fill_is_refused(
    kind: Kind, world_size: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", world_size)
    with pytest.raises(UserError, match=message):
        _check_arguments(kind, "URL")
