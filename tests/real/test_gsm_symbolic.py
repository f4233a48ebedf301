"""Rows of the word problems, and their sections under the recipe that reads them; no model."""

import json
import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

pytest.importorskip("reasoning_gym", reason="needs the extra: pip install -e '.[real]'")

from kd.data.sections import render, tokenise
from kd.data.sources import SOURCES, read_row
from kd.demo import gsm_symbolic
from kd.demo.gsm_symbolic import NUM_ROWS, TEMPLATES, draw_rows, split_of, write_problem_sets
from kd.recipe import load_recipe

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


@pytest.fixture(scope="module", params=NUM_ROWS)
def rows(request: pytest.FixtureRequest) -> list[dict[str, str]]:
    return draw_rows(request.param, 150)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte."""
    tokens = ["<eos>", *sorted(ByteLevel.alphabet())]
    backend = Tokenizer(BPE({token: index for index, token in enumerate(tokens)}, merges=[]))
    backend.pre_tokenizer, backend.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    template = (
        "{% for message in messages %}"
        "{{ message['role'] + ': ' + message['content'] + '\n' }}"
        "{% endfor %}"
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", chat_template=template
    )


def numbers(text: str) -> list[float]:
    return [float(number.replace(",", "")) for number in NUMBER.findall(text)]


def templates_of(rows: list[dict[str, str]]) -> set[int]:
    return {int(row["id"].split("-")[1]) for row in rows}


def test_validation_and_report_hold_templates_that_training_never_sees() -> None:
    by_split = {split: templates_of(draw_rows(split, 150)) for split in NUM_ROWS}
    assert {split: len(templates) for split, templates in by_split.items()} == {
        "train": 68,
        "validation": 9,
        "report": 8,
    }
    assert (
        sorted(template for templates in by_split.values() for template in templates) == TEMPLATES
    )
    for split, templates in by_split.items():
        assert {split_of(template) for template in templates} == {split}


def test_the_answer_is_a_number_that_the_reasoning_arrives_at(rows: list[dict[str, str]]) -> None:
    for row in rows:
        (answer,) = numbers(row["answer"])
        assert "####" not in row["reasoning"] + row["answer"]
        assert answer in numbers(row["reasoning"]), row


def test_rows_are_distinct_and_the_same_for_the_same_seed() -> None:
    rows = draw_rows("train", 200, seed=3)
    assert rows == draw_rows("train", 200, seed=3) != draw_rows("train", 200, seed=4)
    assert len({row["id"] for row in rows}) == len({row["prompt"] for row in rows}) == 200


def test_asking_for_more_problems_than_the_templates_give_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gsm_symbolic, "TEMPLATES", [53])
    with pytest.raises(ValueError, match=r"num_rows = 5000: the templates of 'train'"):
        draw_rows("train", 5000)


def test_sections_are_the_problem_the_solution_up_to_its_marker_and_the_number(
    rows: list[dict[str, str]], tokenizer: PreTrainedTokenizerFast
) -> None:
    data = load_recipe("smollm2_gsm_trunc50").data
    for row in rows:
        tokens = tokenise(tokenizer, render(tokenizer, read_row(SOURCES["local"], row), data))
        prompt_stop, cot_stop = tokens.num_prompt, tokens.num_prompt + tokens.num_cot
        assert tokenizer.decode(tokens.input_ids[:prompt_stop]).endswith(f"user: {row['prompt']}\n")
        assert (
            tokenizer.decode(tokens.input_ids[prompt_stop:cot_stop])
            == f"{row['reasoning'].strip()}\n#### "
        )
        assert tokenizer.decode(tokens.input_ids[cot_stop:]) == f"{row['answer']}<eos>"


def test_written_sets_are_complete_and_not_written_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gsm_symbolic, "NUM_ROWS", {"train": 7, "report": 5})
    write_problem_sets(tmp_path / "sets")
    files = sorted((tmp_path / "sets").iterdir())
    assert [file.name for file in files] == ["report.jsonl", "train.jsonl"]
    rows = [json.loads(line) for line in files[1].read_text().splitlines()]
    assert rows == draw_rows("train", 7)
    files[1].write_text("kept")
    write_problem_sets(tmp_path / "sets")
    assert files[1].read_text() == "kept"
