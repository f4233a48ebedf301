"""The fingerprint of the data changes with every token, row and split, and with nothing else."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
from data_samples import build_tokenizer, good_rows, write_jsonl
from transformers import PreTrainedTokenizerFast

import kd.data.fingerprints
from kd.data.dataset import load_data
from kd.data.fingerprints import data_fingerprints
from kd.recipe import Recipe

MakeRecipe = Callable[..., Recipe]


def test_a_template_of_the_same_length_changes_the_tokens_alone(
    recipe: MakeRecipe, tiny: PreTrainedTokenizerFast
) -> None:
    before = data_fingerprints(load_data(recipe(), tiny))
    changed = build_tokenizer()
    changed.chat_template = changed.chat_template.replace("<|assistant|>", "<|system|>")
    after = data_fingerprints(load_data(recipe(), changed))
    assert (before[1] == after[1], before[2] == after[2]) == (True, False)


def test_one_token_of_the_validation_rows_changes_it(
    recipe: MakeRecipe, tiny: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    rows = good_rows(4)
    held_out = recipe(data={"validation_path": str(tmp_path / "other.jsonl")})
    found = []
    for answer in ("7", "8"):
        write_jsonl(tmp_path / "other.jsonl", [*rows[:3], {**rows[3], "answer": answer}])
        found.append(data_fingerprints(load_data(held_out, tiny)))
    assert (found[0][1] == found[1][1], found[0][2] == found[1][2]) == (True, False)


@pytest.mark.parametrize("batch_size", [1, 3, 1000])
def test_it_is_that_of_the_ids_one_after_another(
    recipe: MakeRecipe,
    tiny: PreTrainedTokenizerFast,
    batch_size: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kd.data.fingerprints, "_BATCH_SIZE", batch_size)
    data = load_data(recipe(data={"num_validation": 7}), tiny)
    assert data.validation is not None
    ids, lengths = hashlib.sha256(), hashlib.sha256()
    for examples in (data.train, data.validation):
        for row in examples.row_N.tolist():
            ids.update(examples.table[row]["input_ids"].astype("int32").tobytes())
        lengths.update(examples.row_N.tobytes() + examples.num_tokens_N3.tobytes())
    ids.update(lengths.digest())
    assert data_fingerprints(data) == {1: lengths.hexdigest(), 2: ids.hexdigest()}


def test_truncation_and_the_loss_change_nothing(
    recipe: MakeRecipe, tiny: PreTrainedTokenizerFast
) -> None:
    whole = data_fingerprints(load_data(recipe(), tiny))
    changed = recipe(truncation={"keep_fraction": 0.9}, data={"random_mask_fraction": 0.5})
    assert data_fingerprints(load_data(changed, tiny)) == whole
