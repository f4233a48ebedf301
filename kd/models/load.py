"""Teacher and student from a recipe: attention chosen and named, weights partitioned while they are read."""

import logging
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
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
    with hub_errors(f"{role}.model", section.model):
        model, info = AutoModelForCausalLM.from_pretrained(
            find_input(section.model) or section.model,
            revision=section.revision,
            trust_remote_code=section.trust_remote_code,
            dtype=torch.bfloat16 if is_bf16(ds_config) else torch.float32,
            attn_implementation=choose_attention(section, role=role),
            output_loading_info=True,
        )
    if info["missing_keys"]:
        names = ", ".join(sorted(info["missing_keys"])[:3])
        raise UserError(f"{role}.model = {section.model!r}: the checkpoint lacks {names}: is it the whole model?")
    return model


def load_partitioned(section: ModelSection, ds_config: dict[str, Any], *, role: str) -> PreTrainedModel:
    """The model under ds_config: when that is stage 3, each rank keeps its shard of each weight as it is read.

    Host memory still peaks at one checkpoint per rank of a node, since every rank reads every file.
    """
    log.info("%s %s with attention %s", role, section.model, choose_attention(section, role=role))
    if not is_zero3(ds_config):
        return load_whole(section, ds_config, role=role)
    with partitioned_loading(ds_config):
        return load_whole(section, ds_config, role=role)


def random_model(section: ModelSection, ds_config: dict[str, Any], *, role: str, seed: int) -> PreTrainedModel:
    """The model's architecture with fresh weights, the same on every rank, whole until its engine partitions it."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(
        load_config(section, role=role),
        dtype=torch.bfloat16 if is_bf16(ds_config) else torch.float32,
        attn_implementation=choose_attention(section, role=role),
        trust_remote_code=section.trust_remote_code,
    )


def choose_attention(section: ModelSection, *, role: str) -> str:
    """The best attention that transformers reports as available, or the one that the recipe asks for."""
    # Flash attention runs on GPUs only, installed or not.
    flash = [name for name, available in _FLASH_ATTENTION.items() if torch.cuda.is_available() and available()]
    choices = [*flash, "sdpa", "eager"]
    if section.attention == "auto":
        return choices[0]
    if section.attention not in choices:
        raise UserError(
            f'{role}.attention = "{section.attention}" is not available here, only {", ".join(choices)}: '
            'install the extra "flash", or use "auto"'
        )
    return section.attention
