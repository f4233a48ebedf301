"""The generation config of an export: new, valid, and of one mind with config.json."""

from pathlib import Path
from typing import Any

import pytest
from tiny import ROOT, save_tiny_model
from transformers import AutoTokenizer, GenerationConfig, Qwen3ForCausalLM

from kd.engine.export import set_generation_config
from kd.errors import UserError

ASSETS = ROOT / "recipes" / "assets" / "tiny" / "student_base"
SHIPPED: list[dict[str, Any]] = [
    {"min_p": 0.1},
    {"typical_p": 0.5, "do_sample": True},
    {"temperature": 0.6, "top_p": 0.95, "top_k": 20},
    {"early_stopping": True, "length_penalty": 2.0},
    {"output_scores": True},
    {"penalty_alpha": 0.3, "repetition_penalty": 1.1},
    {"epsilon_cutoff": 3e-4, "eta_cutoff": 2e-3},
]


@pytest.fixture
def model(tmp_path: Path) -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM.from_pretrained(save_tiny_model(tmp_path / "model", seed=0))


@pytest.mark.parametrize("shipped", SHIPPED, ids=str)
def test_whatever_the_student_ships_the_export_can_be_saved(
    tmp_path: Path, model: Qwen3ForCausalLM, shipped: dict[str, Any]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(ASSETS)
    model.generation_config = GenerationConfig(eos_token_id=[5, 6], **shipped)
    set_generation_config(model, tokenizer)
    model.save_pretrained(tmp_path / "export")
    saved = GenerationConfig.from_pretrained(tmp_path / "export")
    assert {name: getattr(saved, name) for name in shipped} == dict.fromkeys(shipped)


@pytest.mark.parametrize(
    ("shipped", "more"),
    [
        (None, []),
        (5, [5]),
        ([1, 2, 3], [1, 2, 3]),
        ([5, "end", 5], [5]),  # "end": the tokenizer's own
    ],
    ids=str,
)
@pytest.mark.parametrize("where", ["generation_config", "config"])
def test_the_ends_that_the_student_had_are_kept_behind_the_trained_one(
    tmp_path: Path, model: Qwen3ForCausalLM, where: str, shipped: Any, more: list[int]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(ASSETS)
    end = tokenizer.eos_token_id
    if isinstance(shipped, list):
        shipped = [end if token_id == "end" else token_id for token_id in shipped]
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    getattr(model, where).eos_token_id = shipped
    set_generation_config(model, tokenizer)
    model.save_pretrained(tmp_path / "export")
    loaded = Qwen3ForCausalLM.from_pretrained(tmp_path / "export")
    expected = [end, *(token_id for token_id in more if token_id != end)]
    assert loaded.generation_config.eos_token_id == (expected if len(expected) > 1 else end)
    assert loaded.config.eos_token_id == loaded.generation_config.eos_token_id
    assert loaded.config.pad_token_id == loaded.generation_config.pad_token_id


@pytest.mark.parametrize("shipped", ["</s>", [1, None], [True], [1.5], -1, {"a": 1}], ids=str)
def test_an_end_that_is_no_id_is_refused(model: Qwen3ForCausalLM, shipped: Any) -> None:
    model.generation_config.eos_token_id = shipped
    with pytest.raises(UserError, match="eos_token_id = "):
        set_generation_config(model, AutoTokenizer.from_pretrained(ASSETS))
