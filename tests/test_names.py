"""Names that become files: one plain name, whatever its letters."""

import pytest

from kd.errors import UserError
from kd.names import MAX_NAME_BYTES, check_name, shortened
from kd.recipe import load_recipe

BAD_NAMES = {
    "blank": "  ",
    "this folder": ".",
    "parent": "..",
    "way out": "../../x",
    "absolute": "/etc/passwd",
    "below": "a/b",
    "backslash": "a\\b",
    "option": "-rf",
    "nul": "a\0b",
    "line": "a\nb",
    "line at the end": "a\n",
    "escape": "a\x1b[2J",
    "line separator": "a\u2028b",
    "surrogate": "a\ud800",
    "long": "a" * 300,
    "long in bytes": "\u03c0" * 150,
}


@pytest.mark.parametrize("name", BAD_NAMES.values(), ids=BAD_NAMES)
def test_what_is_not_one_plain_name_is_refused_as_a_name_of_a_run(name):
    with pytest.raises(UserError, match=r"run\.name = "):
        load_recipe("tiny_trunc50").with_values({"run.name": name})
    with pytest.raises(UserError, match="--label = .*: choose another name"):
        check_name("--label", name)


@pytest.mark.parametrize(
    "name",
    ["a", "a:b", "keep0.5_prompt+cot_head_seed0", "\u00fcbung \u6f22", "..a", "a" * MAX_NAME_BYTES],
)
def test_plain_names_are_taken_as_they_are(name):
    assert check_name("--label", name) == name
    assert load_recipe("tiny_trunc50").with_values({"run.name": name}).run.name == name


@pytest.mark.parametrize("stem", ["-rf", " a", "a\x7f", "x" * 230])
def test_the_name_of_the_recipes_file_is_checked_where_it_names_the_run(tmp_path, stem):
    path = tmp_path / f"{stem}.toml"
    path.write_text('base = "tiny"\n')
    with pytest.raises(UserError, match=r"run\.name = "):
        load_recipe(str(path))
    assert load_recipe(str(path), ["run.name=trial"]).run.name == "trial"


def test_a_long_value_is_shortened_in_a_message():
    assert shortened("x" * 5000) == f"'{'x' * 199}... (5002 characters)"
    assert shortened(16**5000) == "a number of thousands of digits"
