"""A model to generate with: whole on one device, bfloat16 or what it was saved in on a GPU, float32
on a CPU.
"""

import hashlib
from typing import Any

import torch
from transformers import PreTrainedModel

from kd.models.pretrained import load_pretrained
from kd.recipe import ModelSection, find_input


def load_generator(field: str, section: ModelSection) -> PreTrainedModel:
    """The model in evaluation mode. Raises UserError that names the field."""
    on_gpu = torch.cuda.is_available()
    attention = None if section.attention == "auto" else section.attention
    model: Any = load_pretrained(
        field, section, dtype="auto" if on_gpu else torch.float32, attention=attention
    )
    generator: PreTrainedModel = model.to("cuda" if on_gpu else "cpu").eval()
    return generator


def weights_sha256(model: str) -> str | None:
    """Of the first MiB of each file of weights: changes when a model is trained anew."""
    folder = find_input(model)
    if folder is None:
        return None  # a hub id, which its revision pins
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(file.read(2**20))
    return digest.hexdigest()
