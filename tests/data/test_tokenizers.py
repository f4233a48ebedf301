import copy
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from data_samples import SPECIAL, build_tokenizer
from tokenizers import Regex, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kd.data.tokenizers import check_same_tokenizer, load_tokenizers
from kd.errors import UserError
from kd.recipe import Recipe

MakeRecipe = Callable[..., Recipe]


@pytest.fixture
def models(tmp_path: Path, tiny: PreTrainedTokenizerFast) -> Path:
    for role in ("teacher", "student"):
        tiny.save_pretrained(tmp_path / role)
    return tmp_path


def test_the_students_tokenizer_gets_the_teachers_template(
    recipe: MakeRecipe, models: Path
) -> None:
    plain = build_tokenizer()
    plain.chat_template = None
    plain.save_pretrained(models / "student")
    (models / "student" / "chat_template.jinja").unlink()
    tokenizer = load_tokenizers(recipe())
    assert Path(tokenizer.name_or_path) == models / "student"
    assert tokenizer.chat_template == build_tokenizer().chat_template


def test_a_template_file_comes_before_the_models_own(recipe: MakeRecipe, models: Path) -> None:
    (models / "own.jinja").write_text("Own: {{ messages[-1].content }}")
    tokenizer = load_tokenizers(recipe(data={"chat_template": str(models / "own.jinja")}))
    assert tokenizer.chat_template == "Own: {{ messages[-1].content }}"


def test_without_a_teacher_the_students_template_serves(recipe: MakeRecipe, models: Path) -> None:
    tokenizer = load_tokenizers(recipe(teacher=None, loss={"kd_weight": 0.0}))
    assert tokenizer.chat_template == build_tokenizer().chat_template


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        (None, "set data.chat_template"),
        ("{{ raise_exception('no') }}", "data.chat_template"),
        ("{% if", "refuses"),
    ],
)
def test_an_unusable_template_fails_before_any_row(
    recipe: MakeRecipe, models: Path, template: str | None, problem: str
) -> None:
    broken = build_tokenizer()
    broken.chat_template = template
    for role in ("teacher", "student"):
        (models / role / "chat_template.jinja").unlink()
        broken.save_pretrained(models / role)
    with pytest.raises(UserError, match=problem):
        load_tokenizers(recipe())


def test_a_missing_template_file_is_named(recipe: MakeRecipe, models: Path) -> None:
    with pytest.raises(UserError, match=r"data\.chat_template = 'absent\.jinja': no such file"):
        load_tokenizers(recipe(data={"chat_template": "absent.jinja"}))


def test_different_tokenizers_are_refused_at_the_first_differing_id(
    tiny: PreTrainedTokenizerFast,
) -> None:
    other = build_tokenizer((*SPECIAL[:6], "<thought>", "</thought>"))
    with pytest.raises(UserError) as caught:
        check_same_tokenizer(teacher=tiny, student=other)
    assert "id 6 is '<think>' for the teacher" in str(caught.value)
    assert "'<thought>' for the student" in str(caught.value)


def test_a_token_that_one_side_lacks_is_a_difference(tiny: PreTrainedTokenizerFast) -> None:
    longer = copy.deepcopy(tiny)
    longer.add_special_tokens({"additional_special_tokens": ["<extra>"]})
    with pytest.raises(
        UserError, match=rf"id {len(tiny)} is '<extra>' for the teacher .* None for the student"
    ):
        check_same_tokenizer(teacher=longer, student=tiny)
    check_same_tokenizer(teacher=tiny, student=build_tokenizer())


def test_one_vocabulary_that_is_read_in_two_ways_is_refused_with_the_place(
    qwen3: PreTrainedTokenizerFast,
) -> None:
    other = copy.deepcopy(qwen3)
    words = pre_tokenizers.Split(Regex(r"\w+|\W+"), "isolated")
    other.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(False, False)]
    )
    assert other.get_vocab() == qwen3.get_vocab()
    with pytest.raises(UserError) as caught:
        check_same_tokenizer(teacher=qwen3, student=other)
    assert "but read texts differently: after 'The 3rd', at token 4 of a probe, the teacher" in str(
        caught.value
    )
    assert re.search(
        r"reads \['.of', '.', '1', '2'\] and the student .* \['.', 'of', '.', '1'\]",
        str(caught.value),
    )


def test_tokenizers_that_give_the_same_ids_pass_however_their_files_say_it(
    qwen3: PreTrainedTokenizerFast,
) -> None:
    other = copy.deepcopy(qwen3)
    other.chat_template = "{{ messages[-1].content }}"
    other.backend_tokenizer.enable_padding(length=8)
    other.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [qwen3.backend_tokenizer.pre_tokenizer]
    )
    check_same_tokenizer(teacher=qwen3, student=other)


def test_the_end_token_is_the_recipes_else_eos(recipe: MakeRecipe, models: Path) -> None:
    assert load_tokenizers(recipe()).eos_token == "<eos>"
    assert load_tokenizers(recipe(data={"end_token": "<unk>"})).eos_token == "<unk>"


@pytest.mark.parametrize("end_token", ["<end>", "ab"])
def test_an_end_token_that_is_not_one_token_is_refused(
    recipe: MakeRecipe, models: Path, end_token: str
) -> None:
    with pytest.raises(
        UserError, match=rf"data\.end_token = '{end_token}' is not one token .* '<eos>'"
    ):
        load_tokenizers(recipe(data={"end_token": end_token}))


def test_a_model_without_an_end_token_needs_one_from_the_recipe(
    recipe: MakeRecipe, models: Path
) -> None:
    for role in ("teacher", "student"):
        build_tokenizer(eos_token=None).save_pretrained(models / role)
    with pytest.raises(UserError, match=r"set data\.end_token"):
        load_tokenizers(recipe())
    assert load_tokenizers(recipe(data={"end_token": "<eos>"})).eos_token == "<eos>"


@pytest.mark.parametrize("pad_token", [None, "<eos>", "<pad>"])
def test_padding_is_never_the_end_token_nor_a_new_one(
    recipe: MakeRecipe, models: Path, pad_token: str | None
) -> None:
    for role in ("teacher", "student"):
        build_tokenizer(pad_token=pad_token).save_pretrained(models / role)
    tokenizer = load_tokenizers(recipe())
    assert tokenizer.pad_token == "<pad>"
    assert len(tokenizer) == len(build_tokenizer())


def test_real_tokenizers_get_a_pad_of_their_own(
    recipe: MakeRecipe, qwen3: PreTrainedTokenizerFast, deepseek: PreTrainedTokenizerFast
) -> None:
    for tokenizer in (qwen3, deepseek):
        made = load_tokenizers(
            recipe(student={"model": tokenizer.name_or_path}, teacher=None, loss={"kd_weight": 0.0})
        )
        assert made.pad_token_id not in (made.eos_token_id, None)
        assert len(made) == len(tokenizer)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("./absent", "no such file or folder"),
        ("nobody/absent", "the hub cannot be reached"),
        ("EMPTY", "cannot be loaded"),
    ],
)
def test_a_tokenizer_that_cannot_be_had_names_field_value_and_remedy(
    recipe: MakeRecipe, models: Path, name: str, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    if name == "EMPTY":
        (models / "empty").mkdir()
        name = str(models / "empty")
    with pytest.raises(UserError) as caught:
        load_tokenizers(recipe(student={"model": name}))
    assert f"student.model = {name!r}" in str(caught.value)
    assert problem in str(caught.value)
