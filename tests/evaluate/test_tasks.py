"""Public benchmarks, on local stand-ins in the form of the hub datasets."""

from collections.abc import Callable
from pathlib import Path

import datasets
import pytest

from kd.errors import UserError
from kd.evaluate.problems import Problem
from kd.evaluate.tasks import INSTRUCTION, TASKS, load_task, main, parse_tasks

StandIn = Callable[..., None]
ANSWERS = {
    "aime24": "204",
    "aime25": "70",
    "amc23": "27.0",
    "math500": r"\left( 3, \frac{\pi}{2} \right)",
    "minerva_math": "1.6",
    "olympiadbench": "$1$, $2$",
    "gsm8k": "1008",
}


@pytest.mark.parametrize("name", TASKS)
def test_a_task_gives_its_problems_with_the_instruction_and_the_final_answer(
    name: str, stand_in: StandIn
) -> None:
    stand_in(name)
    problem = load_task(name)[0]
    assert problem.answer == ANSWERS[name]
    assert problem.id == "1"
    assert problem.prompt.endswith(f"\n{INSTRUCTION}")
    assert len(problem.prompt) > len(INSTRUCTION) + 1


def test_a_limit_takes_the_first_problems(stand_in: StandIn) -> None:
    stand_in("aime24")
    assert len(load_task("aime24")) == 2
    assert load_task("aime24", limit=1) == [Problem("1", f"1+2\n{INSTRUCTION}", "204")]
    with pytest.raises(UserError, match="--limit = 0"):
        load_task("aime24", limit=0)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"question": "4*2", "solution": "8"}],
            "has no column 'answer'; its columns are question, solution",
        ),
        (
            [{"question": "4*2", "answer": "so it is 8"}],
            "row 1 has no usable 'answer': 'so it is 8'",
        ),
        (
            [{"question": "1", "answer": "#### 1"}, {"question": " ", "answer": "#### 8"}],
            "row 2 has no usable 'quest",
        ),
    ],
)
def test_a_dataset_of_another_form_is_an_error_that_names_task_dataset_and_column(
    rows: list[dict[str, object]], message: str, stand_in: StandIn
) -> None:
    stand_in("gsm8k", rows)
    with pytest.raises(UserError) as caught:
        load_task("gsm8k")
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"--tasks gsm8k: {TASKS['gsm8k'].hub_id!r}")


def test_a_task_out_of_reach_says_how_to_fetch_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(UserError) as caught:
        load_task("aime24")
    assert str(caught.value).startswith(
        "--tasks aime24 = 'HuggingFaceH4/aime_2024': the hub cannot be reached"
    )
    assert "python -m kd.evaluate.tasks aime24" in str(caught.value)


def test_an_unknown_task_is_an_error_with_the_nearest_names() -> None:
    assert parse_tasks(["gsm8k", " aime24", "gsm8k"]) == ["gsm8k", "aime24"]
    with pytest.raises(
        UserError,
        match=r"(?s)'amie24' is not a task. Did you mean aime24.*The tasks are aime24, aime25",
    ):
        parse_tasks(["gsm8k", "amie24"])
    with pytest.raises(UserError, match="name at least one of aime24"):
        parse_tasks([" ", ""])


def test_fetching_says_how_many_problems_there_are(
    stand_in: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in("aime24")
    main(["aime24"])
    assert capsys.readouterr().out.startswith("aime24: 2 problems of ")
