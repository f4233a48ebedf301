"""A run that goes on with fewer or more ranks than wrote its checkpoint, by --resume auto alone."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tiny import write_tiny_recipe
from transformers import AutoModelForCausalLM

from kd.engine.checkpoint import step_folders
from kd.plan.placement import CHOICES
from kd.runs.records import read_metrics

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    return write_tiny_recipe(tmp_path_factory.mktemp("world_size"))


def arguments(recipe: Path, name: str, student: str, teacher: str, *more: str) -> list[str]:
    pairs = [f"run.name={name}", f"deepspeed.teacher={teacher}.json", *more]
    if student == "auto":
        pairs += [f"{key}=auto" for key in CHOICES]
    else:
        pairs += [f"deepspeed.student={student}.json"]
    pairs += ["training.max_steps=20", "training.checkpoint_every=5", "training.keep_last=9"]
    settings = [word for pair in pairs for word in ("--set", pair)]
    return ["launch/train.py", "--recipe", str(recipe), *settings, "--resume", "auto"]


def copy_until_step_10(run: Path, name: str) -> Path:
    folder = run.with_name(name)
    shutil.copytree(run, folder)
    for late in step_folders(folder / "checkpoints")[2:]:
        shutil.rmtree(late)
    resolved = json.loads((folder / "recipe.json").read_text())
    resolved["run"]["name"] = name
    (folder / "recipe.json").write_text(json.dumps(resolved))
    return folder


def check_adapter(export: Path) -> None:
    """The base that its adapter names, and the adapter, are the student that is exported."""
    config = json.loads((export / "adapter" / "adapter_config.json").read_text())
    student = AutoModelForCausalLM.from_pretrained(export, dtype="auto")
    base = AutoModelForCausalLM.from_pretrained(
        config["base_model_name_or_path"], dtype=student.dtype
    )
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    merged = PeftModel.from_pretrained(base, export / "adapter").merge_and_unload().state_dict()
    for name, tensor in student.state_dict().items():
        torch.testing.assert_close(tensor, merged[name])
        assert torch.equal(tensor, before[name]) == (not name.endswith("_proj.weight")), name


LORA = ("student.lora.rank=8",)


@pytest.mark.parametrize(
    ("student", "teacher", "more", "num_ranks", "tolerance"),
    [
        # fp32: the order of sums over ranks; of the four micro-batches of two, one rank gets two
        ("zero3_cpu", "zero3_cpu", (), 3, 1e-6),
        ("zero3_bf16", "zero3_teacher", (), 1, 1e-3),  # bf16 keeps three digits of a weight
        ("zero2_bf16", "zero3_teacher", (), 1, 1e-3),
        ("auto", "zero3_teacher", (), 1, 1e-3),
        ("zero3_cpu", "zero3_cpu", LORA, 3, 1e-6),
        ("zero2_bf16", "zero3_teacher", LORA, 1, 1e-3),
    ],
)
def test_the_loss_goes_on_within_rounding(
    launch, recipe, student, teacher, more, num_ranks, tolerance
):
    name = f"{student}_lora" if more else student
    whole = launch(*arguments(recipe, name, student, teacher, *more))
    assert whole.returncode == 0, whole.stderr[-4000:]
    if student == "auto":
        assert "auto is teacher.shard = gpu, deepspeed.student = zero1_bf16.json, " in whole.stderr
        assert "whole on 2 ranks (ZeRO-1, zero1_bf16.json)" in whole.stderr
        assert whole.stdout == "", "DeepSpeed prints its memory"
    folder = copy_until_step_10(recipe.parent / "runs" / name, f"{name}_on_{num_ranks}")
    done = launch(*arguments(recipe, folder.name, student, teacher, *more), num_ranks=num_ranks)
    assert done.returncode == 0, done.stderr[-4000:]
    if student == "auto":  # what was chosen is kept, and would be refused if it were another
        assert f"auto: as {folder} began" in done.stderr
        resolved = json.loads((folder / "recipe.json").read_text())
        assert resolved["deepspeed"]["student"] == "zero1_bf16.json"
        assert resolved["teacher"]["shard"] == "gpu"
        assert resolved["student"]["gradient_checkpointing"] is False
    assert f"step_10 was written by 2 ranks: converting it for {num_ranks}" in done.stderr
    records = read_metrics(folder / "metrics.jsonl")
    expected = read_metrics(folder.with_name(name) / "metrics.jsonl")
    assert len(records) == len(expected) == 20
    for key, factor in (("loss", 1), ("grad_norm", 10)):
        values = [record[key] for record in expected]
        assert [record[key] for record in records] == pytest.approx(values, rel=tolerance * factor)
    assert (folder / "SUCCESS").exists()
    left = {path.name for path in (folder / "checkpoints").iterdir() if path.is_dir()}
    assert left == {"step_5", "step_10", "step_15", "step_20"}
    if more:
        check_adapter(folder / "export" / "last")
