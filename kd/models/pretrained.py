"""A model read from a checkpoint, whole or not at all; for training and generation alike, without
the engine.
"""

from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from kd.errors import UserError
from kd.hub import hub_errors, resolve
from kd.recipe import ModelSection


def load_pretrained(
    field: str,
    section: ModelSection,
    *,
    dtype: torch.dtype | Literal["auto"],
    attention: str | None,
    device: torch.device | None = None,
) -> PreTrainedModel:
    """The causal language model that section.model names, on the device, or None: the CPU.

    Raises UserError naming `field` when there is none, or when its checkpoint lacks a weight:
    transformers would fill it with random numbers and only warn.
    """
    name = resolve(field, section.model)
    with hub_errors(field, section.model):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name,
            revision=section.revision,
            trust_remote_code=section.trust_remote_code,
            dtype=dtype,
            attn_implementation=attention,
            output_loading_info=True,
            device_map=None if device is None or device.type == "cpu" else {"": device},
        )
    model, info = loaded
    if info["missing_keys"]:
        names = ", ".join(sorted(info["missing_keys"])[:3])
        raise UserError(
            f"{field} = {section.model!r}: the checkpoint lacks {names}: check that the model is "
            "complete"
        )
    return model
