"""Teacher and student from a recipe: attention chosen and named, weights partitioned while they are read."""

import contextlib
import logging
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available, is_flash_attn_4_available

from kd.engine.ds_config import is_bf16, is_zero3
from kd.engine.zero3 import partitioned_loading
from kd.errors import UserError
from kd.hub import hub_errors
from kd.recipe import ModelSection, find_input

log = logging.getLogger(__name__)

_FLASH_ATTENTION = {  # best first
    "flash_attention_4": is_flash_attn_4_available,
    "flash_attention_3": is_flash_attn_3_available,
    "flash_attention_2": is_flash_attn_2_available,
}


def load_config(section: ModelSection, *, role: str) -> PretrainedConfig:
    """The model's configuration. role ("teacher" or "student") names the section of the recipe in errors."""
    with hub_errors(f"{role}.model", section.model):
        return AutoConfig.from_pretrained(
            find_input(section.model) or section.model,
            revision=section.revision,
            trust_remote_code=section.trust_remote_code,
        )


def load_whole(section: ModelSection, ds_config: dict[str, Any], *, role: str) -> PreTrainedModel:
    """The model, whole, on this rank's CPU: bf16 when ds_config says so, else fp32."""
    attention = choose_attention(section, load_config(section, role=role), role=role)
    with hub_errors(f"{role}.model", section.model):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            find_input(section.model) or section.model,
            revision=section.revision,
            trust_remote_code=section.trust_remote_code,
            dtype=torch.bfloat16 if is_bf16(ds_config) else torch.float32,
            attn_implementation=attention,
            output_loading_info=True,
        )
    model, info = loaded
    if info["missing_keys"]:
        names = ", ".join(sorted(info["missing_keys"])[:3])
        raise UserError(f"{role}.model = {section.model!r}: the checkpoint lacks {names}: is it the whole model?")
    return model


def load_partitioned(section: ModelSection, ds_config: dict[str, Any], *, role: str) -> PreTrainedModel:
    """The model under ds_config: when that is stage 3, each rank keeps its shard of each weight as it is read.

    Host memory still peaks at one checkpoint per rank of a node, since every rank reads every file.
    """
    with partitioned_loading(ds_config) if is_zero3(ds_config) else contextlib.nullcontext():
        model = load_whole(section, ds_config, role=role)
    log.info("%s %s with attention %s", role, section.model, model.config._attn_implementation)
    return model


def random_model(section: ModelSection, ds_config: dict[str, Any], *, role: str, seed: int) -> PreTrainedModel:
    """The model's architecture with fresh weights, the same on every rank, whole until its engine partitions it."""
    config = load_config(section, role=role)
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(
        config,
        dtype=torch.bfloat16 if is_bf16(ds_config) else torch.float32,
        attn_implementation=choose_attention(section, config, role=role),
        trust_remote_code=section.trust_remote_code,
    )


def choose_attention(section: ModelSection, config: PretrainedConfig, *, role: str) -> str:
    """The best attention that runs here and that the model's class supports, or the one that the recipe asks for."""
    # Flash attention runs on GPUs only, installed or not.
    flash = [name for name, available in _FLASH_ATTENTION.items() if torch.cuda.is_available() and available()]
    choices = [*flash, "sdpa", "eager"]
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if model_class is not None:  # a class that comes with its checkpoint is asked only when it is built
        choices = [name for name in choices if _supports(model_class, name)]
    if section.attention == "auto":
        return choices[0]
    if section.attention not in choices:
        raise UserError(
            f'{role}.attention = "{section.attention}" is not available here for {config.model_type}, only '
            f'{", ".join(choices)}: install the extra "flash", or use "auto"'
        )
    return section.attention


def _supports(model_class: type[PreTrainedModel], attention: str) -> bool:
    if attention == "eager":
        return True
    if attention == "sdpa":  # not Gemma 2, for its softcap, nor GPT-OSS, for its sinks
        return model_class._supports_sdpa
    compatible = model_class._compatible_flash_implementations
    return model_class._supports_flash_attn and (compatible is None or attention in compatible)
