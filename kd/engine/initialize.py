"""The one place that calls deepspeed.initialize."""

from typing import Any

import deepspeed
from torch import nn


def initialize(module: nn.Module, ds_config: dict[str, Any]) -> Any:
    """A ZeRO engine: with an optimizer when ds_config has one, else for inference."""
    trained = (
        [p for p in module.parameters() if p.requires_grad] if "optimizer" in ds_config else None
    )
    engine, *_ = deepspeed.initialize(model=module, model_parameters=trained, config=ds_config)
    return engine
