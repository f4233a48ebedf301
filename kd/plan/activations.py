"""Bytes of a decoder's activations, as autograd keeps them for transformers' llama, qwen2, qwen3
and their like.

Other architectures differ by a norm or an activation, and a kernel that fuses either keeps less.
Experts are counted as one MLP of their common width. width: bytes of an element (2 in bf16, else
4).
"""

import numpy as np

from kd.data.truncate import plan_windows
from kd.plan.shapes import ModelShapes
from kd.plan.trainable import adapted_widths
from kd.recipe import LoraSection, TruncationSection


def num_tokens_read(truncation: TruncationSection, full_tokens: int) -> int:
    """Tokens that a model reads of a sequence of full_tokens: all of its tokens in one section."""
    return int(plan_windows(np.array([[0, full_tokens, 0]]), truncation).num_read_N[0])


def saved_activations(
    shapes: ModelShapes,
    num_tokens: int,
    width: int,
    *,
    checkpointing: bool,
    lora: LoraSection | None = None,
) -> int:
    """Bytes kept from forward to backward; under checkpointing only the layers' inputs."""
    inputs = shapes.num_layers * width * shapes.hidden_size * num_tokens
    layers = shapes.num_layers * layer_activations(shapes, num_tokens, width, lora)
    final_norm = (4 + _normalised(width, lora)) * shapes.hidden_size * num_tokens
    return (inputs if checkpointing else layers) + final_norm


def layer_activations(
    shapes: ModelShapes, num_tokens: int, width: int, lora: LoraSection | None = None
) -> int:
    """Bytes that one decoder layer keeps for its backward (w = width, a token):

    two RMSNorms        (4 + 2 w) H each: the fp32 input, the normalised one, and the output as the
                        next product's input
    norms of q and k    (4 + w) (Q + K), where there are any; Q, K: the widths of all query and of
                        all key heads
    attention           w (2 Q + 2 K) for q, k, v and the output, 4 bytes a head for log-sum-exp;
                        by flash or sdpa: no matrix of tokens by tokens is kept
    gated MLP           4 w F: gate, up, silu(gate), their product; F: the intermediate size
    adapters            of each, w rank for what lies between A and B; with dropout at most 2 w I
                        for what is left of its input, I wide, and for the mask. Norms keep w less
                        a value, since their weights are frozen
    """
    queries, keys = shapes.num_heads * shapes.head_dim, shapes.num_key_value_heads * shapes.head_dim
    normalised = _normalised(width, lora)
    norms = 2 * (4 + normalised + width) * shapes.hidden_size
    head_norms = (4 + normalised) * (queries + keys) if shapes.has_qk_norm else 0
    attention = width * (2 * queries + 2 * keys) + 4 * shapes.num_heads
    mlp, adapters = 4 * width * shapes.intermediate_size, 0
    if lora is not None:
        inputs = [columns for columns, _ in adapted_widths(lora, shapes)]
        adapters = width * lora.rank * len(inputs)
        adapters += 2 * width * sum(inputs) if lora.dropout else 0
    return num_tokens * (norms + head_norms + attention + mlp + adapters)


def _normalised(width: int, lora: LoraSection | None) -> int:
    """Bytes of what a norm multiplies by its weight: kept only for that weight's gradient."""
    return width if lora is None else 0
