"""The shipped folders of the tiny models: tokenizer and configuration."""

from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from kd.demo.arithmetic import ArithmeticSet, draw_rows
from kd.demo.tiny_models import write_model_folders
from kd.recipe import ROOT

SHIPPED = ROOT / "recipes" / "assets" / "tiny"
NAMES = ["teacher", "student_base"]


@pytest.fixture(params=NAMES)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(SHIPPED / request.param)


@pytest.mark.parametrize("name", NAMES)
def test_shipped_folders_hold_what_the_code_writes(name: str, tmp_path: Path) -> None:
    write_model_folders(tmp_path)
    shipped, written = (
        AutoConfig.from_pretrained(folder / name).to_diff_dict() for folder in (SHIPPED, tmp_path)
    )
    assert shipped == {**written, "transformers_version": shipped["transformers_version"]}
    for file in ("tokenizer.json", "chat_template.jinja"):
        assert (SHIPPED / name / file).read_text() == (tmp_path / name / file).read_text()


def test_each_character_and_each_marker_is_one_token(tokenizer: PreTrainedTokenizerFast) -> None:
    row = draw_rows(ArithmeticSet("training", 1), "0")[0]
    text = f"{row['prompt']}<think>{row['reasoning']}</think>{row['answer']}<eos>"
    token_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(token_ids) == len(row["prompt"]) + 1 + len(row["reasoning"]) + 3
    assert tokenizer.decode(token_ids) == text
    assert tokenizer.decode(token_ids, skip_special_tokens=True) == text.removesuffix("<eos>")
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_the_chat_template_is_the_user_message_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [{"role": "system", "content": "1"}, {"role": "user", "content": "9*9-8+6"}]
    assert (
        tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        == "9*9-8+6"
    )


@pytest.mark.parametrize(("name", "millions"), [("teacher", 1.33), ("student_base", 0.43)])
def test_configurations_build_models_of_the_stated_size(name: str, millions: float) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(SHIPPED / name))
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(
        millions, abs=0.005
    )
    assert model.config.tie_word_embeddings
