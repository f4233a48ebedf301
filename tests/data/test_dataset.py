import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from data_samples import build_tokenizer, good_rows, write_jsonl
from transformers import PreTrainedTokenizerFast

import kd.data.tokenised
import kd.data.trace_rows
from kd.constants import IGNORE_INDEX
from kd.data.dataset import Examples, load_data
from kd.data.truncate import SECTIONS
from kd.errors import UserError
from kd.recipe import Recipe

MakeRecipe = Callable[..., Recipe]


@pytest.fixture
def count_tokenised(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one entry for each row that is tokenised, and not read from the cache."""
    calls: list[int] = []
    tokenise = kd.data.tokenised.tokenise

    def counting(*args: Any) -> Any:
        calls.append(1)
        return tokenise(*args)

    monkeypatch.setattr(kd.data.tokenised, "tokenise", counting)
    return calls


def rows_of(examples: Examples) -> list[int]:
    return [examples[i].row for i in range(len(examples))]


@pytest.mark.parametrize("fraction", [0.25, 0.5, 0.75, 1.0])
def test_an_example_is_the_head_of_the_rendered_row(
    recipe: MakeRecipe, tiny: PreTrainedTokenizerFast, fraction: float
) -> None:
    train = load_data(recipe(truncation={"keep_fraction": fraction}), tiny).train
    for i in range(len(train)):
        example = train[i]
        row = good_rows(20)[example.row]
        full = (
            f"<|user|>{row['prompt']}<eos><|assistant|><think>\n{row['reasoning'].strip()}\n</think>\n\n"
            f"{row['answer']}<eos>"
        )
        ids = tiny(full, add_special_tokens=False)["input_ids"]
        assert example.input_ids.tolist() == ids[: int(fraction * len(ids))]
        assert example.labels.tolist() == [IGNORE_INDEX, *example.input_ids[1:].tolist()]
        assert train.num_input_tokens[i] == len(example.input_ids)
        assert train.num_supervised_tokens[i] == len(example.input_ids) - 1


def test_the_sections_of_a_loss_are_the_labels(
    recipe: MakeRecipe, tiny: PreTrainedTokenizerFast
) -> None:
    texts = {}
    for section in SECTIONS:
        example = load_data(recipe(data={"loss_sections": [section]}), tiny).train[0]
        texts[section] = "".join(
            tiny.convert_ids_to_tokens(example.labels[example.labels != IGNORE_INDEX].tolist())
        )
    # All but the first token
    assert texts["prompt"].startswith(tiny.convert_ids_to_tokens(int(example.input_ids[1])))
    assert texts["prompt"].endswith("<eos><|assistant|>")
    assert texts["cot"].startswith("<think>\n")
    assert texts["cot"].endswith("\n</think>\n\n")
    assert texts["answer"].removesuffix("<eos>").isdigit()


def test_rows_are_tokenised_once_for_all_truncations_losses_and_seeds(
    recipe: MakeRecipe, tiny: PreTrainedTokenizerFast, count_tokenised: list[int]
) -> None:
    load_data(recipe(), tiny)
    assert len(count_tokenised) == 20
    load_data(
        recipe(truncation={"keep_fraction": 0.25, "window": "tail", "max_full_tokens": 1000}), tiny
    )
    load_data(
        recipe(data={"loss_sections": ["cot"], "random_mask_fraction": 0.5, "split_seed": 1}), tiny
    )
    load_data(
        recipe(run={"seed": 3}, data={"num_validation": 4, "num_train": 8, "on_bad_row": "error"}),
        tiny,
    )
    assert len(count_tokenised) == 20


@pytest.mark.parametrize(
    "changes",
    [
        {"system_prompt": "Think."},
        {"think_open": "<think>"},
        {"think_close": "</think>"},
        {"template_kwargs": {"enable_thinking": True}},
        {"date": "2025-01-01"},
    ],
    ids=str,
)
def test_what_changes_a_token_is_tokenised_anew(
    recipe: MakeRecipe, tiny: PreTrainedTokenizerFast, count_tokenised: list[int], changes: dict
) -> None:
    load_data(recipe(), tiny)
    load_data(recipe(data=changes), tiny)
    assert len(count_tokenised) == 40


def test_a_changed_file_tokenizer_or_template_is_tokenised_anew(
    recipe: MakeRecipe, tiny: PreTrainedTokenizerFast, count_tokenised: list[int], tmp_path: Path
) -> None:
    load_data(recipe(), tiny)
    write_jsonl(tmp_path / "rows.jsonl", good_rows(7))
    load_data(recipe(), tiny)
    assert len(count_tokenised) == 27
    changed = build_tokenizer()
    changed.chat_template = changed.chat_template.replace("<|assistant|>", "<|system|>")
    load_data(recipe(), changed)
    load_data(recipe(), build_tokenizer(("<pad>", "<eos>", "<unk>", "<think>", "</think>")))
    assert len(count_tokenised) == 41


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_a_file_whose_tokens_are_in_the_cache_is_hashed_and_not_read(
    recipe: MakeRecipe,
    tiny: PreTrainedTokenizerFast,
    tmp_path: Path,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the file is read")

    made = recipe(data={"path": str(tmp_path / name)})
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(good_rows(20)), tmp_path / "rows.parquet")
    expected = rows_of(load_data(made, tiny).train)
    monkeypatch.setattr(kd.data.trace_rows.TraceRows, "read", refuse)
    assert rows_of(load_data(made, tiny).train) == expected
    with (tmp_path / name).open("ab") as file:
        file.write(b"\n")
    with pytest.raises(AssertionError, match="the file is read"):
        load_data(made, tiny)


def test_an_interrupted_write_never_looks_whole(
    recipe: MakeRecipe,
    tiny: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", interrupt)
        with pytest.raises(KeyboardInterrupt):
            load_data(recipe(), tiny)
    assert os.listdir(tmp_path / "cache") == []
    assert len(load_data(recipe(), tiny).train) == 20


def test_the_loser_of_a_race_reads_what_the_winner_wrote(
    recipe: MakeRecipe,
    tiny: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rename = os.rename

    def win_first(*args: Any) -> None:
        monkeypatch.setattr(os, "rename", rename)
        load_data(recipe(), tiny)
        rename(*args)

    monkeypatch.setattr(os, "rename", win_first)
    assert len(load_data(recipe(), tiny).train) == 20
    assert len(os.listdir(tmp_path / "cache")) == 1


@pytest.mark.process
def test_two_processes_tokenise_as_one_does(
    recipe: MakeRecipe,
    tiny: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kd.data.tokenised, "_CHUNK_ROWS", 2)  # more chunks than may be pending
    one = load_data(recipe(), tiny).train
    two = load_data(recipe(data={"num_proc": 2, "cache_dir": str(tmp_path / "cache2")}), tiny).train
    assert rows_of(one) == rows_of(two)
    assert all(np.array_equal(one[i].input_ids, two[i].input_ids) for i in range(len(one)))


BAD_ROWS = [
    {"prompt": "1?", "reasoning": "", "answer": "1"},
    {"prompt": "2?", "reasoning": "2", "answer": " "},
    {"prompt": "3?", "reasoning": "</think>", "answer": "3"},
    {"prompt": "4?", "reasoning": "4", "answer": None},
    {"prompt": "5?", "reasoning": "5", "answer": ""},
    {"prompt": "6?", "reasoning": "\ud800", "answer": "6"},
]


def test_bad_rows_are_counted_by_reason_and_dropped_again_when_the_cache_is_reused(
    recipe: MakeRecipe, tiny: PreTrainedTokenizerFast, tmp_path: Path, count_tokenised: list[int]
) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [*good_rows(3), *BAD_ROWS, *good_rows(2)])
    for _ in range(2):
        data = load_data(recipe(), tiny)
        assert data.report.files[0].read.bad_rows == {
            "empty answer": 2,
            "empty reasoning": 1,
            "</think> inside the reasoning": 1,
            "NoneType where text is needed": 1,
            "text that is not valid Unicode": 1,
        }
        assert sorted(rows_of(data.train)) == [0, 1, 2, 9, 10]
        assert "11 rows, 5 usable\n  dropped 2: empty answer\n" in str(data.report)
    assert len(count_tokenised) == 5


def test_a_bad_row_is_an_error_if_the_recipe_says_so(
    recipe: MakeRecipe, tiny: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [*good_rows(3), *BAD_ROWS])
    for _ in range(2):
        with pytest.raises(UserError) as caught:
            load_data(recipe(data={"on_bad_row": "error"}), tiny)
        assert "rows.jsonl: line 4: empty reasoning" in str(caught.value)
        assert "prompt, reasoning, answer" in str(caught.value)


@pytest.mark.process
def test_a_process_that_is_ended_from_outside_is_one_error_and_leaves_no_cache(
    recipe: MakeRecipe,
    tiny: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kd.data.tokenised, "_tokenise_row", lambda *_: os._exit(1))
    with pytest.raises(UserError, match="a tokenising process was killed.*data.num_proc = 2"):
        load_data(recipe(data={"num_proc": 2}), tiny)
    assert os.listdir(tmp_path / "cache") == []


@pytest.mark.process
@pytest.mark.parametrize("num_proc", [1, 2])
def test_a_row_without_a_column_is_an_error_with_number_and_columns(
    recipe: MakeRecipe, tiny: PreTrainedTokenizerFast, tmp_path: Path, num_proc: int
) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [*good_rows(6), {"prompt": "1?", "solution": "1"}])
    with pytest.raises(UserError) as caught:
        load_data(recipe(data={"num_proc": num_proc}), tiny)
    assert "rows.jsonl: line 7: no column 'reasoning'; the row has prompt, solution; needed" in str(
        caught.value
    )


def test_lines_may_differ_in_type_and_hold_line_separators(
    recipe: MakeRecipe, tiny: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    rows = [{**row, "level": level} for row, level in zip(good_rows(2), (1, "hard"), strict=True)]
    text = "\n".join(json.dumps({**row, "note": "a\u2028b"}, ensure_ascii=False) for row in rows)
    (tmp_path / "rows.jsonl").write_text(text + "\n\n", encoding="utf-8")
    assert len(load_data(recipe(), tiny).train) == 2


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("absent.jsonl", None, "no such file"),
        ("rows.csv", "prompt,answer", "name a .jsonl or a .parquet file"),
        ("empty.jsonl", "\n", "the file is empty"),
        ("bad.jsonl", '{"prompt": 1', "bad.jsonl: line 1: not valid JSON"),
        ("list.jsonl", "[1, 2]", "instead of a JSON object"),
        ("bad.parquet", "PAR?", "not a Parquet file"),
        ("folder.jsonl", "FOLDER", "name a .jsonl or a .parquet file"),
    ],
)
def test_an_unusable_file_names_field_value_and_remedy(
    recipe: MakeRecipe,
    tiny: PreTrainedTokenizerFast,
    tmp_path: Path,
    name: str,
    content: str | None,
    problem: str,
) -> None:
    path = tmp_path / name
    if content == "FOLDER":
        path.mkdir()
    elif content is not None:
        path.write_text(content)
    with pytest.raises(UserError) as caught:
        load_data(recipe(data={"path": str(path)}), tiny)
    assert str(path) in str(caught.value)
    assert problem in str(caught.value)


def test_a_hub_dataset_out_of_reach_is_the_users_error(
    recipe: MakeRecipe, tiny: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        UserError, match=r"data\.path = 'NovaSky-AI/Sky-T1_data_17k': the hub cannot be reached"
    ):
        load_data(recipe(data={"path": None, "source": "sky_t1"}), tiny)


def test_parquet_rows_serve_as_json_lines_do(
    recipe: MakeRecipe, tiny: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(good_rows(20)), tmp_path / "rows.parquet")
    lines, parquet = (
        load_data(recipe(data=d), tiny).train
        for d in ({}, {"path": str(tmp_path / "rows.parquet")})
    )
    assert rows_of(lines) == rows_of(parquet)
    assert all(np.array_equal(lines[i].input_ids, parquet[i].input_ids) for i in range(20))


@pytest.mark.slow
def test_conversations_give_the_same_tokens_from_parquet_which_fills_them_with_nulls(
    recipe: MakeRecipe, qwen3: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    function = {"name": "calc", "arguments": '{"x": 1}'}
    tool = {"type": "function", "function": {"name": "calc", "description": "adds"}}
    said = {"role": "gpt", "content": "<think>\nSo.\n</think>\n\n3"}
    rows: list[dict[str, Any]] = [
        {
            "messages": [
                {"role": "User", "content": "Use it: 1+2?"},
                {"role": "assistant", "tool_calls": [{"type": "function", "function": function}]},
                {"role": "observation", "content": "3", "name": "calc"},
                {"role": "assistant", "content": "3", "reasoning_content": "So."},
            ],
            "tools": [tool],
        },
        {"messages": [{"role": "human", "content": "1+2?"}, said]},
        {"messages": [{"role": "critic", "content": "1+2?"}, said]},
    ]
    write_jsonl(tmp_path / "talk.jsonl", rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "talk.parquet")
    found = []
    for name in ("talk.jsonl", "talk.parquet"):
        data = load_data(recipe(data={"path": str(tmp_path / name)}), qwen3)
        (reason,) = data.report.files[0].read.bad_rows
        assert reason.startswith("unknown role 'critic'")
        assert sorted(rows_of(data.train)) == [0, 1]
        found.append({data.train[i].row: data.train[i].input_ids.tolist() for i in range(2)})
    assert found[0] == found[1]
    whole = qwen3.decode(found[0][0])
    assert '"description": "adds"' in whole
    assert '<tool_call>\n{"name": "calc", "arguments": {"x": 1}}\n</tool_call>' in whole
    assert whole.endswith("<think>\nSo.\n</think>\n\n3<|im_end|>")


def test_long_rows_are_dropped_before_the_split(
    recipe: MakeRecipe, tiny: PreTrainedTokenizerFast
) -> None:
    lengths = load_data(recipe(), tiny).train.num_tokens_N3.sum(axis=1)
    limit = int(np.sort(lengths)[12])
    data = load_data(
        recipe(truncation={"max_full_tokens": limit}, data={"num_validation": 3}), tiny
    )
    assert data.validation is not None
    kept = np.concatenate([data.train.num_tokens_N3, data.validation.num_tokens_N3]).sum(axis=1)
    assert len(kept) == (lengths <= limit).sum() < 20
    assert kept.max() == limit
    assert data.report.files[0].num_too_long == 20 - len(kept)


def test_truncation_never_moves_a_row_between_training_and_validation(
    recipe: MakeRecipe, tiny: PreTrainedTokenizerFast
) -> None:
    splits = []
    for fraction in (0.25, 0.5, 1.0):
        data = load_data(
            recipe(
                truncation={"keep_fraction": fraction}, data={"num_validation": 5, "num_train": 10}
            ),
            tiny,
        )
        assert data.validation is not None
        splits.append((rows_of(data.train), rows_of(data.validation)))
    assert splits[0] == splits[1] == splits[2]
    train, validation = splits[0]
    assert (len(train), len(validation)) == (10, 5)
    assert not set(train) & set(validation)
    other = load_data(recipe(data={"num_validation": 5, "num_train": 10, "split_seed": 1}), tiny)
    assert rows_of(other.train) != train


def test_examples_without_a_label_are_dropped_after_the_split(
    recipe: MakeRecipe, tiny: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    long_prompts = [{"prompt": "1+" * 50, "reasoning": "1", "answer": "1"}] * 4
    write_jsonl(tmp_path / "rows.jsonl", [*good_rows(16), *long_prompts])
    wanted = {"loss_sections": ["cot"], "num_validation": 10}
    whole = load_data(recipe(data=wanted), tiny)
    half = load_data(recipe(data=wanted, truncation={"keep_fraction": 0.5}), tiny)
    assert whole.validation is not None
    assert half.validation is not None
    assert half.report.validation is not None
    assert rows_of(half.train) == [row for row in rows_of(whole.train) if row < 16]
    assert rows_of(half.validation) == [row for row in rows_of(whole.validation) if row < 16]
    assert half.report.train.num_without_label + half.report.validation.num_without_label == 4


def test_a_validation_file_leaves_all_rows_for_training(
    recipe: MakeRecipe, tiny: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = str(write_jsonl(tmp_path / "held_out.jsonl", good_rows(6)))
    data = load_data(recipe(data={"validation_path": path}), tiny)
    assert data.validation is not None
    assert sorted(rows_of(data.train)) == list(range(20))
    assert rows_of(data.validation) == list(range(6))
    limited = load_data(recipe(data={"validation_path": path, "num_validation": 2}), tiny)
    assert limited.validation is not None
    assert (len(limited.train), rows_of(limited.validation)) == (20, [0, 1])


def test_prompts_of_validation_in_training_are_counted_and_left_out_if_the_recipe_says_so(
    recipe: MakeRecipe, tiny: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    rows = [{**row, "reasoning": f"{i}"} for i in range(3) for row in good_rows(5)]
    write_jsonl(tmp_path / "rows.jsonl", [*rows, *good_rows(20)[5:]])
    wanted = {"num_validation": 6}
    data = load_data(recipe(data=wanted), tiny)
    assert data.validation is not None
    held_out = {row % 5 if row < 15 else row for row in rows_of(data.validation)}
    shared = [row for row in rows_of(data.train) if row < 15 and row % 5 in held_out]
    assert data.report.num_shared_prompts == len(shared) > 0
    assert f"warning: {len(shared)} training rows share their prompt" in str(data.report)
    without = load_data(recipe(data=wanted | {"exclude_validation_prompts": True}), tiny)
    assert without.validation is not None
    assert rows_of(without.validation) == rows_of(data.validation)
    assert rows_of(without.train) == [row for row in rows_of(data.train) if row not in shared]
    assert (without.report.num_shared_prompts, without.report.num_excluded) == (0, len(shared))
    assert "warning" not in str(without.report)


def test_prompts_of_a_validation_file_are_looked_for_in_training(
    recipe: MakeRecipe, tiny: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    held_out = [{"prompt": "x?", "reasoning": "x", "answer": "1"}, good_rows(3)[2]]
    path = str(write_jsonl(tmp_path / "held_out.jsonl", held_out))
    assert load_data(recipe(data={"validation_path": path}), tiny).report.num_shared_prompts == 1
    wanted = {"validation_path": path, "exclude_validation_prompts": True}
    assert sorted(rows_of(load_data(recipe(data=wanted), tiny).train)) == [0, 1, *range(3, 20)]
    with pytest.raises(UserError, match="19 are left .* and 1 rows with a validation prompt"):
        load_data(recipe(data=wanted | {"num_train": 20}), tiny)


def test_only_training_rows_that_are_taken_count_as_shared(
    recipe: MakeRecipe, tiny: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    write_jsonl(tmp_path / "rows.jsonl", good_rows(1) * 10)
    data = load_data(recipe(data={"num_validation": 2, "num_train": 3}), tiny)
    assert data.report.num_shared_prompts == 3
    assert load_data(recipe(), tiny).report.num_shared_prompts == 0


def test_the_random_mask_is_for_training_alone(
    recipe: MakeRecipe, tiny: PreTrainedTokenizerFast
) -> None:
    data = load_data(recipe(data={"random_mask_fraction": 0.5, "num_validation": 5}), tiny)
    assert data.validation is not None
    assert np.array_equal(
        data.validation.num_supervised_tokens, data.validation.num_input_tokens - 1
    )
    expected = data.train.num_input_tokens - 1
    assert np.array_equal(data.train.num_supervised_tokens, expected - (0.5 * expected).astype(int))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            {"truncation": {"max_full_tokens": 3}},
            "dropped 20: longer than truncation.max_full_tokens = 3",
        ),
        ({"truncation": {"keep_fraction": 0.01}}, "20 dropped without a label"),
        ({"data": {"num_train": 21}}, "num_train = 21: of 20 usable rows, 20 are left"),
        ({"data": {"num_validation": 20}}, "num_train = all: of 20 usable rows, 0 are left"),
    ],
)
def test_data_of_which_nothing_is_left_say_what_removed_it(
    recipe: MakeRecipe, tiny: PreTrainedTokenizerFast, changes: dict, problem: str
) -> None:
    with pytest.raises(UserError, match=problem):
        load_data(recipe(**changes), tiny)


def test_a_file_of_bad_rows_alone_says_so(
    recipe: MakeRecipe, tiny: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    write_jsonl(tmp_path / "rows.jsonl", BAD_ROWS)
    with pytest.raises(
        UserError,
        match=r"none of its rows can be used\n.*6 rows, 0 usable\n  dropped 2: empty answer",
    ):
        load_data(recipe(), tiny)


def test_rows_of_other_tasks_are_neither_bad_nor_used(
    recipe: MakeRecipe, tiny: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    kinds = ["verifiable_math", "code", "verifiable_math"]
    rows = [
        {"task_type": kind, "prompt": "1+1?", "llm_response": "<think>1</think>2"} for kind in kinds
    ]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    data = load_data(recipe(data={"source": "synthetic_1", "on_bad_row": "error"}), tiny)
    assert sorted(rows_of(data.train)) == [0, 2]
    assert data.report.files[0].read.num_other_task == 1


def test_the_report_counts_tokens_as_the_examples_do(
    recipe: MakeRecipe, tiny: PreTrainedTokenizerFast
) -> None:
    data = load_data(
        recipe(truncation={"keep_fraction": 0.5}, data={"loss_sections": ["cot"]}), tiny
    )
    examples = [data.train[i] for i in range(len(data.train))]
    assert data.report.train.num_input_tokens == sum(len(e.input_ids) for e in examples)
    assert data.report.train.num_supervised_tokens == sum(
        int((e.labels != IGNORE_INDEX).sum()) for e in examples
    )
