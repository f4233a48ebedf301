"""Results on disk and in a table."""

import json
from pathlib import Path

import pytest

from kd.errors import UserError
from kd.evaluate.evaluation import is_scored, judging_sha256
from kd.evaluate.problems import Problem
from kd.evaluate.results import read_responses, response_rows, results, table, write_evaluation
from kd.evaluate.score import Summary, Verdict
from kd.files import write_json, write_jsonl
from kd.generation.backends import Backend, Subject
from kd.generation.sampling import Response, Sampling
from kd.recipe import ModelSection, Recipe

SUMMARY = Summary(
    accuracy=0.5,
    ci95=(0.2366, 0.7634),
    num_problems=10,
    num_samples=1,
    num_correct=5,
    pass_at_k={"1": 0.5},
    mean_response_tokens=81.25,
    unclosed_fraction=0.1,
    unended_fraction=0.0,
    num_judge_timeouts=0,
)
RECIPE = Recipe.model_validate(
    {
        "run": {"name": "tiny"},
        "student": {"model": "owner/student"},
        "data": {"path": "rows.jsonl"},
        "loss": {"kd_weight": 0.0},
    }
)
SECTION = ModelSection(model="runs/half/student")
SUBJECT = Subject(
    "half",
    SECTION,
    tokenizer=None,
    sampling=Sampling(96, 0.6, 0.95, 7),
    backend=Backend("vllm", "1"),
    load=None,
)  # type: ignore[arg-type]
CONTENT = results(
    RECIPE,
    SUBJECT,
    SUMMARY,
    task=None,
    problems="report.jsonl",
    judge="exact",
    backend="vllm 1",
    fingerprint="f1",
)
PROBLEMS = [Problem("a", "1+1", "2"), Problem("b", "2+2", "4")]
RESPONSES = [Response(f"text {index}", index, ended=index > 1) for index in range(4)]
ROWS = response_rows(PROBLEMS, RESPONSES, [Verdict("2", correct=True, closed=True)] * 4)


def test_results_hold_all_that_repeats_the_evaluation(tmp_path: Path) -> None:
    write_json(tmp_path / "new" / "half.json", CONTENT)
    found = json.loads((tmp_path / "new" / "half.json").read_text())
    assert found["accuracy"] == 0.5
    assert found["ci95"] == [0.2366, 0.7634]
    assert found["sampling"] == {"max_new_tokens": 96, "temperature": 0.6, "top_p": 0.95, "seed": 7}
    assert (found["model"], found["recipe"], found["judge"]) == (
        "runs/half/student",
        "tiny",
        "exact",
    )
    assert found["environment"]["packages"]["torch"]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["half.json"]


def test_the_table_has_a_line_per_model_and_columns_that_line_up() -> None:
    lines = table([CONTENT, {**CONTENT, "label": "a longer label", "accuracy": 1.0}]).splitlines()
    assert lines[0].split() == [
        "model",
        "accuracy",
        "95",
        "%",
        "interval",
        "problems",
        "tokens",
        "unclosed",
    ]
    assert lines[2].split() == ["half", "0.500", "0.237-0.763", "10", "81.2", "0.100"]
    assert len({len(line) for line in lines}) == 1


def test_the_table_shows_tasks_and_samples_where_there_are_some() -> None:
    sampled = {
        **CONTENT,
        "task": "aime24",
        "num_samples": 4,
        "pass_at_k": {"1": 0.5, "2": 0.6, "4": 0.75},
    }
    lines = table([CONTENT, sampled]).splitlines()
    assert lines[0].split()[-3:] == ["task", "samples", "pass@"]
    assert [line.split()[-3:] for line in lines[2:]] == [
        ["-", "1", "0.500"],
        ["aime24", "4", "0.750"],
    ]


def test_each_sample_of_a_problem_is_a_row() -> None:
    assert [(row["id"], row["sample"], row["response"]) for row in ROWS] == [
        ("a", 0, "text 0"),
        ("a", 1, "text 1"),
        ("b", 0, "text 2"),
        ("b", 1, "text 3"),
    ]


def test_responses_are_read_again_only_under_their_fingerprint(tmp_path: Path) -> None:
    write_evaluation(tmp_path, CONTENT, ROWS)
    assert read_responses(tmp_path, "half", "f1") == RESPONSES
    assert read_responses(tmp_path, "half", "f2") is None
    assert read_responses(tmp_path, "other", "f1") is None


def test_results_of_other_settings_are_set_aside_and_not_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_evaluation(tmp_path, CONTENT, ROWS)
    write_evaluation(tmp_path, CONTENT, ROWS)
    assert not (tmp_path / "replaced").exists()
    write_evaluation(tmp_path, {**CONTENT, "fingerprint": "f2"}, ROWS[:1])
    assert str(tmp_path / "replaced" / "f1") in capsys.readouterr().out
    assert read_responses(tmp_path, "half", "f1") == RESPONSES  # found where it was put
    assert read_responses(tmp_path, "half", "f2") == RESPONSES[:1]


def test_rows_keep_characters_beyond_ascii(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [{"response": "\u03c0"}, {"response": "2"}])
    assert (tmp_path / "rows.jsonl").read_text(
        encoding="utf-8"
    ) == '{"response": "\u03c0"}\n{"response": "2"}\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", r"it holds \[\], not an object"),
        ('{"label": "half"}', "model is missing"),
    ],
)
def test_damaged_results_are_named_and_not_replaced(
    tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "half.json"
    path.write_text(text)
    with pytest.raises(UserError, match=f"half.json: {message}.*evaluate the model again"):
        write_evaluation(tmp_path, CONTENT, ROWS)
    with pytest.raises(UserError, match="half.json: "):
        read_responses(tmp_path, "half", "f1")
    with pytest.raises(UserError, match="half.json: "):
        is_scored(RECIPE, [path])
    assert path.read_text() == text


def test_a_damaged_response_is_named_with_its_line(tmp_path: Path) -> None:
    write_evaluation(tmp_path, CONTENT, [*ROWS[:1], {**ROWS[1], "num_tokens": "3"}])
    with pytest.raises(UserError, match="half.responses.jsonl: line 2: num_tokens = '3'"):
        read_responses(tmp_path, "half", "f1")


def test_a_model_is_scored_where_problems_judge_and_sampling_are_the_recipes(
    tmp_path: Path,
) -> None:
    path = tmp_path / "half.json"
    assert not is_scored(RECIPE, [path])
    sampling = {"max_new_tokens": 32768, "temperature": 0.6, "top_p": 0.95, "seed": 0}
    problems = tmp_path / "report.jsonl"
    recipe = RECIPE.with_values({"evaluation.path": str(problems)})
    facts = {"judge": "math", "sampling": sampling, "problems": str(problems)}
    judging = judging_sha256([Problem("0", "1+1", "2")], "math", recipe.data.think_close)
    fitting = {**CONTENT, **facts, "judging_sha256": judging}
    for answer, expected in (("3", False), ("2", True)):
        problems.write_text(json.dumps({"prompt": "1+1", "answer": answer}) + "\n")
        write_json(path, fitting)
        assert is_scored(recipe, [path]) == expected
    for changes, expected in (
        ({}, True),
        ({"judge": "exact"}, False),
        ({"sampling": {**sampling, "top_p": 1.0}}, False),
        ({"problems": "others.jsonl"}, False),
    ):
        write_json(path, {**fitting, **changes})
        assert is_scored(recipe, [path]) == expected
