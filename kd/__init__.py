"""Distil a large reasoning model into a small one, paying only for the part of each trace that
teaches.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kd.losses import distillation_loss

__all__ = ["distillation_loss"]


def __getattr__(name: str) -> Any:
    # Imported on first use: a recipe is checked on login nodes, where importing torch takes longer
    # than the check.
    if name == "distillation_loss":
        from kd.losses import distillation_loss

        return distillation_loss
    raise AttributeError(f"module 'kd' has no attribute {name!r}")
