"""The two parts of a model: the backbone before its lm_head, and the head in the form that the loss
needs.
"""

import inspect
import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from kd.losses import Head
from kd.models.packing import known_packing

# What follows an lm_head, under the names that configurations give it.
MULTIPLIERS = ("logit_scale", "lm_head_multiplier")  # Cohere, Falcon-H1
DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")  # Granite and MiniCPM3, Inkling
# Gemma 2, RecurrentGemma, xLSTM
SOFTCAPS = (
    "final_logit_softcapping",
    "logits_soft_cap",
    "output_logit_soft_cap",
)


def backbone(model: PreTrainedModel) -> nn.Module:
    """The model without its lm_head: its last_hidden_state is what the lm_head reads."""
    if model.base_model is model:  # Llama 4 names a base model that its text-only class has not
        return getattr(model, "model", model)
    return model.base_model


def hidden_states(model: PreTrainedModel, model_inputs: Mapping[str, Any]) -> Tensor:
    """Last hidden states (B, L, H) of what a Batch's model_inputs hold, without a wait."""
    arguments = dict(model_inputs)
    cu_seq_lens, longest = arguments.pop("cu_seq_lens", None), arguments.pop("max_length", None)
    module = backbone(model)
    if cu_seq_lens is not None and _takes_lengths(model, module):
        # Else transformers looks at the positions in every layer, and the host waits
        arguments |= {"cu_seq_lens_q": cu_seq_lens, "cu_seq_lens_k": cu_seq_lens}
        arguments |= {"max_length_q": longest, "max_length_k": longest}
    with known_packing("position_ids" in model_inputs):
        outputs = module(**arguments, use_cache=False)
    states: Tensor = outputs.last_hidden_state
    return states


def _takes_lengths(model: PreTrainedModel, module: nn.Module) -> bool:
    """Whether attention is flash attention, and the backbone hands on what only attention knows."""
    is_flash = model.config._attn_implementation.startswith("flash")
    kinds = (p.kind for p in inspect.signature(module.forward).parameters.values())
    return is_flash and inspect.Parameter.VAR_KEYWORD in kinds


def head_of(model: PreTrainedModel) -> Head:
    """The model's head; its weights are the model's own, and whole only where ZeRO-3 has gathered
    them.

    kd.models.probe finds an architecture that does anything else when it is loaded.
    """
    lm_head, config = model.get_output_embeddings(), model.config.get_text_config()
    factors = [getattr(config, name, None) or 1.0 for name in MULTIPLIERS]
    divisors = [getattr(config, name, None) or 1.0 for name in DIVISORS]
    # It multiplies by what Granite, under the same name, divides by.
    if config.model_type == "hyperclovax":
        factors, divisors = factors + divisors, []
    softcap = next((cap for name in SOFTCAPS if (cap := getattr(config, name, None))), None)
    return Head(
        lm_head.weight,
        getattr(lm_head, "bias", None),
        softcap,
        math.prod(factors) / math.prod(divisors),
    )
