"""Which weights of a student are trained: all of them, all but its lm_head or embeddings, or LoRA
adapters of its matrices.
"""

import importlib.util
import logging
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from kd.engine.zero3 import num_parameters
from kd.errors import UserError
from kd.hub import first_line, resolve
from kd.models.head import backbone
from kd.recipe import LoraSection, StudentSection

log = logging.getLogger(__name__)


def set_trained(model: PreTrainedModel, section: StudentSection, seed: int) -> None:
    """Freeze what the recipe does not train, and add its adapters, the same on every rank. Before
    the model's engine is made; the model may be partitioned.

    Raises UserError as check_trained does.
    """
    check_trained(model, section)
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if section.lora is not None:
        model.requires_grad_(False)
        _add_adapters(model, section, section.lora, seed)
    elif not section.trains_head and is_tied(model):
        log.info(
            "student   freeze_head: the embeddings are the same tensor, so they are frozen too"
        )
    if not section.trains_head:
        head.requires_grad_(False)
    if not section.trains_embeddings:
        embeddings.requires_grad_(False)
    if not embeddings.weight.requires_grad:
        # Hooks of ZeRO-3 and of checkpointing run in backward where an input needs a gradient.
        model.enable_input_require_grads()
    parameters = list(model.parameters())
    num_trained = num_parameters(p for p in parameters if p.requires_grad)
    if num_trained < num_parameters(parameters):
        sizes = (num_trained / 1e6, num_parameters(parameters) / 1e6)
        log.info("student   %.2f of %.2f M parameters are trained", *sizes)


def check_trained(model: PreTrainedModel, section: StudentSection) -> None:
    """Raise UserError where the recipe trains half of a tied tensor, or asks for adapters that
    cannot be. The model may be on the meta device.
    """
    if section.lora is not None:
        if importlib.util.find_spec("peft") is None:
            raise UserError(
                'student.lora needs peft: install the extra "lora" (pip install -e ".[lora]")'
            )
        _adapted_layers(model, section.lora)
    elif section.freeze_embeddings and not section.freeze_head and is_tied(model):
        raise UserError(
            "student.freeze_embeddings = true with student.freeze_head = false: the embeddings "
            f"and the lm_head of {section.model!r} are one tensor (tie_word_embeddings): freeze "
            "both or neither"
        )


def is_tied(model: PreTrainedModel) -> bool:
    return model.get_input_embeddings().weight is model.get_output_embeddings().weight


def _add_adapters(
    model: PreTrainedModel, section: StudentSection, lora: LoraSection, seed: int
) -> None:
    """B = 0: until the first step the model is what it was. In the dtype of the model, of which its
    engine wants one.
    """
    from peft import LoraConfig, inject_adapter_in_model

    base, layers = resolve("student.model", section.model), _adapted_layers(model, lora)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # peft divides it, and keeps a float
        lora_dropout=lora.dropout,
        target_modules=layers,
        fan_in_fan_out=isinstance(model.get_submodule(layers[0]), Conv1D),
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(Path(base).resolve()) if Path(base).exists() else base,
        revision=section.revision,
    )
    torch.manual_seed(seed)
    try:
        inject_adapter_in_model(config, model)
    except ValueError as error:  # of an architecture that peft knows not to adapt
        raise UserError(
            f"student.lora: peft adds no adapters to {type(model).__name__}: {first_line(error)}"
        ) from error
    config.target_modules = sorted(config.target_modules or ())
    log.info("student   adapters of rank %d on %d matrices", lora.rank, len(layers))


def _adapted_layers(model: PreTrainedModel, lora: LoraSection) -> list[str]:
    """Names of linear layers of the backbone: the lm_head runs as the loss, past any adapter."""
    within = set(backbone(model).modules())
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module in within
    ]
    if lora.target_modules == "all-linear":
        return linear
    for target in lora.target_modules:
        if not any(_is_named(name, target) for name in linear):
            known = sorted({name.rpartition(".")[2] for name in linear})
            raise UserError(
                f"student.lora.target_modules: {target!r} is not a linear layer of the backbone "
                f"of {type(model).__name__}; write one or more of {', '.join(known)}"
            )
    return [name for name in linear if any(_is_named(name, t) for t in lora.target_modules)]


def _is_named(layer: str, target: str) -> bool:
    """Whether a layer's name ends with the whole words of target."""
    return f".{layer}".endswith(f".{target}")
