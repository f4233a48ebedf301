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


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"\xff\xfe{{ 1 }}", "line 1: byte 0xff is not UTF-8"),
        (b"", "does not print the text of role user"),
        (b"{{ 1/0 }}", "ZeroDivisionError"),
        (b"{{ 'x' + messages | length }}", "TypeError"),
        (b"{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        (b"{% include '/etc/passwd' %}", "no loader"),
        (b"{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "end"),
        (b"{{ messages[-1].content }}<think>\n\n</think>\n", "set data.template_kwargs"),
        (b" " * 2**20 + b"{{ 1 }}", "at most 1048576 are read"),
    ],
)
def test_a_template_file_that_cannot_serve_is_named_with_its_key(
    recipe: MakeRecipe, models: Path, content: bytes, problem: str
) -> None:
    path = models / "own.jinja"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_tokenizers(recipe(data={"chat_template": str(path)}))
    assert f"data.chat_template = '{path}': " in str(caught.value)
    assert problem in str(caught.value)


def test_a_models_own_template_that_is_not_utf8_is_named_with_its_file(
    recipe: MakeRecipe, models: Path
) -> None:
    (models / "teacher" / "chat_template.jinja").write_bytes(b"\n\xff")
    with pytest.raises(UserError) as caught:
        load_tokenizers(recipe())
    assert f"teacher.model = '{models}/teacher': " in str(caught.value)
    assert "chat_template.jinja: line 2: byte 0xff" in str(caught.value)


def test_a_template_file_may_have_a_byte_order_mark(recipe: MakeRecipe, models: Path) -> None:
    (models / "own.jinja").write_text("{{ messages[-1].content }}", encoding="utf-8-sig")
    tokenizer = load_tokenizers(recipe(data={"chat_template": str(models / "own.jinja")}))
    assert tokenizer.chat_template == "{{ messages[-1].content }}"


@pytest.mark.parametrize(("kwargs", "opens"), [({"enable_thinking": True}, True), ({}, False)])
def test_a_template_that_thinks_only_on_demand_is_told_by_the_recipe(
    recipe: MakeRecipe, models: Path, kwargs: dict, opens: bool
) -> None:
    (models / "own.jinja").write_text(
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if enable_thinking is defined and "
        "enable_thinking %}{{ '<think>\n' }}{% else %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    )
    made = recipe(data={"chat_template": str(models / "own.jinja"), "template_kwargs": kwargs})
    if opens:
        assert load_tokenizers(made).chat_template
    else:
        with pytest.raises(
            UserError, match=r"data\.template_kwargs, such as enable_thinking = true"
        ):
            load_tokenizers(made)


def test_a_variable_that_the_template_does_not_read_is_refused(
    recipe: MakeRecipe, models: Path
) -> None:
    (models / "own.jinja").write_text(
        "{% if thinking %}{% endif %}{{ bos_token }}{{ messages[-1].content }}"
    )
    made = recipe(
        data={"chat_template": str(models / "own.jinja"), "template_kwargs": {"thinkin": True}}
    )
    with pytest.raises(
        UserError, match=r"data\.template_kwargs\.thinkin: .*own\.jinja.* it reads thinking$"
    ):
        load_tokenizers(made)


def ends_with(models: Path, end: str) -> None:
    """Both models' templates end each turn with it; their eos is <eos>."""
    for role in ("teacher", "student"):
        tokenizer = build_tokenizer()
        tokenizer.chat_template = (
            "{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}" + end + "{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>{% endif %}"
        )
        tokenizer.save_pretrained(models / role)


@pytest.mark.parametrize(
    ("end", "end_token", "warns"),
    [
        ("<pad>", None, True),
        (" \n<pad>\n", None, True),
        ("<pad>", "<pad>", False),
        ("<eos>", "<pad>", True),
        ("<eos>", None, False),
        ("{{ eos_token }}", "<unk>", False),
        ("", None, False),
        ("\n\n", None, False),
    ],
)
def test_a_turn_that_the_template_ends_otherwise_is_a_warning(
    recipe: MakeRecipe,
    models: Path,
    end: str,
    end_token: str | None,
    warns: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    ends_with(models, end)
    tokenizer = load_tokenizers(recipe(data={"end_token": end_token}))
    assert tokenizer.eos_token == (end_token or "<eos>")
    written = f"set data.end_token = {end.strip()!r}"
    assert [written in record.message for record in caplog.records] == [True] * warns


def test_a_template_that_refuses_an_answer_has_no_end_to_compare(
    recipe: MakeRecipe, models: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ends_with(models, "{% if m.role == 'assistant' %}{{ raise_exception('no') }}{% endif %}<pad>")
    load_tokenizers(recipe())
    assert not caplog.records


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


@pytest.mark.slow
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
    assert (
        "but split text differently: after 'The 3rd', at token 4 of a test text, the teacher"
        in str(caught.value)
    )
    assert re.search(
        r"reads \['.of', '.', '1', '2'\] and the student .* \['.', 'of', '.', '1'\]",
        str(caught.value),
    )


@pytest.mark.slow
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


def test_real_tokenizers_get_a_pad_of_their_own_and_end_as_their_templates_do(
    recipe: MakeRecipe,
    qwen3: PreTrainedTokenizerFast,
    deepseek: PreTrainedTokenizerFast,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for tokenizer in (qwen3, deepseek):
        made = load_tokenizers(
            recipe(student={"model": tokenizer.name_or_path}, teacher=None, loss={"kd_weight": 0.0})
        )
        assert made.pad_token_id not in (made.eos_token_id, None)
        assert len(made) == len(tokenizer)
    assert not [record for record in caplog.records if record.name.startswith("kd")]


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
