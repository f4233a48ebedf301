"""Flash attention is told where sequences begin, and looks at no positions itself."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_config
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

from kd.data.collate import collate
from kd.data.dataset import Example
from kd.data.step_plan import SequenceLayout
from kd.models.head import hidden_states

NAME = "flash_by_segments"
CALLS: list[tuple[list[int] | None, int | None]] = []


def by_segments(
    module: torch.nn.Module,
    query_BHLD: Tensor,
    key_BHLD: Tensor,
    value_BHLD: Tensor,
    attention_mask: Tensor | None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """What varlen kernels compute, one sequence after the other."""
    assert attention_mask is None
    CALLS.append((None if cu_seq_lens_q is None else cu_seq_lens_q.tolist(), max_length_q))
    groups = query_BHLD.shape[1] // key_BHLD.shape[1]
    key_BHLD, value_BHLD = (x.repeat_interleave(groups, 1) for x in (key_BHLD, value_BHLD))
    bounds = [0, query_BHLD.shape[2]] if cu_seq_lens_q is None else cu_seq_lens_q.tolist()
    parts = []
    for start, stop in itertools.pairwise(bounds):
        q, k, v = (x[:, :, start:stop] for x in (query_BHLD, key_BHLD, value_BHLD))
        parts.append(F.scaled_dot_product_attention(q, k, v, is_causal=True))
    return torch.cat(parts, 2).transpose(1, 2), None


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    AttentionInterface.register(NAME, by_segments)
    AttentionMaskInterface.register(NAME, flash_attention_mask)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config()).eval()
    model.config._attn_implementation = NAME  # a name that begins so is asked for by its package
    return model


def example(length: int) -> Example:
    ids = np.random.default_rng(length).integers(3, 100, length)
    return Example(ids, ids, row=0, num_tokens_3=np.array([length, 0, 0]), read_start=0)


@pytest.mark.parametrize(
    ("layout", "lengths", "told"),
    [
        ("packed", [9, 5, 7], ([0, 9, 14, 21], 9)),
        ("packed", [6], ([0, 6], 6)),
        ("packed", [], ([0, 1], 1)),
        ("padded", [6], ([0, 6], 6)),
        ("padded", [9, 5], (None, None)),  # transformers looks at positions of one row alone
    ],
)
def test_attention_is_told_where_sequences_begin(
    model: torch.nn.Module, layout: SequenceLayout, lengths: list[int], told: tuple
) -> None:
    examples = [example(length) for length in lengths]
    batch = collate(examples, pad_token_id=0, layout=layout)
    CALLS.clear()
    states = hidden_states(model, batch.model_inputs)
    assert set(map(repr, CALLS)) == {repr(told)}
    if layout == "packed" and lengths:
        alone = [hidden_states(model, collate([one], 0).model_inputs) for one in examples]
        torch.testing.assert_close(states, torch.cat(alone, 1), rtol=1e-5, atol=1e-5)


def test_other_attention_is_told_nothing(model: torch.nn.Module) -> None:
    batch = collate([example(6)], pad_token_id=0, layout="packed")
    asked: dict[str, object] = {}
    handle = model.model.register_forward_pre_hook(
        lambda _, args, kwargs: asked.update(kwargs), with_kwargs=True
    )
    model.config._attn_implementation = "sdpa"
    hidden_states(model, batch.model_inputs)
    model.config._attn_implementation = NAME
    handle.remove()
    assert asked.keys() == {"input_ids", "position_ids", "use_cache"}
