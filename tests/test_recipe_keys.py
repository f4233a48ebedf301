"""What each key of a recipe states of itself, and the one way to change one."""

import json

import pytest

from kd.constants import FORMAT_VERSION
from kd.errors import UserError
from kd.recipe import Recipe, RecipeSection, default_of, facts_of, key_facts, load_recipe
from kd.study.cells import AXES

AXIS_KEYS = {
    "keep_fraction": "truncation.keep_fraction",
    "sections": "data.loss_sections",
    "window": "truncation.window",
    "rollout_tokens": "rollout.max_new_tokens",
}


def test_every_key_of_every_section_is_classified():
    keys = {
        f"{name}.{key}"
        for name, section in load_recipe("tiny_trunc50", ["rollout.max_new_tokens=8"])
        for key in type(section).model_fields
    }
    assert len(keys) > 60
    assert key_facts().keys() == keys


def test_a_key_that_states_nothing_is_found(monkeypatch):
    class Careless(RecipeSection):
        forgotten: int = 0

    monkeypatch.setattr(Recipe.model_fields["monitor"], "annotation", Careless)
    with pytest.raises(TypeError, match=r"monitor\.forgotten states 0 KeyFacts"):
        key_facts()


def test_what_may_change_is_neither_an_axis_nor_part_of_the_tokens():
    for name, facts in key_facts().items():
        assert not (facts.may_change and (facts.is_axis or facts.in_token_key)), name
        assert facts.in_token_key <= name.startswith("data."), name


@pytest.mark.parametrize(
    ("name", "may_change"),
    [
        ("evaluation.of_another_version", True),
        ("monitor.of_another_version", True),
        ("loss.of_another_version", False),
        ("training.of_another_version", False),
        ("unknown.key", False),
    ],
)
def test_a_key_of_another_version_is_as_its_section_where_that_is_of_one_kind(name, may_change):
    assert facts_of(name).may_change == may_change


def test_the_axes_of_a_study_are_keys_that_say_so():
    assert AXIS_KEYS.keys() == set(AXES)
    facts = key_facts()
    assert all(facts[name].is_axis for name in [*AXIS_KEYS.values(), "run.seed"])


def test_values_change_by_key_and_leave_the_recipe_as_it_was():
    recipe = load_recipe("tiny_trunc50")
    other = recipe.with_values({"truncation.keep_fraction": 0.25, "run.seed": 7})
    assert (other.truncation.keep_fraction, other.run.seed) == (0.25, 7)
    assert (recipe.truncation.keep_fraction, recipe.run.seed) == (0.5, 0)
    assert other.with_values({"truncation.keep_fraction": 0.5, "run.seed": 0}) == recipe


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"truncation.keep_fractoin": 0.5}, r"keep_fractoin.*Did you mean keep_fraction"),
        ({"truncatoin.keep_fraction": 0.5}, r"unknown section \[truncatoin\]"),
        ({"truncation.keep_fraction": 1.5}, r"truncation\.keep_fraction = 1\.5"),
        ({"loss.kd_weight": 0.0}, r"loss\.kd_weight = 0 never uses the \[teacher\]"),
        ({"seed": 1}, "unknown section"),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_name(values, message):
    with pytest.raises(UserError, match=message):
        load_recipe("tiny_trunc50").with_values(values)


def test_the_file_of_a_recipe_has_a_version_and_is_read_back(tmp_path):
    recipe, path = load_recipe("tiny_trunc50"), tmp_path / "recipe.json"
    path.write_text(json.dumps(recipe.as_file()))
    assert next(iter(json.loads(path.read_text()))) == "format_version"
    assert load_recipe(str(path)) == recipe


def test_a_file_of_version_1_which_has_none_is_read(tmp_path):
    recipe, path = load_recipe("tiny_trunc50"), tmp_path / "recipe.json"
    path.write_text(json.dumps(recipe.model_dump(mode="json")))
    assert load_recipe(str(path)) == recipe


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, 0, "two", None])
def test_a_version_that_is_not_known_is_one_message(tmp_path, version):
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(load_recipe("tiny_trunc50").as_file() | {"format_version": version}))
    with pytest.raises(UserError, match=f"format_version = {version!r}.* 1 to 2"):
        load_recipe(str(path))


def test_tables_are_merged_key_by_key_and_set_by_key(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(
        'base = "tiny"\n[data]\ndate = 2025-03-04\n[data.template_kwargs]\na = 1\nb = [1, "x"]\n'
    )
    recipe = load_recipe(str(path), ["data.template_kwargs.a=true", "data.template_kwargs.c=d"])
    assert recipe.data.template_kwargs == {"a": True, "b": [1, "x"], "c": "d"}
    assert recipe.data.date == "2025-03-04"
    inline = load_recipe(str(path), ["data.template_kwargs={enable_thinking = true}"])
    assert inline.data.template_kwargs == {"a": 1, "b": [1, "x"], "enable_thinking": True}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe.as_file()))
    assert load_recipe(str(tmp_path / "recipe.json")) == recipe


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.template_kwargs.messages=1", "messages is set by the program"),
        ("data.template_kwargs.add_generation_prompt=false", "add_generation_prompt is set by"),
        ("data.template_kwargs.tokenize=true", "tokenize is set by the program"),
        (
            "data.template_kwargs.enable-thinking=true",
            "'enable-thinking' cannot be the name of a template variable",
        ),
        ("data.template_kwargs.a.b=1", "'a.b' cannot be the name of a template variable"),
        ("data.template_kwargs.a=nan", "finite"),
        ("data.template_kwargs.a=2025-01-01", "JSON"),
        ("data.template_kwargs=true", r"data\.template_kwargs = True"),
        ("data.template_kwarg.a=1", "Did you mean template_kwargs"),
        ("training.max_steps.a=1", r"training\.max_steps = \{'a': 1\}"),
        ("data.date=2025-02-30", "2025-02-30.*day is out of range"),
        ("data.date=20250101", "YYYY-MM-DD"),
        ("data.date=1", "YYYY-MM-DD"),
        ("data.date=today", "YYYY-MM-DD"),
        ("data.date=2025-01-01T00:00:00", "YYYY-MM-DD"),
    ],
)
def test_a_variable_or_a_date_that_cannot_be_is_named(override, message):
    with pytest.raises(UserError, match=message):
        load_recipe("tiny_trunc50", [override])


@pytest.mark.parametrize(
    ("name", "default"),
    [
        ("data.template_kwargs", {}),
        ("data.date", "2024-07-26"),
        ("data.loss_sections", ["prompt", "cot", "answer"]),
        ("teacher.shard", "world"),
        ("student.model", None),
        ("data.of_another_version", None),
        ("unknown.key", None),
    ],
)
def test_a_key_that_a_file_lacks_has_its_default(name, default):
    assert default_of(name) == default


def test_a_table_of_keys_is_set_by_key_and_read_back(tmp_path):
    recipe = load_recipe("tiny_trunc50", ["student.lora.rank=8"])
    assert recipe.student.lora is not None
    assert (recipe.student.lora.rank, recipe.student.lora.alpha) == (8, 32.0)
    assert load_recipe("tiny_trunc50").student.lora is None
    other = recipe.with_values({"student.lora.target_modules": ("q_proj",)})
    assert (other.student.lora.rank, other.student.lora.target_modules) == (8, ("q_proj",))
    (tmp_path / "recipe.json").write_text(json.dumps(other.as_file()))
    assert load_recipe(str(tmp_path / "recipe.json")) == other
    assert facts_of("student.lora.rank") == facts_of("student.lora")


def test_a_table_is_replaced_where_a_value_changes_all_of_it():
    recipe = load_recipe("tiny_trunc50", ["data.template_kwargs={a = 1}"])
    changed = recipe.with_values({"data.template_kwargs": {"b": 2}})
    assert changed.data.template_kwargs == {"b": 2}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("student.lora.rnk=8", r"unknown key student\.lora\.rnk\. Did you mean rank"),
        ("student.lora.rank=0", r"student\.lora\.rank = 0: .*greater than 0"),
        ("student.lora.dropout=1.0", r"student\.lora\.dropout = 1\.0"),
        ("student.lora.target_modules=[]", r"student\.lora\.target_modules = \[\]"),
        ("student.lora=8", r"student\.lora = 8"),
    ],
)
def test_an_entry_of_a_table_that_cannot_be_is_named(override, message):
    with pytest.raises(UserError, match=message):
        load_recipe("tiny_trunc50", [override])


def test_adapters_are_refused_beside_random_weights():
    with pytest.raises(UserError, match=r'init = "random" with \[student\.lora\]'):
        load_recipe("tiny_trunc50", ["student.init=random", "student.lora.rank=8"])
