"""Shapes of models: counted by transformers itself, stored for the models that recipes name,
checked when loaded.
"""

import dataclasses
from pathlib import Path

import pytest
import torch
from tiny import ROOT, save_tiny_model, tiny_config
from transformers import AutoModelForCausalLM, GPT2Config, MixtralConfig, xLSTMConfig

from kd.errors import UserError
from kd.plan import check_shapes, model_shapes
from kd.plan.shapes import config_shapes, read_shapes, shapes_file, shapes_of
from kd.recipe import RECIPES_DIR, StudentSection, is_hub_id, load_recipe


@pytest.mark.parametrize(
    ("model", "num_parameters", "active_billions", "head"),
    [
        ("Qwen/Qwen2.5-1.5B", 1_543_714_304, 1.31, (151_936, 1536)),
        ("bespokelabs/Bespoke-Stratos-7B", 7_615_616_512, 6.53, (152_064, 3584)),
        ("Qwen/Qwen3-4B-Base", 4_022_468_096, 3.6, (151_936, 2560)),
        ("Qwen/Qwen3-8B", 8_190_735_360, 6.95, (151_936, 4096)),
        ("Qwen/Qwen3-1.7B", 1_720_574_976, 1.41, (151_936, 2048)),
        ("Qwen/Qwen3-0.6B-Base", 596_049_920, 0.44, (151_936, 1024)),
        ("Qwen/Qwen3-32B", 32_762_123_264, 31.2, (151_936, 5120)),
    ],
)
def test_stored_shapes_have_the_parameters_that_the_models_publish(
    model: str, num_parameters: int, active_billions: float, head: tuple
):
    shapes = model_shapes(StudentSection(model=model), role="student")
    assert shapes.num_parameters == num_parameters
    # "non-embedding"
    assert shapes.num_active_weights / 1e9 == pytest.approx(active_billions, rel=0.01)
    assert (shapes.vocab_size, shapes.hidden_size) == head


def test_every_model_of_a_recipe_has_shapes_without_a_network():
    for path in RECIPES_DIR.glob("*.toml"):
        recipe = load_recipe(path.stem)
        for role in ("student", "teacher") if recipe.teacher else ("student",):
            section = getattr(recipe, role)
            if section.model.startswith("runs/"):  # a second stage, whose first is to be run
                continue
            assert model_shapes(section, role=role).num_parameters > 0
            assert shapes_file(section.model).is_file() or not is_hub_id(section.model), (
                section.model
            )


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_shapes_of_a_configuration_are_those_of_the_model(tmp_path: Path, kind: str, tied: bool):
    folder = save_tiny_model(tmp_path / "model", seed=0, kind=kind, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_pretrained(folder)
    shapes = model_shapes(StudentSection(model=str(folder)), role="student")
    assert shapes == shapes_of(model) == config_shapes(tiny_config(kind, tie_word_embeddings=tied))
    assert shapes.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert shapes.has_qk_norm == (kind == "qwen3")
    assert shapes.tie_word_embeddings == tied


def test_other_architectures_have_shapes_too():
    gpt2 = config_shapes(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=160))
    assert (gpt2.intermediate_size, gpt2.num_key_value_heads, gpt2.head_dim) == (128, 4, 8)
    sizes = tiny_config().to_dict() | {"num_local_experts": 8, "num_experts_per_tok": 2}
    with torch.device("meta"):
        experts = AutoModelForCausalLM.from_config(MixtralConfig(**sizes))
    shapes = config_shapes(MixtralConfig(**sizes))
    assert shapes.num_parameters == sum(p.numel() for p in experts.parameters())
    # q, o: 32 x 32; k, v: 32 x 16; the router: 8 x 32; two of its eight experts: 3 x 32 x 48 each.
    assert shapes.num_active_weights == 2 * (2 * 32 * 32 + 2 * 32 * 16 + 8 * 32 + 2 * 3 * 32 * 48)


def test_an_architecture_that_cannot_be_planned_is_named():
    with pytest.raises(
        UserError, match="cannot plan the cost of xLSTMForCausalLM: .*num_attention_heads"
    ):
        config_shapes(xLSTMConfig(hidden_size=32, num_heads=4, num_hidden_layers=1, vocab_size=64))


def test_a_model_that_is_not_the_stored_one_is_named_with_what_differs():
    section = StudentSection(model="Qwen/Qwen3-4B-Base")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config())
    with pytest.raises(
        UserError, match=r"student\.model = 'Qwen/Qwen3-4B-Base'.*num_layers is 2, stored as 36"
    ):
        check_shapes(section, model, role="student")


def test_a_model_that_is_the_stored_one_or_that_is_not_stored_passes():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config())
    check_shapes(StudentSection(model="somewhere/else"), model, role="student")
    local = ROOT / "recipes" / "assets" / "tiny" / "teacher"
    check_shapes(
        StudentSection(model=str(local)),
        AutoModelForCausalLM.from_pretrained(local),
        role="student",
    )


def test_stored_shapes_come_back_as_they_were():
    stored = read_shapes(shapes_file("Qwen/Qwen3-8B"))
    assert dataclasses.astuple(stored)[:4] == (36, 4096, 12288, 32)
    assert hash(stored)
