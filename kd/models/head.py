"""Where a model's last step stands: the backbone before its lm_head, and the head as the loss wants it."""

from typing import NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedModel


class Head(NamedTuple):
    """An lm_head, weight (V, H) and bias (V,) or None, and what follows it: softcap(scale * (hidden W^T + bias))."""

    weight_VH: Tensor
    bias_V: Tensor | None
    softcap: float | None
    scale: float


def backbone(model: PreTrainedModel) -> nn.Module:
    """The model without its lm_head: its last_hidden_state is what the lm_head reads."""
    return model.base_model


def head_of(model: PreTrainedModel) -> Head:
    """The model's head; its weights are the model's own, and whole only where ZeRO-3 has gathered them.

    Gemma 2 caps (final_logit_softcapping), Cohere multiplies (logit_scale), Granite divides (logits_scaling). An
    architecture that does something else is found out by kd.models.probe when it is loaded.
    """
    lm_head, config = model.get_output_embeddings(), model.config
    scale = getattr(config, "logit_scale", None) or 1.0
    scale /= getattr(config, "logits_scaling", None) or 1.0
    softcap = getattr(config, "final_logit_softcapping", None)
    return Head(lm_head.weight, getattr(lm_head, "bias", None), softcap, scale)
