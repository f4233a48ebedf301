"""Run by the launcher on every rank: the bytes that engines hold after two steps, and those of a
checkpoint.

plan_worker.py FOLDER      writes FOLDER/rank{rank}.json, {case: {part: bytes, "same_shapes": bool}}
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from kd.data.collate import Batch, collate
from kd.data.dataset import Example
from kd.distributed.layout import Layout
from kd.distributed.process_group import init_distributed
from kd.engine.checkpoint import save_checkpoint
from kd.engine.ds_config import is_zero3, student_ds_config
from kd.plan import model_shapes
from kd.plan.shapes import shapes_of
from kd.plan.trainable import trainable_of
from kd.recipe import ROOT, Recipe
from kd.training.build import build_live_teacher, build_student
from kd.training.step import train_step

# case -> JSON of student and teacher: in ds_configs/, or written by the test
CASES = {
    "fp32": ("zero3_cpu.json", "zero3_cpu.json"),
    "fp32, default persistence threshold": ("zero3_fp32_default.json", "zero3_fp32_default.json"),
    "bf16": ("zero3_bf16.json", "zero3_teacher.json"),
    "bf16, stage 2": ("zero2_bf16.json", "zero3_teacher.json"),
    "bf16, stage 1, whole teacher": ("zero1_bf16.json", "zero3_teacher.json"),
    "fp32, adapters": ("zero3_cpu.json", "zero3_cpu.json"),
    "bf16, stage 2, adapters": ("zero2_bf16.json", "zero3_teacher.json"),
    "fp32, frozen head": ("zero3_cpu.json", "zero3_cpu.json"),
}
ASSETS = ROOT / "recipes" / "assets" / "tiny"


def make_recipe(folder: Path, case: str) -> Recipe:
    student, teacher = (
        str(folder / name) if (folder / name).exists() else name for name in CASES[case]
    )
    return Recipe.model_validate(
        {
            "teacher": {
                "model": str(ASSETS / "teacher"),
                "shard": "gpu" if "whole teacher" in case else "world",
            },
            "student": {
                "model": str(ASSETS / "student_base"),
                "lora": {"rank": 64} if "adapters" in case else None,
                "freeze_head": "frozen head" in case,
            },
            "data": {"path": "unused.jsonl"},
            "truncation": {"max_full_tokens": 64},
            "training": {"global_batch_size": 4, "micro_batch_size": 2},
            "deepspeed": {"student": student, "teacher": teacher},
        }
    )


def main() -> None:
    folder, layout = Path(sys.argv[1]), init_distributed()
    measured = {
        case: measure(make_recipe(folder, case), folder / f"checkpoints {case}", layout)
        for case in CASES
    }
    (folder / f"rank{layout.rank}.json").write_text(json.dumps(measured))
    dist.barrier()


def measure(recipe: Recipe, checkpoints: Path, layout: Layout) -> dict[str, int]:
    ds_config = student_ds_config(recipe, layout.world_size, layout.device.type)
    teacher = build_live_teacher(recipe, layout)
    student = build_student(recipe, ds_config, layout)
    model, engine = student.model, student.engine
    assert teacher is not None
    assert recipe.teacher is not None
    for index in range(2):
        train_step(student, teacher, [make_batch(index)], 1e-3, layout)
    save_checkpoint(engine, checkpoints, 2, {})
    states = [
        value for state in engine.optimizer.optimizer.state.values() for value in state.values()
    ]
    optimizer: Any = engine.optimizer
    is_stage_3 = is_zero3(ds_config)
    names = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups")
    names += ("fp32_groups_flat_partition",)  # of stages 3, 2, and 1 in bf16
    masters = next(getattr(optimizer, name) for name in names if hasattr(optimizer, name))
    shapes = [shapes_of(teacher.model), shapes_of(model)]
    return {
        "same_shapes": shapes
        == [
            model_shapes(recipe.teacher, role="teacher"),
            trainable_of(recipe.student, model_shapes(recipe.student, role="student")).shapes,
        ],
        "teacher_shard": held_bytes(weights_of(teacher.model)),
        "student_weights": held_bytes(weights_of(model)),
        "optimizer": held_bytes([*masters, *(state for state in states if state.numel() > 1)]),
        "gradients": held_bytes([optimizer.grad_partitions_flat_buffer]) if is_stage_3 else 0,
        "checkpoint": sum(path.stat().st_size for path in checkpoints.rglob("*") if path.is_file()),
    }


def weights_of(model: torch.nn.Module) -> list[torch.Tensor]:
    """Shards, and what is whole besides them."""
    shards = [
        parameter.ds_tensor for parameter in model.parameters() if hasattr(parameter, "ds_tensor")
    ]
    return [*shards, *(parameter.data for parameter in model.parameters())]


def held_bytes(tensors: Iterable[torch.Tensor]) -> int:
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors
    }
    return sum(storages.values())


def make_batch(index: int) -> Batch:
    random = np.random.default_rng([dist.get_rank(), index])
    ids = [random.integers(0, 20, 64) for _ in range(2)]
    sections = np.array([4, 50, 10])
    return collate(
        [Example(tokens, tokens, i, sections, read_start=0) for i, tokens in enumerate(ids)],
        pad_token_id=0,
    )


if __name__ == "__main__":
    main()
