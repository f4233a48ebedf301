"""Run by the launcher on every rank: optimizer steps under each configuration, some of them
poisoned on one rank.

configs_worker.py MODELS OUTPUT

writes OUTPUT/rank{rank}.json, and from rank 0 gradients and exported students
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

import list_experts  # noqa: F401 (registers its architecture)
import numpy as np
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from safetensors.torch import save_file

from kd.data.collate import Batch, collate
from kd.data.dataset import Example
from kd.demo.tiny_models import build_tokenizer
from kd.distributed.layout import Layout
from kd.distributed.process_group import init_distributed
from kd.engine.ds_config import is_zero3, student_ds_config
from kd.engine.zero3 import consolidated_state_dict
from kd.models.student import BatchLoss, Student
from kd.recipe import Recipe
from kd.teachers.live import LiveTeacher
from kd.training.build import build_live_teacher, build_student
from kd.training.step import train_step

RATE, ACCUMULATION, NUM_STEPS = 3e-3, 2, 4
# case -> models and JSON of student and teacher
CASES = {
    f"{student_json}-{head}": (head, "dense_teacher", student_json, teacher_json)
    for student_json, teacher_json in {
        "zero3_cpu": "zero3_cpu",
        "zero3_bf16": "zero3_teacher",
        "zero2_bf16": "zero3_teacher",
        "zero2_fp32": "zero3_cpu",
        "zero1_bf16": "zero3_teacher",
        "zero1_fp32": "zero3_cpu",
    }.items()
    for head in ("tied", "untied")
} | {
    "zero3_cpu-experts": ("experts", "experts_teacher", "zero3_cpu", "zero3_cpu"),
    "zero3_cpu-list_experts": ("list_experts", "list_experts", "zero3_cpu", "zero3_cpu"),
}
POISONS = {
    "nan loss": lambda loss: loss * math.nan,
    "infinite loss": lambda loss: loss + math.inf,  # its gradient is finite
    "infinite gradient": lambda loss: loss + (loss - loss.detach()).sqrt(),  # its value is finite
}


def make_recipe(models: Path, case: str) -> Recipe:
    student, teacher, student_json, teacher_json = CASES[case]
    own_json = models / f"{student_json}.json"
    return Recipe.model_validate(
        {
            "teacher": {"model": str(models / teacher)},
            "student": {"model": str(models / student)},
            "data": {"path": "unused.jsonl"},
            "loss": {"temperature": 2.0, "kd_weight": 0.7, "ce_weight": 0.3},
            "training": {
                "global_batch_size": 2 * 2 * ACCUMULATION,
                "micro_batch_size": 2,
                "learning_rate": RATE,
                "weight_decay": 0.1,
                "adam_betas": [0.8, 0.9],
            },
            "deepspeed": {
                "student": str(own_json) if own_json.exists() else f"{student_json}.json",
                "teacher": f"{teacher_json}.json",
            },
        }
    )


def make_batch(rank: int, index: int) -> Batch:
    """Two examples; rank 1 has three times as many supervised tokens as rank 0."""
    random = np.random.default_rng([rank, index])
    examples = []
    for row in range(2):
        input_ids = random.integers(0, 150, int(random.integers(6, 10)) * (1 + 2 * rank))
        labels = input_ids.copy()
        labels[: len(labels) // 2] = -100
        examples.append(
            Example(
                input_ids, labels, row, num_tokens_3=np.array([len(input_ids), 0, 0]), read_start=0
            )
        )
    return collate(examples, pad_token_id=0)


def main() -> None:
    models, output = Path(sys.argv[1]), Path(sys.argv[2])
    layout = init_distributed()
    results = {case: run_case(models, output, case, layout) for case in CASES}
    (output / f"rank{layout.rank}.json").write_text(json.dumps(results))
    dist.barrier()


def run_case(models: Path, output: Path, case: str, layout: Layout) -> dict[str, Any]:
    recipe, rank = make_recipe(models, case), layout.rank
    ds_config = student_ds_config(recipe, layout.world_size, "cpu")
    teacher = build_live_teacher(recipe, layout)
    student = build_student(recipe, ds_config, layout)
    student.export(build_tokenizer(), output / case / "loaded")
    teacher_shards = [p.ds_tensor.clone() for p in teacher.model.parameters()]
    if is_zero3(ds_config):
        _save_first_gradients(student.engine, output / case / "gradients.safetensors")

    result: dict[str, Any] = {"losses": [], "grad_norms": [], "skipped": [], "poisoned": {}}
    batches = [make_batch(rank, index) for index in range(ACCUMULATION)]
    for step in range(NUM_STEPS):
        if step == NUM_STEPS - 1:
            result["poisoned"] = {
                name: _poisoned_step(name, student, teacher, batches, layout) for name in POISONS
            }
        taken = train_step(student, teacher, batches, RATE, layout)
        result["losses"].append(taken.loss)
        result["grad_norms"].append(taken.grad_norm)
        result["skipped"].append(taken.skipped)
    result["teacher unchanged"] = all(
        torch.equal(p.ds_tensor, shard)
        for p, shard in zip(teacher.model.parameters(), teacher_shards, strict=True)
    )
    state = _student_state(student.engine)
    student.export(build_tokenizer(), output / case / "trained")
    if rank == 0:
        save_file(
            {name[6:]: t for name, t in state.items() if name.startswith("model.")},
            output / case / "state.safetensors",
        )
    return result


def _poisoned_step(
    name: str, student: Student, teacher: LiveTeacher, batches: list[Batch], layout: Layout
) -> dict[str, bool]:
    """One step with a poisoned last micro-batch on rank 1 alone."""
    before, calls, loss_of = _student_state(student.engine), [], student.loss

    def poisoned(*arguments: Any) -> BatchLoss:
        result = loss_of(*arguments)
        calls.append(name)
        if layout.rank == 1 and len(calls) == ACCUMULATION:
            result = result._replace(loss=POISONS[name](result.loss))
        return result

    student.loss = poisoned
    try:
        result = train_step(student, teacher, batches, RATE, layout)
    finally:
        student.loss = loss_of
    after = _student_state(student.engine)
    unchanged = before is None or all(torch.equal(before[name], after[name]) for name in before)
    return {"skipped": result.skipped, "unchanged": unchanged}


def _student_state(engine: Any) -> dict[str, torch.Tensor] | None:
    state = consolidated_state_dict(engine)
    return (
        {name: tensor.clone() for name, tensor in state.items()} if dist.get_rank() == 0 else None
    )


def _save_first_gradients(engine: Any, path: Path) -> None:
    """Before the first optimizer step, write the gradients that it is about to take."""
    step = engine.step

    def save_and_step() -> None:
        if engine.is_gradient_accumulation_boundary():
            gradients = {
                name: safe_get_full_grad(p).clone()
                for name, p in engine.module.model.named_parameters()
            }
            if dist.get_rank() == 0:
                save_file(gradients, path)
            engine.step = step
        step()

    engine.step = save_and_step


if __name__ == "__main__":
    main()
