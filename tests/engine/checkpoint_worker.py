"""Run by the launcher on every rank: what loading a checkpoint gives back.

checkpoint_worker.py MODELS OUTPUT      writes {case: bool}
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from kd.data.collate import Batch, collate
from kd.data.dataset import Example
from kd.distributed.process_group import init_distributed
from kd.engine.checkpoint import choose_checkpoint, load_checkpoint, save_checkpoint
from kd.engine.ds_config import student_ds_config
from kd.engine.zero3 import consolidated_state_dict
from kd.recipe import Recipe
from kd.training.build import build_student
from kd.training.step import train_step


def main() -> None:
    models, output = Path(sys.argv[1]), Path(sys.argv[2])
    layout = init_distributed()
    recipe = Recipe.model_validate(
        {
            "student": {"model": str(models / "tied"), "gradient_checkpointing": False},
            "data": {"path": "unused.jsonl"},
            "loss": {"kd_weight": 0.0, "ce_weight": 1.0},
            "training": {"global_batch_size": 4, "micro_batch_size": 2, "learning_rate": 0.1},
            "deepspeed": {"student": "zero3_cpu.json"},
        }
    )
    student = build_student(recipe, student_ds_config(recipe, 2, "cpu"), layout)
    engine = student.engine
    folder = output.parent / "checkpoints"

    def steps(numbers: range) -> list[float]:
        return [train_step(student, None, [_batch(i)], 0.1, layout).loss for i in numbers]

    steps(range(2))
    saved = _state(engine)
    save_checkpoint(engine, folder, 2, {"note": "two steps"})
    losses = steps(range(2, 5))
    changed = _state(engine)
    state = load_checkpoint(engine, choose_checkpoint(folder, "auto"))
    restored = _state(engine)
    repeated = steps(range(2, 5))
    if dist.get_rank() == 0:
        results = {
            "training changed the weights": not _equal(saved, changed),
            "the weights come back": _equal(saved, restored),
            "the state of the loop comes back": state == {"note": "two steps"},
            "the same steps give the same losses": losses == repeated,
        }
        output.write_text(json.dumps(results))
    dist.barrier()


def _batch(index: int) -> Batch:
    random = np.random.default_rng([dist.get_rank(), index])
    ids = [random.integers(0, 150, 12) for _ in range(2)]
    sections = np.array([2, 8, 2])
    return collate(
        [Example(tokens, tokens, i, sections, read_start=0) for i, tokens in enumerate(ids)],
        pad_token_id=0,
    )


def _state(engine: Any) -> dict[str, torch.Tensor]:
    state = consolidated_state_dict(engine)
    return {name: tensor.clone() for name, tensor in (state or {}).items()}


def _equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return (
        one.keys() == two.keys()
        and len(one) > 0
        and all(torch.equal(one[name], two[name]) for name in one)
    )


if __name__ == "__main__":
    main()
