"""Run on every rank: two optimizer steps on the same weights and batches, in every engine and by
plain modules.

steps_worker.py FOLDER DTYPE OUTPUT

FOLDER holds the models teacher and student, and zero1.json to zero3.json. Writes {case: {"losses":
[of each step], "update": error, "worst": error}}: what two steps add to the weights, relative to
plain modules in fp32, over all parameters and of the worst one. "plain" are plain modules in DTYPE.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param
from full_logits import full_loss
from transformers import AutoModelForCausalLM

from kd.data.collate import Batch, collate
from kd.data.dataset import Example
from kd.distributed.layout import Layout
from kd.distributed.process_group import init_distributed
from kd.engine.ds_config import student_ds_config
from kd.recipe import Recipe
from kd.training.build import build_live_teacher, build_student
from kd.training.step import train_step

# case -> teacher.shard, the student's stage
CASES = {
    "zero3_zero3": ("world", 3),
    "gpu_zero3": ("gpu", 3),
    "gpu_zero2": ("gpu", 2),
    "gpu_zero1": ("gpu", 1),
}
NUM_STEPS, NUM_MICRO_BATCHES, LEARNING_RATE = 2, 2, 1e-3
Weights = dict[str, torch.Tensor]


def main() -> None:
    folder, dtype, output = Path(sys.argv[1]), getattr(torch, sys.argv[2]), Path(sys.argv[3])
    layout = init_distributed()
    recipe = _recipe(folder, layout.world_size, *CASES["gpu_zero2"])
    steps = [
        [
            [_batch(step, rank, index) for index in range(NUM_MICRO_BATCHES)]
            for rank in range(layout.world_size)
        ]
        for step in range(NUM_STEPS)
    ]
    before = _plain_steps(recipe, [], torch.float32, layout.device)[1]
    losses, reference = _plain_steps(recipe, steps, torch.float32, layout.device)
    found = {"plain": _plain_steps(recipe, steps, dtype, layout.device)}
    for case, (shard, stage) in CASES.items():
        found[case] = _engine_steps(_recipe(folder, layout.world_size, shard, stage), steps, layout)
    results: dict[str, Any] = {"reference": {"losses": losses}}
    for case, (losses, after) in found.items():
        errors = _errors(before, after, reference)
        results[case] = {"losses": losses, "update": errors[0], "worst": errors[1]}
    if layout.rank == 0:
        output.write_text(json.dumps(results))
    dist.barrier()


def _recipe(folder: Path, num_ranks: int, shard: str, stage: int) -> Recipe:
    return Recipe.model_validate(
        {
            "teacher": {"model": str(folder / "teacher"), "shard": shard},
            "student": {"model": str(folder / "student")},
            "data": {"path": "unused.jsonl"},
            "loss": {"temperature": 2.0, "kd_weight": 0.7, "ce_weight": 0.3},
            "training": {
                "global_batch_size": 2 * NUM_MICRO_BATCHES * num_ranks,
                "micro_batch_size": 2,
                "learning_rate": LEARNING_RATE,
                "max_grad_norm": 1e9,
            },
            "deepspeed": {
                "student": str(folder / f"zero{stage}.json"),
                "teacher": str(folder / "zero3.json"),
            },
        }
    )


def _batch(*seed: int) -> Batch:
    """Two sequences, supervised in their second half."""
    random, examples = np.random.default_rng(seed), []
    for row in range(2):
        input_ids = random.integers(0, 150, int(random.integers(12, 40)))
        labels = input_ids.copy()
        labels[: len(labels) // 2] = -100
        examples.append(Example(input_ids, labels, row, np.array([4, len(input_ids), 4]), 0))
    return collate(examples, pad_token_id=0)


def _engine_steps(
    recipe: Recipe, steps: list[list[list[Batch]]], layout: Layout
) -> tuple[list[float], Weights]:
    """(loss of each step, the fp32 weights after them)."""
    teacher = build_live_teacher(recipe, layout)
    ds_config = student_ds_config(recipe, layout.world_size, layout.device.type)
    student = build_student(recipe, ds_config, layout)
    results = [
        train_step(student, teacher, step[layout.rank], LEARNING_RATE, layout) for step in steps
    ]
    assert not any(result.skipped for result in results)
    named = student.model.named_parameters()
    weights = {name: safe_get_full_fp32_param(parameter) for name, parameter in named}
    return [result.loss for result in results], {
        name: weight.detach().float().cpu().clone() for name, weight in weights.items()
    }


def _plain_steps(
    recipe: Recipe, steps: list[list[list[Batch]]], dtype: torch.dtype, device: torch.device
) -> tuple[list[float], Weights]:
    """The same without an engine: full logits, plain autograd, fp32 weights and gradients beside
    the model's own.
    """
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(section.model, dtype=dtype).to(device)
        for section in (recipe.student, recipe.teacher)
    )
    weights = {name: p.detach().float().clone() for name, p in student.named_parameters()}
    training, losses = recipe.training, []
    optimizer = torch.optim.AdamW(
        weights.values(),
        lr=LEARNING_RATE,
        betas=training.adam_betas,
        eps=training.adam_eps,
        weight_decay=training.weight_decay,
    )
    for step in steps:
        batches = [batch.to(device) for rank in step for batch in rank]
        num_tokens = sum(batch.num_supervised_tokens for batch in batches)
        losses.append(0.0)
        for weight in weights.values():
            weight.grad = torch.zeros_like(weight)
        for batch in batches:
            loss = full_loss(recipe, student, teacher, batch) / num_tokens
            loss.backward()
            losses[-1] += loss.item()
            for name, parameter in student.named_parameters():
                weights[name].grad += parameter.grad
                parameter.grad = None
        optimizer.step()
        for name, parameter in student.named_parameters():
            parameter.data.copy_(weights[name])
    return losses, {name: weight.cpu() for name, weight in weights.items()}


def _errors(before: Weights, after: Weights, reference: Weights) -> tuple[float, float]:
    """Of all parameters together, and of the worst. Biases of keys do not count: softmax takes no
    note of them, so that their gradient is rounding.
    """
    assert after.keys() == reference.keys()
    names = [name for name in reference if not name.endswith("k_proj.bias")]
    differences = torch.stack([(after[name] - reference[name]).norm() for name in names])
    updates = torch.stack([(reference[name] - before[name]).norm() for name in names])
    return float(differences.norm() / updates.norm()), float((differences / updates).max())


if __name__ == "__main__":
    main()
