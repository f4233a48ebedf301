"""Run by the launcher on every rank: what train_step() gives in many cases, against one process and
full logits.

gradients_worker.py MODELS OUTPUT

writes {case: {"gradients": {parameter: [error, norm of the reference]}, ...}}
"""

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from full_logits import full_diagnostics, full_loss
from transformers import AutoModelForCausalLM

from kd.data.collate import Batch, collate
from kd.data.dataset import Example
from kd.distributed.process_group import init_distributed
from kd.engine.ds_config import student_ds_config
from kd.recipe import Recipe
from kd.training.build import build_live_teacher, build_student
from kd.training.step import train_step

TIED, ACCUMULATION, CHECKPOINTING = ("tied", "untied"), (1, 4), (False, True)
SPREADS = ("equal", "unequal", "empty")  # how supervised tokens are spread over the two ranks


def main() -> None:
    models, output = Path(sys.argv[1]), Path(sys.argv[2])
    layout = init_distributed()
    results: dict[str, Any] = {}
    for head, accumulation, checkpointing in itertools.product(TIED, ACCUMULATION, CHECKPOINTING):
        recipe = _recipe(models, head, accumulation, checkpointing)
        teacher = build_live_teacher(recipe, layout)
        student = build_student(recipe, student_ds_config(recipe, layout.world_size, "cpu"), layout)
        assert all(p.ds_tensor.numel() < p.ds_numel for p in student.trainable_parameters), (
            "not partitioned"
        )
        captured = _capture_gradients_at_boundary(student.engine)
        for spread in SPREADS:
            batches = [[_batch(spread, rank, i) for i in range(accumulation)] for rank in range(2)]
            # rate 0: the weights stay those of the checkpoint for the next spread
            result = train_step(student, teacher, batches[layout.rank], 0.0, layout)
            name = f"{head}-accumulation{accumulation}-checkpointing{int(checkpointing)}-{spread}"
            if layout.rank == 0:
                loss, diagnostics, reference = _reference(
                    recipe, [batch for rank in batches for batch in rank]
                )
                errors = {key: _error(captured[key], reference[key]) for key in reference}
                results[name] = {"loss": [result.loss, loss], "gradients": errors}
                results[name]["diagnostics"] = [result.diagnostics, diagnostics]
        prompt = torch.arange(3, 11)[None]
        # Another number of tokens on each rank: where layers are gathered one by one, the rank that
        # has ended takes part.
        num_new = 5 if layout.rank == 0 else 2
        generated = {}
        for way in ("whole", "layers"):
            with student.generating(whole=way == "whole") as (model, in_step):
                assert in_step == (way == "layers")
                options = {"do_sample": False, "synced_gpus": in_step}
                generated[way] = model.generate(
                    input_ids=prompt, max_new_tokens=num_new, **options
                ).tolist()
            assert student.model.training
            assert all(p.ds_tensor.numel() < p.ds_numel for p in student.trainable_parameters)
        # A step afterwards has the gradients of one before
        train_step(student, teacher, batches[layout.rank], 0.0, layout)
        if layout.rank == 0:
            whole = AutoModelForCausalLM.from_pretrained(recipe.student.model, dtype=torch.float32)
            expected = whole.generate(input_ids=prompt, max_new_tokens=5, do_sample=False).tolist()
            name = f"{head}-accumulation{accumulation}-checkpointing{int(checkpointing)}"
            results[name] = {"generated": [*generated.values(), expected]}
            errors = {key: _error(captured[key], reference[key]) for key in reference}
            results[f"{name}-after"] = {"gradients": errors}
    if layout.rank == 0:
        output.write_text(json.dumps(results))
    dist.barrier()


def _recipe(models: Path, head: str, accumulation: int, checkpointing: bool) -> Recipe:
    return Recipe.model_validate(
        {
            "teacher": {"model": str(models / "teacher")},
            "student": {"model": str(models / head), "gradient_checkpointing": checkpointing},
            "data": {"path": "unused.jsonl"},
            "loss": {"temperature": 2.0, "kd_weight": 0.7, "ce_weight": 0.3},
            "training": {
                "global_batch_size": 2 * 2 * accumulation,
                "micro_batch_size": 2,
                "max_grad_norm": 1e9,
            },
            "deepspeed": {
                "student": str(models / "small_buckets.json"),
                "teacher": "zero3_cpu.json",
            },
        }
    )


def _batch(spread: str, rank: int, index: int) -> Batch:
    """Two examples whose supervised tokens depend on the rank, as truncation and filters make it
    happen.
    """
    random = np.random.default_rng([rank, index])
    examples = []
    for row in range(2):
        length = (
            int(random.integers(5, 9))
            if spread == "equal" or rank == 0
            else int(random.integers(12, 30))
        )
        input_ids = random.integers(0, 150, length)
        labels = input_ids.copy()
        labels[: length // 2] = -100
        if spread == "empty" and (rank == 1 or index == 1):
            labels[:] = -100
        num_tokens, read_start = np.array([6, length, 10]), int(random.integers(0, 16))
        examples.append(Example(input_ids, labels, row, num_tokens, read_start))
    return collate(examples, pad_token_id=0)


def _capture_gradients_at_boundary(engine: Any) -> dict[str, torch.Tensor]:
    captured: dict[str, torch.Tensor] = {}
    step = engine.step

    def capture_and_step() -> None:
        if engine.is_gradient_accumulation_boundary():
            for name, parameter in engine.module.model.named_parameters():
                captured[name] = safe_get_full_grad(parameter).clone()
        step()

    engine.step = capture_and_step
    return captured


def _reference(
    recipe: Recipe, batches: list[Batch]
) -> tuple[float, dict[str, Any], dict[str, torch.Tensor]]:
    """Loss, diagnostics and gradients of the whole global batch in one process, full logits and
    plain autograd.
    """
    student = AutoModelForCausalLM.from_pretrained(recipe.student.model, dtype=torch.float32)
    teacher = AutoModelForCausalLM.from_pretrained(recipe.teacher.model, dtype=torch.float32)
    num_tokens = sum(int((batch.labels != -100).sum()) for batch in batches)
    total = torch.zeros(())
    for batch in batches:
        total = total + full_loss(recipe, student, teacher, batch)
    loss = total / num_tokens
    loss.backward()
    diagnostics = full_diagnostics(recipe, student, teacher, batches)
    return float(loss), diagnostics, {name: p.grad for name, p in student.named_parameters()}


def _error(actual: torch.Tensor, expected: torch.Tensor) -> list[float]:
    return [float((actual - expected).norm()), float(expected.norm())]


if __name__ == "__main__":
    main()
