"""Fixtures of tiny_generator.py."""

from tiny_generator import (  # noqa: F401
    model_dir,
    problems_path,
    recipe_path,
    script,
    stand_in,
    text_model_dir,
)
