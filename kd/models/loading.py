"""Load teacher and student: choose and log their attention, and partition weights while reading."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import (
    is_flash_attn_2_available,
    is_flash_attn_3_available,
    is_flash_attn_4_available,
)

from kd.distributed.device import device_type
from kd.engine.ds_config import is_bf16, is_zero3
from kd.engine.zero3 import partitioned_loading
from kd.errors import UserError
from kd.hub import first_line, hub_errors, resolve
from kd.models.pretrained import load_pretrained
from kd.recipe import ModelSection

# Best first: whether it is installed, and the major compute capabilities that it has kernels for.
# transformers looks at these when it builds a model, and lets FA3 pass wherever FA2 runs, though
# its kernels are Hopper's.
_FLASH_ATTENTION: dict[str, tuple[Callable[[], bool], Callable[[int], bool]]] = {
    "flash_attention_4": (is_flash_attn_4_available, lambda major: major >= 9),
    "flash_attention_3": (is_flash_attn_3_available, lambda major: major == 9),
    "flash_attention_2": (is_flash_attn_2_available, lambda major: major >= 8),
}


def load_config(section: ModelSection, *, role: str) -> PretrainedConfig:
    """The model's configuration. role ("teacher" or "student") names the section of the recipe in
    errors.
    """
    with hub_errors(f"{role}.model", section.model):
        return AutoConfig.from_pretrained(
            resolve(f"{role}.model", section.model),
            revision=section.revision,
            trust_remote_code=section.trust_remote_code,
        )


def load_whole(
    section: ModelSection,
    ds_config: dict[str, Any],
    *,
    role: str,
    device: torch.device | None = None,
) -> PreTrainedModel:
    """The model, whole: bf16 when ds_config says so, else fp32. device: where its weights are read
    to, one by one, so that the host never holds them all; None: this rank's CPU.
    """
    attention = choose_attention(section, load_config(section, role=role), ds_config, role=role)
    return load_pretrained(
        f"{role}.model", section, dtype=_dtype(ds_config), attention=attention, device=device
    )


def load_partitioned(
    section: ModelSection, ds_config: dict[str, Any], *, role: str
) -> PreTrainedModel:
    """The model under ds_config: when that is stage 3, each rank keeps its shard of each weight as
    it is read.

    Only rank 0 reads the files, and its host holds one whole checkpoint meanwhile.
    """
    if not is_zero3(ds_config):
        return load_whole(section, ds_config, role=role)
    try:
        with partitioned_loading(ds_config):
            model = load_whole(section, ds_config, role=role)
    except (AttributeError, IndexError, NotImplementedError, TypeError, RuntimeError) as error:
        # The whole model was loaded a moment ago, for the probe: partitioning is the cause
        model_type = load_config(section, role=role).model_type
        raise UserError(
            f"{role}.model = {section.model!r}: {model_type} cannot be loaded under ZeRO-3, since "
            "transformers fails on partitioned weights. Choose another architecture\n"
            f"({type(error).__name__}: {first_line(error)})"
        ) from error
    return model


def random_model(
    section: ModelSection, ds_config: dict[str, Any], *, role: str, seed: int
) -> PreTrainedModel:
    """The model's architecture with fresh weights, the same on every rank, whole until its engine
    partitions it.
    """
    config = load_config(section, role=role)
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(
        config,
        dtype=_dtype(ds_config),
        attn_implementation=choose_attention(section, config, ds_config, role=role),
        trust_remote_code=section.trust_remote_code,
    )


def choose_attention(
    section: ModelSection, config: PretrainedConfig, ds_config: dict[str, Any], *, role: str
) -> str:
    """The best attention that runs here and that the model's class supports, or the one that the
    recipe asks for.

    Raises UserError when that one does not: flash attention needs a GPU that it has kernels for,
    and bf16.
    """
    choices = [*_flash_attention(ds_config), "sdpa", "eager"]
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    # A class that comes with its checkpoint is asked only when it is built.
    if model_class is not None:
        choices = [name for name in choices if _supports(model_class, name)]
    if section.attention == "auto":
        return choices[0]
    if section.attention not in choices:
        raise UserError(
            f'{role}.attention = "{section.attention}" is not available here for '
            f"{config.model_type} in {_dtype(ds_config)}, only {', '.join(choices)}: flash "
            'attention needs a GPU that supports it, the extra "flash", and bf16 in the file of '
            f'deepspeed.{role}; "auto" uses what is available'
        )
    return section.attention


def why_attention(
    section: ModelSection, model: PreTrainedModel, ds_config: dict[str, Any], *, role: str
) -> str:
    """Why a model that choose_attention chose for attends as it does, in a few words."""
    chosen = model.config._attn_implementation
    if section.attention != "auto":
        return f"{role}.attention says so"
    if chosen.startswith("flash"):
        return "the best that is installed"
    if device_type() != "cuda":
        why = "flash attention needs a GPU"
    elif not is_bf16(ds_config):
        why = "flash attention needs bf16"
    elif not _flash_attention(ds_config):
        why = "no flash attention for this GPU is installed"
    else:
        why = f"{model.config.model_type} has no flash attention"
    return why if chosen == "sdpa" else f"{why}, and {model.config.model_type} has no sdpa"


def _dtype(ds_config: dict[str, Any]) -> torch.dtype:
    return torch.bfloat16 if is_bf16(ds_config) else torch.float32


def _flash_attention(ds_config: dict[str, Any]) -> list[str]:
    if device_type() != "cuda" or not is_bf16(ds_config):
        return []
    major, _ = torch.cuda.get_device_capability()
    return [
        name
        for name, (installed, runs_on) in _FLASH_ATTENTION.items()
        if runs_on(major) and installed()
    ]


def _supports(model_class: type[PreTrainedModel], attention: str) -> bool:
    if attention == "eager":
        return True
    if attention == "sdpa":  # not Gemma 2, for its softcap, nor GPT-OSS, for its sinks
        return model_class._supports_sdpa
    compatible = model_class._compatible_flash_implementations
    return model_class._supports_flash_attn and (compatible is None or attention in compatible)
