"""docs/recipes.md is in step with kd/recipe.py and with the files of recipes/ and ds_configs/."""

import re
import runpy

from doc_pages import DOCS, expanded, first_cells
from tiny import ROOT

from kd.recipe import LoraSection, SourceTable, key_facts

PAGE = DOCS / "recipes.md"


def test_the_tables_of_keys_are_those_that_the_script_makes():
    with_reference = runpy.run_path(str(DOCS / "make_reference.py"))["with_reference"]
    page = PAGE.read_text()
    assert with_reference(page) == page, "run python docs/make_reference.py"


def test_every_key_has_a_line_with_a_meaning():
    page = PAGE.read_text()
    keys = [*key_facts(), *(f"student.lora.{key}" for key in LoraSection.model_fields)]
    keys += [f"data.sources.{key}" for key in SourceTable.model_fields]
    listed = first_cells(page.partition("## Every key")[2])
    assert [key for key in listed if "." in key] == sorted(keys, key=listed.index)
    for key in keys:
        (line,) = re.findall(rf"^\| `{re.escape(key)}` \|.*$", page, re.MULTILINE)
        meaning = line.rstrip(" |").rpartition(" | ")[2]
        assert len(meaning.split()) > 1, line


def test_every_shipped_recipe_and_every_json_is_in_a_table():
    listed = {name for cell in first_cells(PAGE.read_text()) for name in expanded(cell)}
    shipped = {path.stem for path in (ROOT / "recipes").glob("*.toml")}
    engines = {path.name for path in (ROOT / "ds_configs").glob("*.json")}
    assert len(shipped) > 20
    assert shipped | engines <= listed
    names = {name for name in listed if "." not in name}
    assert names == shipped
