"""A real language model of 135 M parameters, and ten steps of distilling it into half of its
layers, on the CPU.
"""

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("reasoning_gym", reason="needs the extra: pip install -e '.[real]'")

from kd.demo.smollm2 import build, evenly_spaced
from kd.recipe import ROOT, load_recipe

RECIPE = "smollm2_gsm_trunc50"
ASSETS = ROOT / "build" / "smollm2"


@pytest.fixture(scope="module")
def assets() -> Path:
    build(ASSETS)  # quick where `make real` has done it
    return ASSETS


def continuation(folder: Path, question: str, max_new_tokens: int) -> str:
    tokenizer, model = (
        AutoTokenizer.from_pretrained(folder),
        AutoModelForCausalLM.from_pretrained(folder),
    )
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
    )
    inputs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize(
    ("total", "chosen", "expected"), [(30, 3, [0, 14, 29]), (5, 3, [0, 2, 4]), (4, 4, [0, 1, 2, 3])]
)
def test_kept_layers_are_evenly_spaced_from_the_first_to_the_last(
    total: int, chosen: int, expected: list[int]
) -> None:
    assert evenly_spaced(total, chosen) == expected


@pytest.mark.real
@pytest.mark.timeout(900)
def test_the_unpacked_teacher_speaks_and_the_student_is_its_every_second_layer(
    assets: Path,
) -> None:
    assert "Paris" in continuation(
        assets / "teacher", "What is the capital of France?", max_new_tokens=16
    )
    teacher, student = (
        AutoModelForCausalLM.from_pretrained(assets / name) for name in ("teacher", "student")
    )
    assert [model.config.num_hidden_layers for model in (teacher, student)] == [30, 15]
    kept = evenly_spaced(30, 15)
    assert kept[0] == 0
    assert kept[-1] == 29
    assert {later - earlier for earlier, later in itertools.pairwise(kept)} == {2, 3}
    for ours, index in zip(student.model.layers, kept, strict=True):
        torch.testing.assert_close(
            ours.state_dict(), teacher.model.layers[index].state_dict(), rtol=0, atol=0
        )
    assert student.lm_head.weight is student.model.embed_tokens.weight


@pytest.mark.real
@pytest.mark.timeout(1800)
def test_ten_steps_under_zero3_lower_the_loss_and_export_a_student_that_generates(
    launch: Callable[..., CompletedProcess[str]], assets: Path, tmp_path: Path
) -> None:
    changes = {
        "run.output_dir": tmp_path,
        "data.cache_dir": tmp_path / "tokenized",
        "data.num_validation": 8,
        "training.max_steps": 10,
        "training.global_batch_size": 4,
        "training.micro_batch_size": 2,
    }
    overrides = [part for key, value in changes.items() for part in ("--set", f"{key}={value}")]
    result = launch("launch/train.py", "--recipe", RECIPE, *overrides, num_ranks=2, timeout=1700)
    assert result.returncode == 0, result.stderr[-4000:]

    folder = tmp_path / RECIPE
    assert (folder / "SUCCESS").exists()
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records]
    print("losses:", *(f"{loss:.3f}" for loss in losses))
    assert len(losses) == 10
    assert all(map(math.isfinite, losses))
    assert max(losses[-3:]) < 0.8 * losses[0]
    assert records[-1]["val_loss"] < 0.8 * losses[0]

    question = json.loads((assets / "report.jsonl").read_text().splitlines()[0])["prompt"]
    assert continuation(folder / "export" / "last", question, max_new_tokens=8)


def test_both_members_differ_in_truncation_alone() -> None:
    half, full = (load_recipe(f"smollm2_gsm_trunc{percent}").model_dump() for percent in (50, 100))
    assert (half["truncation"].pop("keep_fraction"), full["truncation"].pop("keep_fraction")) == (
        0.5,
        1.0,
    )
    assert half | {"run": None} == full | {"run": None}
