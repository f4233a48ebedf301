"""Which weights of a student are trained, and what is refused before one is loaded."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import save_tiny_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from kd.errors import UserError
from kd.models.model_folder import check_models
from kd.models.trained import set_trained
from kd.recipe import Recipe, StudentSection

IDS = torch.arange(1, 13)[None]
HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"


def student(
    folder: Path, *, tied: bool = True, dtype: torch.dtype = torch.float32, **keys: Any
) -> PreTrainedModel:
    """A model of two layers with these keys of [student]."""
    if not folder.exists():
        save_tiny_model(folder, seed=0, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    section = StudentSection.model_validate({"model": str(folder), **keys})
    set_trained(model, section, seed=7)
    return model


def trained(model: PreTrainedModel) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adapters_alone_are_trained_and_change_nothing_at_first(tmp_path, dtype):
    plain = student(tmp_path / "model", dtype=dtype)
    model = student(tmp_path / "model", dtype=dtype, lora={"rank": 4})
    assert len(trained(model)) == 2 * 2 * 7, "A and B of seven matrices in two layers"
    assert all(".lora_" in name for name in trained(model))
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert torch.equal(model(input_ids=IDS).logits, plain(input_ids=IDS).logits)


def test_adapters_are_the_same_wherever_they_are_made(tmp_path):
    torch.manual_seed(1)
    first = student(tmp_path / "model", lora={}).state_dict()
    torch.manual_seed(2)
    second = student(tmp_path / "model", lora={}).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_adapters_stand_where_the_recipe_says(tmp_path):
    names = trained(student(tmp_path / "model", lora={"target_modules": ["q_proj", "mlp.up_proj"]}))
    assert {name.split(".")[-4] for name in names} == {"q_proj", "up_proj"}
    assert len(names) == 2 * 2 * 2


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens", "query", "proj", "input_layernorm"])
def test_a_target_that_is_no_matrix_of_the_backbone_is_refused_by_name(tmp_path, target):
    with pytest.raises(
        UserError, match=f"target_modules: '{target}' is not a linear.*o_proj, q_proj"
    ):
        student(tmp_path / "model", lora={"target_modules": ["q_proj", target]})


def test_the_extra_is_named_where_peft_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match='install the extra "lora"'):
        student(tmp_path / "model", lora={})


def test_gradients_reach_every_adapter_and_nothing_else_through_checkpointed_layers(tmp_path):
    model = student(tmp_path / "model", lora={"dropout": 0.1}).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model(input_ids=IDS, labels=IDS).loss.backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == trained(model)


@pytest.mark.parametrize(
    ("keys", "frozen"),
    [
        ({"freeze_head": True}, {HEAD}),
        ({"freeze_embeddings": True}, {EMBEDDINGS}),
        ({"freeze_head": True, "freeze_embeddings": True}, {HEAD, EMBEDDINGS}),
    ],
)
def test_a_head_and_embeddings_of_their_own_are_frozen_apart(tmp_path, keys, frozen):
    everything = trained(student(tmp_path / "model", tied=False))
    assert {HEAD, EMBEDDINGS} < everything
    assert trained(student(tmp_path / "model", tied=False, **keys)) == everything - frozen


def test_a_tied_head_is_frozen_with_its_embeddings_and_the_log_says_so(tmp_path, caplog):
    caplog.set_level("INFO")
    names = trained(student(tmp_path / "model", freeze_head=True))
    assert EMBEDDINGS not in names
    assert names
    assert "freeze_head: the embeddings are the same tensor" in caplog.text


@pytest.mark.parametrize("key", ["freeze_embeddings", "lora"])
def test_what_cannot_be_trained_is_refused_before_a_model_is_loaded(tmp_path, key):
    folder = save_tiny_model(tmp_path / "model", seed=0)
    values = {"freeze_embeddings": True, "lora": {"target_modules": ["lm_head"]}}
    section = {"model": str(folder), key: values[key]}
    content = {"student": section, "data": {"path": "unused"}, "loss": {"kd_weight": 0.0}}
    with pytest.raises(UserError, match=f"student.{key}"):
        check_models(Recipe.model_validate(content))
