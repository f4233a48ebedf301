"""Tiny random models of the architectures that are tried: what follows the lm_head is set away from
neutral.
"""

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto import CONFIG_MAPPING

from kd.models.head import DIVISORS, MULTIPLIERS, SOFTCAPS

SIZES = {
    "vocab_size": 160,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "initializer_range": 0.3,  # far from uniform: a loss of random models must not be near zero
    "router_jitter_noise": 0.0,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "residual_dropout": 0.0,
    "attn_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
}
LATENT_ATTENTION = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
DEEPSEEK = {**LATENT_ATTENTION, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_ssm": 64,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "mamba_chunk_size": 16,
}

# model_type -> what its configuration needs beyond SIZES
ARCHITECTURES: dict[str, dict[str, object]] = {
    "afmoe": {},
    "apertus": {},
    "arcee": {},
    "bitnet": {},
    "bloom": {},
    "cohere": {"logit_scale": 0.25},
    "cohere2": {"logit_scale": 0.25},
    "deepseek_v2": DEEPSEEK,
    "deepseek_v3": DEEPSEEK,
    "dots1": {"first_k_dense_replace": 1, "n_shared_experts": 1, "n_group": 1, "topk_group": 1},
    "ernie4_5": {},
    "ernie4_5_moe": {"moe_k": 2, "moe_layer_start_index": 1},
    "exaone4": {},
    "falcon": {},
    "falcon_h1": {"lm_head_multiplier": 0.25, **MAMBA},
    "gemma": {},
    "gemma2": {"final_logit_softcapping": 3.0},
    "gemma3_text": {"final_logit_softcapping": 3.0},
    "glm": {},
    "glm4": {},
    "glm4_moe": {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neox": {},
    "gpt_oss": {},
    "gptj": {"rotary_dim": 8},
    "granite": {"logits_scaling": 4.0},
    "granitemoe": {"logits_scaling": 4.0},
    "granitemoehybrid": {"logits_scaling": 4.0, "layer_types": ["mamba", "attention"], **MAMBA},
    "helium": {},
    "hunyuan_v1_dense": {},
    "hunyuan_v1_moe": {"moe_topk": 2},
    "hyperclovax": {"logits_scaling": 0.25},
    "inkling_text": {"logits_mup_width_multiplier": 4.0},
    "jamba": {},
    "lfm2": {},
    "llama": {},
    "llama4_text": {"intermediate_size_mlp": 48},
    "minicpm3": {"dim_model_base": 8, **LATENT_ATTENTION},
    "minimax_m2": {},
    "ministral3": {},
    "mistral": {},
    "mixtral": {},
    "mpt": {},
    "nanochat": {"final_logit_softcapping": 3.0},
    "nemotron": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": {},
    "olmoe": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.3},
    "phi": {},
    "phi3": {},
    "phimoe": {},
    "qwen2": {},
    "qwen2_moe": {"shared_expert_intermediate_size": 16},
    "qwen3": {},
    "qwen3_moe": {},
    "qwen3_next": {
        "layer_types": ["linear_attention", "full_attention"],
        "shared_expert_intermediate_size": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
    "recurrent_gemma": {"logits_soft_cap": 3.0},
    "seed_oss": {},
    "smollm3": {},
    "stablelm": {},
    "starcoder2": {},
    "xlstm": {"output_logit_soft_cap": 3.0, "num_heads": 4},
    "vaultgemma": {"final_logit_softcapping": 3.0},
}


NEVER_TIED = {"inkling_text", "xlstm"}  # whatever tie_word_embeddings says
# Those whose logits are not hidden W^T + bias.
SCALED_OR_CAPPED = [
    name
    for name, changes in ARCHITECTURES.items()
    if changes.keys() & {*MULTIPLIERS, *DIVISORS, *SOFTCAPS, "dim_model_base"}
]


def build(model_type: str, *, tied: bool, seed: int, **changes: object) -> PreTrainedModel:
    """A model of the architecture without dropout, in training mode."""
    config_class = CONFIG_MAPPING[model_type]
    known = {*config_class().to_dict(), *config_class.attribute_map}
    sizes = {name: value for name, value in SIZES.items() if name in known}
    config = AutoConfig.for_model(
        model_type, **sizes | ARCHITECTURES[model_type] | changes, tie_word_embeddings=tied
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if (bias := getattr(model.get_output_embeddings(), "bias", None)) is not None:
        nn.init.normal_(bias)  # transformers starts it at zero
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.train()
