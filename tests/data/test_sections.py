import copy
import random

import pytest
from data_samples import ROWS
from transformers import PreTrainedTokenizerFast

from kd.data.prompt import render_prompt
from kd.data.sections import SectionedTokens, render, tokenise
from kd.data.sources import SOURCES, Trace, read_row
from kd.data.turns import BadRow
from kd.errors import UserError
from kd.recipe import DataSection, load_recipe

DATA = DataSection(path="rows.jsonl")
TRACE = Trace(({"role": "user", "content": "1+1?"},), "One and one.", "It is 2.")


def sectioned(
    tokenizer: PreTrainedTokenizerFast, trace: Trace, data: DataSection = DATA
) -> SectionedTokens:
    return tokenise(tokenizer, render(tokenizer, trace, data))


def spans(tokenizer: PreTrainedTokenizerFast, tokens: SectionedTokens) -> tuple[str, str, str]:
    ids, prompt, cot = tokens.input_ids, tokens.num_prompt, tokens.num_cot
    assert prompt + cot + tokens.num_answer == len(ids)
    return tuple(
        tokenizer.decode(part)
        for part in (ids[:prompt], ids[prompt : prompt + cot], ids[prompt + cot :])
    )


@pytest.mark.parametrize(("source", "row"), ROWS.values(), ids=ROWS)
def test_the_spans_of_every_source_decode_to_their_text(
    qwen3: PreTrainedTokenizerFast, source: str, row: dict
) -> None:
    trace = read_row(SOURCES[source], row)
    assert trace is not None
    assert spans(qwen3, sectioned(qwen3, trace)) == (
        "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n",
        "<think>\nOne and one.\n</think>\n\n",
        "It is 2.<|im_end|>",
    )


def test_a_teacher_with_markers_and_a_system_prompt_of_its_own_gets_them_back(
    qwen3: PreTrainedTokenizerFast,
) -> None:
    recipe = load_recipe("qwen7b_to_1p5b_trunc50")
    prompt, cot, answer = spans(qwen3, sectioned(qwen3, TRACE, recipe.data))
    assert prompt.startswith(
        "<|im_start|>system\nYour role as an assistant involves thoroughly exploring"
    )
    assert prompt.endswith("<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n")
    assert cot == "<|begin_of_thought|>\n\nOne and one.\n\n<|end_of_thought|>\n\n"
    assert answer == "<|begin_of_solution|>\n\nIt is 2.\n\n<|end_of_solution|><|im_end|>"


@pytest.mark.parametrize("name", ["qwen3", "deepseek"])
def test_ids_are_those_of_the_whole_text(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(name)
    rng = random.Random(0)
    pieces = ["x", " ", "\n", "12", ":", ">", "<", "</", "\\frac{1}{2}", "\t"]
    # Composed, decomposed, four bytes, other scripts
    pieces += [
        "\u00e9",
        "e\u0301",
        "\U0001f916",
        "\u4e2d\u6587",
    ]
    for _ in range(200):
        question, reasoning, answer = (
            "".join(rng.choices(pieces, k=rng.randint(1, 12))) + "." for _ in range(3)
        )
        trace = Trace(({"role": "user", "content": question},), reasoning, answer)
        texts = render(tokenizer, trace, DATA)
        tokens = tokenise(tokenizer, texts)
        assert tokens.input_ids == tokenizer("".join(texts), add_special_tokens=False)["input_ids"]
        assert tokens.num_prompt > 0
        assert tokens.num_cot > 0
        assert tokens.num_answer > 0
        assert tokens.num_prompt + tokens.num_cot + tokens.num_answer == len(tokens.input_ids)


def test_a_marker_of_several_tokens_stays_in_the_chain_of_thought(
    deepseek: PreTrainedTokenizerFast,
) -> None:
    tokens = sectioned(deepseek, TRACE)
    assert spans(deepseek, tokens) == (
        deepseek.bos_token + "<\uff5cUser\uff5c>1+1?<\uff5cAssistant\uff5c>",
        "<think>\nOne and one.\n</think>\n\n",
        "It is 2." + deepseek.eos_token,
    )
    assert tokens.input_ids.count(deepseek.bos_token_id) == 1
    assert tokens.input_ids.count(deepseek.eos_token_id) == 1


@pytest.mark.parametrize(
    ("opening", "cot"),
    [
        ("<think>\n", "One and one.\n</think>\n\n"),
        ("<think>\n\n", "One and one.\n</think>\n\n"),
        ("<think>", "\nOne and one.\n</think>\n\n"),
        ("", "<think>\nOne and one.\n</think>\n\n"),
    ],
)
@pytest.mark.parametrize("name", ["qwen3", "deepseek"])
def test_a_template_that_opens_the_thought_is_not_opened_twice(
    name: str,
    opening: str,
    cot: str,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer = request.getfixturevalue(name)  # large: a copy takes seconds
    opens = tokenizer.chat_template + "{{ '" + opening.replace("\n", "\\n") + "' }}"
    monkeypatch.setattr(tokenizer, "chat_template", opens)
    prompt_text, cot_text, _ = render(tokenizer, TRACE, DATA)
    assert prompt_text.endswith(opening)
    assert cot_text == cot
    assert (prompt_text + cot_text).count("<think>") == 1


def test_a_token_that_straddles_a_border_belongs_to_the_earlier_section(
    qwen3: PreTrainedTokenizerFast,
) -> None:
    data = DATA.model_copy(update={"think_open": "\n[think]", "think_close": "[/think]\n"})
    tokens = sectioned(qwen3, TRACE, data)
    # "assistant\n" + "\n[think]": both line feeds are one token, the prompt's last.
    assert spans(qwen3, tokens) == (
        "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n\n",
        "[think]One and one.[/think]\n",
        "It is 2.<|im_end|>",
    )


def test_reasoning_and_answer_are_stripped(qwen3: PreTrainedTokenizerFast) -> None:
    padded = Trace(TRACE.messages, "\n\n One and one. \n", "\n\nIt is 2.\n")
    assert sectioned(qwen3, padded) == sectioned(qwen3, TRACE)


def test_the_recipes_system_prompt_replaces_the_rows_own(qwen3: PreTrainedTokenizerFast) -> None:
    messages = [{"role": "system", "content": "Theirs."}, *TRACE.messages]
    assert "Theirs." not in render_prompt(qwen3, messages, DATA)
    ours = render_prompt(qwen3, messages, DATA.model_copy(update={"system_prompt": "Ours."}))
    assert ours.startswith("<|im_start|>system\nOurs.<|im_end|>\n<|im_start|>user\n1+1?")


def test_markers_in_the_question_move_no_border(qwen3: PreTrainedTokenizerFast) -> None:
    question = "Why does </think> follow <think>, and <|im_end|>?"
    prompt, cot, answer = spans(
        qwen3, sectioned(qwen3, Trace(({"role": "user", "content": question},), "a", "b"))
    )
    assert question in prompt
    assert (cot, answer) == ("<think>\na\n</think>\n\n", "b<|im_end|>")


@pytest.mark.parametrize(
    ("reasoning", "answer", "reason"),
    [
        (" \n", "2", "empty reasoning"),
        ("One.", " ", "empty answer"),
        ("One. </think>", "2", "</think> inside the reasoning"),
        ("One.", "<think>2", "<think> inside the answer"),
        ("One.", "2<|im_end|>", "<|im_end|> inside the answer"),
    ],
)
def test_texts_that_would_teach_to_stop_or_think_twice_are_bad_rows(
    qwen3: PreTrainedTokenizerFast, reasoning: str, answer: str, reason: str
) -> None:
    with pytest.raises(BadRow, match=reason.replace("|", r"\|")):
        render(qwen3, Trace(TRACE.messages, reasoning, answer), DATA)


def test_an_empty_prompt_is_a_bad_row(qwen3: PreTrainedTokenizerFast) -> None:
    with pytest.raises(BadRow, match="empty prompt"):
        render_prompt(
            qwen3, [{"role": "system", "content": "x"}, {"role": "user", "content": " "}], DATA
        )


def test_messages_that_the_template_refuses_are_a_bad_row(tiny: PreTrainedTokenizerFast) -> None:
    tokenizer = copy.deepcopy(tiny)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(BadRow, match="roles must alternate"):
        render_prompt(tokenizer, TRACE.messages, DATA)


def test_a_missing_chat_template_names_the_remedy(tiny: PreTrainedTokenizerFast) -> None:
    tokenizer = copy.deepcopy(tiny)
    tokenizer.chat_template = None
    with pytest.raises(UserError, match=r"set data\.chat_template"):
        render_prompt(tokenizer, TRACE.messages, DATA)
