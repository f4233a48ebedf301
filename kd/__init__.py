"""Distil a large reasoning model into a small one; pay only for the part that teaches."""

import importlib
from importlib import metadata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kd.losses import distillation_loss, sparse_distillation_loss
    from kd.recipe import Recipe, load_recipe

    __version__: str

__all__ = [
    "Recipe",
    "__version__",
    "distillation_loss",
    "load_recipe",
    "sparse_distillation_loss",
]

_HOMES = {
    "Recipe": "kd.recipe",
    "distillation_loss": "kd.losses",
    "load_recipe": "kd.recipe",
    "sparse_distillation_loss": "kd.losses",
}


def __getattr__(name: str) -> object:
    # Imported on first use: a recipe is checked on login nodes, where importing torch takes longer
    # than the check.
    if name == "__version__":
        try:
            return metadata.version("distill-trunc")  # setup.cfg is its home
        except metadata.PackageNotFoundError:
            return "0+not.installed"
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'kd' has no attribute {name!r}")
