"""Run by the launcher on every rank: each architecture as student and as teacher under ZeRO-3.

architectures_worker.py FOLDER OUTPUT [ARCHITECTURE ...]

writes {architecture: [loss of a step, loss of whole models and full logits] or an error's text}
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from architectures import ARCHITECTURES, build

from kd.data.collate import Batch, Place
from kd.distributed.layout import Layout
from kd.distributed.process_group import init_distributed
from kd.engine.ds_config import student_ds_config
from kd.errors import UserError
from kd.recipe import Recipe
from kd.training.build import build_live_teacher, build_student
from kd.training.step import train_step

ROLES = {"student": 0, "teacher": 1}  # and the seed of its weights


def main() -> None:
    folder, output = Path(sys.argv[1]), Path(sys.argv[2])
    layout = init_distributed()
    results: dict[str, Any] = {}
    for name in sys.argv[3:] or ARCHITECTURES:
        try:
            results[name] = _losses(name, folder / name, layout)
        except UserError as error:
            results[name] = str(error)
    if layout.rank == 0:
        output.write_text(json.dumps(results))
    dist.barrier()


def _losses(name: str, folder: Path, layout: Layout) -> list[float]:
    if layout.rank == 0:
        for role, seed in ROLES.items():
            build(name, tied=False, seed=seed).save_pretrained(folder / role)
    dist.barrier()
    recipe = _recipe(folder)
    batches = [_batch(rank) for rank in range(2)]
    teacher = build_live_teacher(recipe, layout)
    student = build_student(recipe, student_ds_config(recipe, 2, "cpu"), layout)
    result = train_step(student, teacher, [batches[layout.rank]], 1e-3, layout)
    again = train_step(student, teacher, [batches[layout.rank]], 1e-3, layout)
    assert result.grad_norm, name
    assert again.loss < result.loss, name
    models = {role: build(name, tied=False, seed=seed) for role, seed in ROLES.items()}
    num_tokens = sum(batch.num_supervised_tokens for batch in batches)
    whole = sum(_full_loss(models["student"], models["teacher"].eval(), b) for b in batches)
    return [result.loss, whole / num_tokens]


@torch.no_grad()
def _full_loss(student: Any, teacher: Any, batch: Batch) -> float:
    """Of the recipe's default loss, from what the models themselves return."""
    log_q_NV, log_p_NV = (
        model(input_ids=batch.input_ids, use_cache=False)
        .logits.flatten(0, 1)[batch.row_index]
        .log_softmax(-1)
        for model in (student, teacher)
    )
    kl = (log_p_NV.exp() * (log_p_NV - log_q_NV)).sum()
    ce = F.nll_loss(log_q_NV, batch.labels.flatten()[batch.row_index], reduction="sum")
    return float(0.5 * kl + 0.5 * ce)


def _recipe(folder: Path) -> Recipe:
    return Recipe.model_validate(
        {
            "teacher": {"model": str(folder / "teacher")},
            "student": {"model": str(folder / "student")},
            "data": {"path": "unused.jsonl"},
            "training": {"global_batch_size": 4, "micro_batch_size": 2},
            "deepspeed": {"student": "zero3_cpu.json", "teacher": "zero3_cpu.json"},
        }
    )


def _batch(rank: int) -> Batch:
    random = torch.Generator().manual_seed(rank)
    input_ids = torch.randint(1, 160, (2, 12 + 5 * rank), generator=random)
    labels = input_ids.roll(-1, dims=1)
    labels[:, -1] = -100
    row_index = (labels.flatten() != -100).nonzero().squeeze(1)
    places = tuple(Place(row, 0, input_ids.shape[1]) for row in range(2))
    return Batch({"input_ids": input_ids}, labels, row_index, torch.zeros_like(row_index), places)


if __name__ == "__main__":
    main()
