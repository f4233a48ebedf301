"""The formula of activations, against what autograd saves in transformers' own models."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from kd.data.truncate import plan_windows
from kd.models.trained import set_trained
from kd.plan.activations import num_tokens_read, saved_activations
from kd.plan.shapes import shapes_of
from kd.recipe import LoraSection, StudentSection, TruncationSection

SIZES = {
    "vocab_size": 64,
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
NUM_TOKENS = 2 * 256


def saved_bytes(model: Any) -> int:
    """Bytes of all storages that autograd keeps after the backbone's forward, weights and rotary
    tables left out.
    """
    storages: dict[int, torch.UntypedStorage] = {}  # held, so that no address is used twice
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tensor.shape[0] != 1:
            storages[storage.data_ptr()] = storage
        return tensor

    input_ids = torch.arange(NUM_TOKENS).view(2, -1) % SIZES["vocab_size"]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model.model(input_ids=input_ids, use_cache=False).last_hidden_state
    assert output.requires_grad
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("checkpointing", [False, True], ids=["whole", "checkpointed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config_class", [LlamaConfig, Qwen2Config, Qwen3Config])
@pytest.mark.parametrize(
    "lora",
    [None, LoraSection(rank=16), LoraSection(rank=16, dropout=0.1)],
    ids=["all", "adapters", "adapters with dropout"],
)
def test_activations_are_what_autograd_saves(
    config_class: Any, dtype: torch.dtype, checkpointing: bool, lora: LoraSection | None
):
    extra = {"head_dim": 24} if config_class is Qwen3Config else {}
    model = AutoModelForCausalLM.from_config(config_class(**SIZES, **extra), dtype=dtype).train()
    shapes = shapes_of(model)
    set_trained(model, StudentSection(model="recipes", lora=lora), seed=0)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    expected = saved_bytes(model)
    planned = saved_activations(
        shapes, NUM_TOKENS, dtype.itemsize, checkpointing=checkpointing, lora=lora
    )
    if lora is not None and lora.dropout:
        assert 0.99 * expected <= planned <= 1.2 * expected, "a bound"
    else:
        assert planned == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("window", ["head", "middle", "tail"])
@pytest.mark.parametrize("context", ["drop", "keep"])
@pytest.mark.parametrize(
    ("keep_fraction", "max_tokens"), [(1.0, None), (0.5, None), (0.3, 40), (1.0, 64)]
)
def test_the_longest_sequence_is_cut_as_the_data_is(
    window: Any, context: Any, keep_fraction: float, max_tokens: Any
):
    truncation = TruncationSection(
        keep_fraction=keep_fraction, max_tokens=max_tokens, window=window, window_context=context
    )
    windows = plan_windows(np.array([[30, 50, 21]]), truncation)
    assert num_tokens_read(truncation, 101) == windows.num_read_N[0]
