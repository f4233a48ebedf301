"""Run on two ranks: what the examples' own functions give there, against one process.

two_ranks_worker.py OUTPUT

writes {case: [loss, loss of one process, largest error of a gradient]}
"""

import json
import sys
import tempfile
from pathlib import Path

import torch.distributed as dist
from fsdp2 import Distillation, rank_loss, shard
from full_gradients import (
    TEXTS,
    Gradients,
    full_gradients,
    largest_error,
    random_pair,
    tokenizer,
)
from tiny_pair import collate
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from trainer_gradients import trainer_gradients
from transformers import PreTrainedModel

TIED = {
    "tied": {"student_tied": True},
    "untied": {"student_tied": False},
    "teacher tied": {"student_tied": False, "teacher_tied": True},
}


def main() -> None:
    output, mesh = Path(sys.argv[1]), init_device_mesh("cpu", (2,))
    results: dict[str, list[float]] = {}
    for name, tied in TIED.items():
        student, teacher = random_pair(**tied)
        expected_loss, expected = full_gradients(student, teacher)
        model = Distillation(student, teacher)
        shard(model, mesh)
        assert isinstance(model.head_loss, FSDPModule) == (name == "untied"), "not a unit"
        loss, actual = fsdp2_gradients(model, student)
        results[f"fsdp2-{name}"] = [loss, expected_loss, largest_error(actual, expected)]
    for name in ("tied", "untied"):
        for accumulation in (1, 2):
            student, teacher = random_pair(**TIED[name])
            expected_loss, expected = full_gradients(student, teacher)
            with tempfile.TemporaryDirectory() as folder:
                loss, actual = trainer_gradients(student, teacher, Path(folder), 2, accumulation)
            error = largest_error(actual, expected)
            results[f"trainer-{name}-accumulation{accumulation}"] = [loss, expected_loss, error]
    if dist.get_rank() == 0:
        output.write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


def fsdp2_gradients(model: Distillation, student: PreTrainedModel) -> tuple[float, Gradients]:
    """Loss and whole gradients, by the student's own names, of TEXTS dealt to two ranks.

    Collective: every rank must call this.
    """
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters()), "not sharded"
    loss = rank_loss(model, collate(tokenizer(), TEXTS[dist.get_rank() :: 2]))
    loss.backward()
    mean = loss.detach() / 2
    dist.all_reduce(mean)
    gradients = {name: p.grad.full_tensor() for name, p in student.named_parameters()}
    return mean.item(), gradients


if __name__ == "__main__":
    main()
