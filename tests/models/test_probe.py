"""What the probe finds out: heads it does not know, models that look ahead, weights that did not
arrive.
"""

import copy
from functools import partial

import pytest
import torch
from architectures import build
from transformers import AutoModelForCausalLM, BertConfig, PreTrainedModel, Qwen3ForCausalLM

from kd.errors import UserError
from kd.models.probe import reference_of, run_probe, verify_weights

CPU = torch.device("cpu")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


class ShiftedHead(Qwen3ForCausalLM):
    """Does to its logits what no configuration tells."""

    def forward(self, *args: object, **kwargs: object) -> object:
        outputs = super().forward(*args, **kwargs)
        outputs.logits = outputs.logits + torch.linspace(0.0, 0.2, 160)
        return outputs


def test_an_unknown_head_is_refused_by_name() -> None:
    model = ShiftedHead(build("qwen3", tied=True, seed=0).config)
    with pytest.raises(
        UserError, match=r"^teacher\.model: ShiftedHead does something between lm_head and logits"
    ):
        reference_of(model, role="teacher")


@pytest.mark.parametrize("head", ["behind a transform", "absent"])
def test_a_head_that_does_not_read_the_last_hidden_states_is_refused(head: str) -> None:
    sizes = {"vocab_size": 160, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = AutoModelForCausalLM.from_config(
        BertConfig(**sizes, intermediate_size=48, is_decoder=True)
    )
    if head == "absent":
        model.get_output_embeddings = lambda: None
    with pytest.raises(
        UserError, match="BertLMHeadModel does something between lm_head and logits"
    ):
        reference_of(model, role="student")


def test_a_model_that_looks_ahead_is_refused() -> None:
    model = build("gemma3_text", tied=True, seed=0, use_bidirectional_attention=True)
    with pytest.raises(UserError, match="Gemma3ForCausalLM lets a token see the tokens after it"):
        reference_of(model, role="student")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.1.mlp.up_proj.weight"])
def test_a_weight_that_is_not_finite_is_named(name: str, value: float) -> None:
    model = build("llama", tied=False, seed=0)
    model.get_parameter(name).data[3, 3] = value
    with pytest.raises(UserError, match=rf"^student\.model: {name} has values that are not finite"):
        reference_of(model, role="student")


def test_flash_attention_is_put_aside_while_the_reference_runs_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, chosen = build("llama", tied=False, seed=0), []
    expected = reference_of(copy.deepcopy(model), role="student")

    def choose(name: str) -> None:
        chosen.append(name)
        model.config._attn_implementation_internal = name

    choose("flash_attention_2")
    monkeypatch.setattr(model, "set_attn_implementation", choose)
    torch.testing.assert_close(reference_of(model, role="student"), expected)
    assert chosen == ["flash_attention_2", "eager", "flash_attention_2"]


@DTYPES
@pytest.mark.parametrize("layer", [0, 4, 7])
def test_one_random_layer_of_eight_is_found(dtype: torch.dtype, layer: int) -> None:
    model, other = _deep_model(seed=0, dtype=dtype), _deep_model(seed=1, dtype=dtype)
    reference = reference_of(model, role="student").probed
    assert (
        verify_weights(model, partial(run_probe, model), reference, role="student", device=CPU)
        == 0.0
    )
    model.model.layers[layer] = other.model.layers[layer]
    with pytest.raises(
        UserError,
        match=r"^student\.model: hidden states after loading differ .* were not loaded correctly",
    ):
        verify_weights(model, partial(run_probe, model), reference, role="student", device=CPU)


@DTYPES
def test_another_attention_kernel_is_not_taken_for_lost_weights(dtype: torch.dtype) -> None:
    model = _deep_model(seed=0, dtype=dtype)
    reference = reference_of(model, role="teacher").probed
    model.set_attn_implementation("eager")
    verify_weights(model, partial(run_probe, model), reference, role="teacher", device=CPU)


def test_weights_that_are_not_numbers_are_found() -> None:
    model = _deep_model(seed=0, dtype=torch.float32)
    reference = reference_of(model, role="teacher").probed
    model.model.norm.weight.data[3] = torch.nan
    with pytest.raises(UserError, match="relative error nan"):
        verify_weights(model, partial(run_probe, model), reference, role="teacher", device=CPU)


def test_a_model_keeps_its_mode_and_a_rank_without_a_reference_only_takes_part() -> None:
    model = _deep_model(seed=0, dtype=torch.float32)
    for training in (True, False):
        model.train(training)
        assert (
            verify_weights(model, partial(run_probe, model), None, role="student", device=CPU)
            == 0.0
        )
        assert model.training == training


def _deep_model(*, seed: int, dtype: torch.dtype) -> PreTrainedModel:
    return build("qwen3", tied=True, seed=seed, num_hidden_layers=8).to(dtype)
