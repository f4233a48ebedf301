"""Whether a teacher's states of a prefix are those of the whole: a cache for all lengths needs it.

Causal attention does not imply it: longrope and dynamic NTK scale every position by the longest
one of a batch, from a number of tokens on that the model's configuration names.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from kd.errors import UserError
from kd.teachers.live import LiveTeacher

# Relative: another length sums in another order
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05}


def check_prefixes(teacher: LiveTeacher, input_ids_L: Tensor) -> None:
    """Raise UserError unless the states of half of a trace, and of each length at which positions
    begin to be scaled, are those of all of it. Give it the longest trace.

    Collective: every rank must call this.
    """
    num_tokens = len(input_ids_L)
    lengths = {max(num_tokens // 2, 1), *thresholds(teacher.model.config)}
    prefixes = {n: _states(teacher, input_ids_L[:n]) for n in sorted(lengths) if n < num_tokens}
    whole_LH = _states(teacher, input_ids_L)
    for n, prefix_LH in prefixes.items():
        error = float((prefix_LH.float() - whole_LH[:n].float()).norm() / whole_LH[:n].norm())
        if not error <= TOLERANCE[whole_LH.dtype]:
            raise UserError(
                f"teacher.model: in a trace of {num_tokens} tokens, the states of the first {n} "
                f"depend on later tokens (relative error {error:.2g}), since its positions are "
                "scaled by the length. A cache cannot serve several lengths: train without "
                f"teacher.cache, or set truncation.max_full_tokens to at most {n}"
            )


def thresholds(config: PreTrainedConfig) -> set[int]:
    """Numbers of tokens above which a model's rotary positions are scaled in another way."""
    text = config.get_text_config()
    found = {
        parameters.get("original_max_position_embeddings")
        or (text.max_position_embeddings if parameters.get("rope_type") == "dynamic" else None)
        for parameters in _rope_parameters(getattr(text, "rope_parameters", None) or {})
    }
    return {int(n) for n in found if n}


def _rope_parameters(tree: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Of a model, or of each of its kinds of layers."""
    if "rope_type" in tree:
        yield tree
    for value in tree.values():
        if isinstance(value, dict):
            yield from _rope_parameters(value)


def _states(teacher: LiveTeacher, input_ids_L: Tensor) -> Tensor:
    return teacher.hidden_states(input_ids=input_ids_L[None])[0]
