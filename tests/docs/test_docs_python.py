"""The Python blocks of docs/ run as they are printed, and name what kd exports."""

import inspect
import re

import pytest
import torch
from doc_pages import DOCS, fenced, first_cells, section
from tiny import tiny_config
from transformers import Qwen2ForCausalLM, Qwen3ForCausalLM

import kd
import kd.losses

PYTHON = DOCS / "python.md"


@pytest.fixture
def names() -> dict[str, object]:
    """What a reader has before a block begins."""
    torch.manual_seed(0)
    labels = torch.randint(0, 160, (2, 9))
    input_ids = labels.clone()
    labels[:, :4] = -100
    return {
        "torch": torch,
        "student": Qwen3ForCausalLM(tiny_config()),
        "teacher": Qwen2ForCausalLM(tiny_config("qwen2", hidden_size=48)),
        "input_ids": input_ids,
        "labels": labels,
    }


def test_the_block_of_the_loss_gives_gradients_to_the_student_only(names):
    (block,) = fenced(DOCS / "loss.md", "python")
    exec(block, names)
    assert names["loss"] > 0.5
    assert names["student"].lm_head.weight.grad.norm() > 1e-3
    assert all(parameter.grad is None for parameter in names["teacher"].parameters())


def test_the_block_of_recipes_holds(names):
    (block,) = fenced(PYTHON, "python")
    exec(block, names)
    assert names["longer"].run.seed == 7


def test_every_page_with_python_is_among_these():
    pages = {page.name for page in DOCS.glob("*.md") if fenced(page, "python")}
    assert pages == {"loss.md", "python.md"}


def test_all_that_kd_exports_is_listed_and_nothing_else():
    text = PYTHON.read_text(encoding="utf-8").partition("\n## ")[0]
    cells = re.findall(r"^\| (`.*?`) \|", text, re.MULTILINE)
    listed = {name for cell in cells for name in re.findall(r"`([\w.]+)`", cell)}
    own = set(kd.losses.__all__) - set(kd.__all__)
    assert listed == {f"kd.{name}" for name in kd.__all__} | own
    assert "kd.distillation_loss" in first_cells(text)


def test_every_argument_of_the_loss_is_listed():
    rows = re.findall(r"^\| (`.*?`) \|", section(PYTHON, "distillation_loss"), re.MULTILINE)
    listed = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert listed == set(inspect.signature(kd.distillation_loss).parameters)
