"""A model to generate with: whole on one device, bfloat16 or what it was saved in on a GPU, float32 on a CPU."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from kd.errors import UserError
from kd.hub import hub_errors, resolve
from kd.recipe import ModelSection


def load_generator(field: str, section: ModelSection) -> PreTrainedModel:
    """The model in evaluation mode. Raises UserError that names the field when there is no such model, whole."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    path = resolve(field, section.model)
    with hub_errors(field, section.model):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            revision=section.revision,
            trust_remote_code=section.trust_remote_code,
            attn_implementation=None if section.attention == "auto" else section.attention,
            dtype="auto" if device == "cuda" else torch.float32,
            output_loading_info=True,
        )
    model, info = loaded
    if info["missing_keys"]:
        names = ", ".join(sorted(info["missing_keys"])[:3])
        raise UserError(f"{field} = {section.model!r}: the weights lack {names}: is it the whole model?")
    return model.to(device).eval()
