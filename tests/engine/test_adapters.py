"""Adapters in a state dict: peft reads what is written, and merges it to the same weights."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tiny import tiny_config
from transformers import AutoModelForCausalLM, GPT2Config, PretrainedConfig

from kd.engine.adapters import merged_weights, save_adapter
from kd.models.trained import set_trained
from kd.recipe import StudentSection

CONFIGS = {
    "qwen3": tiny_config("qwen3"),
    "qwen2": tiny_config("qwen2"),
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=160),  # transposed matrices
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_what_is_merged_is_the_base_and_the_adapter_as_peft_loads_them(
    tmp_path: Path, config: PretrainedConfig, dtype: torch.dtype
) -> None:
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype)
    section = StudentSection.model_validate({"model": str(tmp_path / "base"), "lora": {"rank": 4}})
    set_trained(model, section, seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.1)
    state = model.state_dict()
    ours = merged_weights(model, state)
    save_adapter(model, state, tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert loaded.peft_config["default"].base_model_name_or_path == str(tmp_path / "base")
    theirs = loaded.merge_and_unload().state_dict()
    assert ours.keys() == theirs.keys()
    before = base_state(tmp_path / "base")
    changed = [name for name in ours if not torch.equal(ours[name], before[name])]
    assert len(changed) == 2 * (4 if config.model_type == "gpt2" else 7)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name])
        assert ours[name].dtype == dtype


def base_state(folder: Path) -> dict[str, torch.Tensor]:
    """In the dtype that it was saved in."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()


def test_the_state_of_a_model_without_adapters_is_its_own() -> None:
    model = AutoModelForCausalLM.from_config(tiny_config())
    state = model.state_dict()
    merged = merged_weights(model, state)
    assert merged.keys() == state.keys()
    assert all(merged[name] is state[name] for name in state)
