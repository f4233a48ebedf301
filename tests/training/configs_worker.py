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

import kd.training.loop
from kd.data.collate import Batch, collate
from kd.data.dataset import Example
from kd.demo.tiny_models import build_tokenizer
from kd.distributed.process_group import init_distributed
from kd.engine.ds_config import is_zero3, student_ds_config
from kd.engine.export import export_student
from kd.engine.zero3 import consolidated_state_dict
from kd.recipe import Recipe
from kd.training.build import build_student, build_teacher
from kd.training.loop import distill_batch, train_step

RATE, ACCUMULATION, NUM_STEPS = 3e-3, 2, 4
# case -> models and JSON of student and teacher
CASES = {
    f"{student_json}-{head}": (head, "dense_teacher", student_json, teacher_json)
    for student_json, teacher_json in {
        "zero3_cpu": "zero3_cpu",
        "zero3_bf16": "zero3_teacher",
        "zero2_bf16": "zero3_teacher",
        "zero2_fp32": "zero3_cpu",
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
    device = init_distributed()
    results = {case: run_case(models, output, case, device) for case in CASES}
    (output / f"rank{dist.get_rank()}.json").write_text(json.dumps(results))
    dist.barrier()


def run_case(models: Path, output: Path, case: str, device: torch.device) -> dict[str, Any]:
    recipe, rank = make_recipe(models, case), dist.get_rank()
    ds_config = student_ds_config(recipe, dist.get_world_size(), "cpu")
    teacher = build_teacher(recipe, device)
    model, student = build_student(recipe, ds_config, device)
    export_student(student, model, build_tokenizer(), output / case / "loaded")
    teacher_shards = [p.ds_tensor.clone() for p in teacher.model.parameters()]
    if is_zero3(ds_config):
        _save_first_gradients(student, output / case / "gradients.safetensors")

    result: dict[str, Any] = {"losses": [], "grad_norms": [], "skipped": [], "poisoned": {}}
    batches = [make_batch(rank, index) for index in range(ACCUMULATION)]
    for step in range(NUM_STEPS):
        if step == NUM_STEPS - 1:
            result["poisoned"] = {
                name: _poisoned_step(name, student, teacher, batches, device) for name in POISONS
            }
        taken = train_step(student, teacher, batches, RATE, device)
        result["losses"].append(taken.loss)
        result["grad_norms"].append(taken.grad_norm)
        result["skipped"].append(taken.skipped)
    result["teacher unchanged"] = all(
        torch.equal(p.ds_tensor, shard)
        for p, shard in zip(teacher.model.parameters(), teacher_shards, strict=True)
    )
    state = _student_state(student)
    export_student(student, model, build_tokenizer(), output / case / "trained")
    if rank == 0:
        save_file(
            {name.removeprefix("model."): t for name, t in state.items()},
            output / case / "state.safetensors",
        )
    return result


def _poisoned_step(
    name: str, student: Any, teacher: Any, batches: list[Batch], device: torch.device
) -> dict[str, bool]:
    """One step with a poisoned last micro-batch on rank 1 alone."""
    before, calls = _student_state(student), []

    def poisoned(*arguments: Any) -> tuple[torch.Tensor, ...]:
        loss, sums = distill_batch(*arguments)
        calls.append(name)
        if dist.get_rank() == 1 and len(calls) == ACCUMULATION:
            loss = POISONS[name](loss)
            sums[0] = loss.detach()
        return loss, sums

    kd.training.loop.distill_batch = poisoned
    try:
        result = train_step(student, teacher, batches, RATE, device)
    finally:
        kd.training.loop.distill_batch = distill_batch
    after = _student_state(student)
    unchanged = before is None or all(torch.equal(before[name], after[name]) for name in before)
    return {"skipped": result.skipped, "unchanged": unchanged}


def _student_state(student: Any) -> dict[str, torch.Tensor] | None:
    state = consolidated_state_dict(student)
    return (
        {name: tensor.clone() for name, tensor in state.items()} if dist.get_rank() == 0 else None
    )


def _save_first_gradients(student: Any, path: Path) -> None:
    """Before the first optimizer step, write the gradients that it is about to take."""
    step = student.step

    def save_and_step() -> None:
        if student.is_gradient_accumulation_boundary():
            gradients = {
                name: safe_get_full_grad(p).clone()
                for name, p in student.module.model.named_parameters()
            }
            if dist.get_rank() == 0:
                save_file(gradients, path)
            student.step = step
        step()

    student.step = save_and_step


if __name__ == "__main__":
    main()
