"""LoRA adapters within a model's state: merged into their matrices, and written as peft
reads them. Names are peft's: q_proj.base_layer.weight and q_proj.lora_A.default.weight of q_proj.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

ADAPTER = "default"


def has_adapters(model: PreTrainedModel) -> bool:
    return hasattr(model, "peft_config")


def merged_weights(model: PreTrainedModel, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A model's whole state without adapters, under the names that it had before it got them:
    W + alpha / rank * B A in the place of W, summed in fp32.
    """
    weights = {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in state.items()
        if not _is_adapter(name)
    }
    for name, layer in model.named_modules():
        if not hasattr(layer, "lora_A"):
            continue
        down, up = (state[f"{name}.lora_{part}.{ADAPTER}.weight"].float() for part in "AB")
        scaling: Any = layer.scaling
        fan_in_fan_out: Any = layer.fan_in_fan_out  # GPT-2 keeps its matrices transposed
        change = scaling[ADAPTER] * (up @ down)
        weight = state[f"{name}.base_layer.weight"]
        whole = weight.float() + (change.T if fan_in_fan_out else change)
        weights[f"{name}.weight"] = whole.to(weight.dtype)
    return weights


def save_adapter(model: PreTrainedModel, state: Mapping[str, Tensor], folder: Path) -> None:
    """Write adapter_model.safetensors and adapter_config.json, which names the base model."""
    adapter = {
        f"base_model.model.{name.replace(f'.{ADAPTER}.', '.')}": tensor.contiguous()
        for name, tensor in state.items()
        if _is_adapter(name)
    }
    folder.mkdir()
    save_file(adapter, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    configs: Any = model.peft_config
    configs[ADAPTER].save_pretrained(folder)


def _is_adapter(name: str) -> bool:
    return ".lora_" in name
