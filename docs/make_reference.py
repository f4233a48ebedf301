"""Writes the tables of every recipe key into docs/recipes.md, from kd/recipe.py:

python docs/make_reference.py

The text around the tables is written by hand. A test compares the page with what this makes.
"""

import json
from pathlib import Path
from typing import Any, get_args

from kd.recipe import (
    AXIS,
    FIXED,
    FREE,
    PLACE,
    TOKENS,
    KeyFacts,
    LoraSection,
    Recipe,
    RecipeSection,
    SourceTable,
    key_facts,
)

PAGE = Path(__file__).with_name("recipes.md")
BEGIN, END = "<!-- keys: made by docs/make_reference.py -->", "<!-- end of keys -->"
KINDS = {FIXED: "fixed", TOKENS: "tokens", FREE: "free", PLACE: "place", AXIS: "axis"}
# Tables of keys within a section, by the key that holds them
TABLES: dict[str, type[RecipeSection]] = {
    "student.lora": LoraSection,
    "data.sources": SourceTable,
}
LARGEST_SHOWN = 2**20  # larger bounds only keep numbers within what files and tensors hold


def with_reference(page: str) -> str:
    """The page with the tables of today's keys between its two marks."""
    before, _, rest = page.partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        raise ValueError(f"{PAGE} lacks {BEGIN} or {END}")
    return f"{before}{BEGIN}\n\n{reference()}\n{END}{after}"


def reference() -> str:
    """A heading and a table for each section of a recipe."""
    facts, parts = key_facts(), []
    for section, field in Recipe.model_fields.items():
        model = section_model(field.annotation)
        intro = f"{field.description}.\n\n" if field.description else ""
        parts.append(f"### [{section}]\n\n{intro}{table(model, section, facts)}")
        for key, nested in TABLES.items():
            if key.startswith(f"{section}."):
                brackets = f"[[{key}]]" if nested is SourceTable else f"[{key}]"
                parts.append(f"### {brackets}\n\n{table(nested, key, {})}")
    return "\n".join(parts)


def section_model(annotation: Any) -> type[RecipeSection]:
    """The model of a section, which may be optional."""
    kinds = (annotation, *get_args(annotation))
    (model,) = (k for k in kinds if isinstance(k, type) and issubclass(k, RecipeSection))
    return model


def table(model: type[RecipeSection], prefix: str, facts: dict[str, KeyFacts]) -> str:
    """A line for each key. facts: of keys that state them; those of a nested table do not."""
    schema = model.model_json_schema()
    required = schema.get("required", [])
    heads = ["key", "value", "default", *(["kind"] if facts else []), "meaning"]
    rows = [heads, ["---"] * len(heads)]
    for key, field in schema["properties"].items():
        default = "required" if key in required else default_text(field.get("default"))
        kind = [KINDS[facts[f"{prefix}.{key}"]]] if facts else []
        rows.append([f"`{prefix}.{key}`", value_text(field), default, *kind, field["description"]])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def default_text(default: Any) -> str:
    if default is None:
        return "absent"
    if default == "":
        return "empty"
    return f"`{json.dumps(default)}`"


def value_text(schema: dict[str, Any]) -> str:
    """A JSON schema in words."""
    if "anyOf" in schema:
        options = [option for option in schema["anyOf"] if option.get("type") != "null"]
        return " or ".join(map(value_text, options))
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    match schema.get("type", "table"):
        case "boolean":
            return "`true`, `false`"
        case "string":
            return "text"
        case "array" if "prefixItems" in schema:
            return f"{len(schema['prefixItems'])} of: {value_text(schema['prefixItems'][0])}"
        case "array" if "$ref" in schema["items"]:
            return "tables"
        case "array":
            return f"list of {value_text(schema['items'])}"
        case "integer":
            return f"integer, {range_text(schema)}"
        case "number":
            return f"number, {range_text(schema)}"
    return "table"


def range_text(schema: dict[str, Any]) -> str:
    """What a number may be. An integer above 0 is 1 or more."""
    low, above = schema.get("minimum"), schema.get("exclusiveMinimum")
    if above is not None and schema["type"] == "integer":
        low = above + 1
    elif low is not None and above is not None and low < 1e-20:
        low = None  # as good as above 0
    high, below = schema.get("maximum"), schema.get("exclusiveMaximum")
    if high is not None and high >= LARGEST_SHOWN:
        high = None
    if low is not None and high is not None:
        return f"{low:g} to {high:g}"
    first = f"{low:g} or more" if low is not None else f"above {above:g}"
    if below is not None:
        return f"{first}, below {below:g}"
    return f"{first}, at most {high:g}" if high is not None else first


if __name__ == "__main__":
    PAGE.write_text(with_reference(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
