"""Which cells a study has, and what is refused before the first of them starts."""

import json
from pathlib import Path

import pytest
from tiny import write_tiny_recipe

from kd.errors import UserError
from kd.study.cells import Axes, Outcome, make_study, parse_axes, write_study

ALL = ("prompt", "cot", "answer")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> str:
    return str(write_tiny_recipe(tmp_path_factory.mktemp("cells"), num_rows=10))


def names(recipe: str, axes: Axes) -> list[str]:
    return [cell.point.name for cell in make_study(recipe, [], axes).cells]


def test_without_axes_a_study_is_the_recipe_alone(recipe: str):
    assert names(recipe, Axes()) == ["keep0.5_prompt+cot+answer_head_seed0"]


def test_one_axis_is_varied_at_a_time_and_a_shared_cell_is_there_once(recipe: str):
    axes = Axes(keep_fraction=(0.5, 1.0), sections=(ALL, ("cot",)), window=("head", "tail"))
    assert names(recipe, axes) == [
        "keep0.5_prompt+cot+answer_head_seed0",
        "keep1_prompt+cot+answer_head_seed0",
        "keep0.5_cot_head_seed0",
        "keep0.5_prompt+cot+answer_tail_seed0",
    ]


def test_crossed_axes_have_one_window_where_nothing_is_cut(recipe: str):
    axes = Axes(keep_fraction=(0.5, 1.0), window=("head", "tail"), cross=True)
    assert names(recipe, axes) == [
        "keep0.5_prompt+cot+answer_head_seed0",
        "keep0.5_prompt+cot+answer_tail_seed0",
        "keep1_prompt+cot+answer_head_seed0",
    ]


def test_each_seed_has_all_cells_and_the_first_is_the_recipes_own(recipe: str):
    axes = Axes(keep_fraction=(0.5, 1.0), num_seeds=2)
    study = make_study(recipe, ["run.seed=7"], axes)
    assert [(cell.point.keep_fraction, cell.point.seed) for cell in study.cells] == [
        (0.5, 7),
        (1.0, 7),
        (0.5, 8),
        (1.0, 8),
    ]
    assert [cell.recipe.run.seed for cell in study.cells] == [7, 7, 8, 8]


def test_a_cell_is_the_recipe_with_its_place_on_the_axes_in_the_studys_folder(recipe: str):
    axes = Axes(
        keep_fraction=(0.25,), sections=(("cot", "answer"),), window=("middle",), cross=True
    )
    (cell,) = make_study(recipe, ["training.max_steps=3"], axes).cells
    assert cell.recipe.truncation.keep_fraction == 0.25
    assert cell.recipe.data.loss_sections == ("cot", "answer")
    assert cell.recipe.truncation.window == "middle"
    assert cell.recipe.training.max_steps == 3
    assert (
        cell.recipe.run_dir
        == Path(recipe).parent / "runs/studies/tiny_test/keep0.25_cot+answer_middle_seed0"
    )


def test_text_of_the_command_line_becomes_axes():
    axes = parse_axes("0.25, 1", "answer+prompt,cot", "tail", 3, True)
    assert axes == Axes((0.25, 1.0), (("prompt", "answer"), ("cot",)), ("tail",), (), 3, True)
    assert parse_axes(None, None, None, 1, False) == Axes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("0", None, None, 1, False), "--keep 0: write a fraction above 0 and at most 1"),
        (("half", None, None, 1, False), "--keep half: write a fraction"),
        (("0.5,", None, None, 1, False), "--keep 0.5,: write distinct values"),
        (("0.5,0.5", None, None, 1, False), "--keep 0.5,0.5: write distinct values"),
        (
            (None, "cot+thought", None, 1, False),
            "--sections cot+thought: join any of prompt, cot, answer",
        ),
        ((None, "cot+cot", None, 1, False), "--sections cot\\+cot: join any of"),
        ((None, None, "left", 1, False), "--windows left: choose from head, middle, tail"),
        ((None, None, None, 0, False), "--seeds 0: write a number from 1 to 1000"),
        ((None, None, None, 10**9, False), "--seeds 1000000000: write a number from 1 to 1000"),
    ],
)
def test_values_that_are_none_are_refused(arguments: tuple, message: str):
    with pytest.raises(UserError, match=message.replace("cot+thought", r"cot\+thought")):
        parse_axes(*arguments)


def test_windows_of_a_whole_trace_are_refused(recipe: str):
    with pytest.raises(
        UserError, match=r"--windows middle,tail: at truncation\.keep_fraction = 1 nothing is cut"
    ):
        make_study(recipe, ["truncation.keep_fraction=1.0"], Axes(window=("middle", "tail")))


def test_a_base_is_a_recipe_that_a_study_can_vary():
    study = make_study("tiny", [], Axes(window=("head", "tail")))
    assert study.folder == Path("runs/studies/tiny")
    assert [cell.recipe.deepspeed.student for cell in study.cells] == ["zero3_cpu.json"] * 2


def test_the_file_of_a_study_keeps_cells_of_earlier_starts_and_their_outcomes(
    recipe: str, tmp_path: Path
):
    first = make_study(recipe, [], Axes(keep_fraction=(0.5, 1.0)), tmp_path)
    write_study(first, {first.cells[0].point: Outcome("done", "0.9")})
    second = make_study(recipe, [], Axes(keep_fraction=(0.25, 0.5)), tmp_path)
    write_study(second)
    cells = json.loads((tmp_path / "study.json").read_text())["cells"]
    assert [(cell["axes"]["keep_fraction"], cell["status"]) for cell in cells] == [
        (0.5, "done"),
        (1.0, "pending"),
        (0.25, "pending"),
    ]


@pytest.mark.parametrize("text", ["{", "[]", '{"cells": 5}', '{"recipe": "tiny"}'])
def test_a_damaged_file_of_a_study_is_named_and_stays_as_it_is(
    recipe: str, tmp_path: Path, text: str
):
    (tmp_path / "study.json").write_text(text)
    with pytest.raises(UserError, match="study.json: .*: restore it or remove it"):
        write_study(make_study(recipe, [], Axes(), tmp_path))
    assert (tmp_path / "study.json").read_text() == text


def test_cells_that_would_share_a_folder_are_refused(recipe: str):
    with pytest.raises(UserError, match=r"--keep 0\.1234561,0\.1234562"):
        make_study(recipe, [], Axes(keep_fraction=(0.1234561, 0.1234562)))


def test_lengths_of_rollouts_are_an_axis_of_a_recipe_that_has_some(tmp_path: Path):
    axes = parse_axes(None, None, None, 2, cross=False, rollout_tokens="16,32")
    sampling = ["rollout.fraction=1.0"]
    study = make_study("tiny", sampling, axes, tmp_path)
    names = [cell.point.name for cell in study.cells]
    own = "keep0.5_prompt+cot+answer_head"
    assert names == [f"{own}_rollout{n}_seed{seed}" for seed in (0, 1) for n in (16, 32)]
    assert [cell.recipe.rollout.max_new_tokens for cell in study.cells] == [16, 32, 16, 32]
    with pytest.raises(
        UserError, match=r"--rollout-tokens 16,32: tiny has no \[rollout\]: add one"
    ):
        make_study("tiny", [], axes, tmp_path)
    with pytest.raises(UserError, match="--rollout-tokens 0: write whole numbers"):
        parse_axes(None, None, None, 1, cross=False, rollout_tokens="0")
