"""Run by the launcher on every rank: teachers divided over all ranks or within a node, students
with and without hpZ.

shard_worker.py MODELS OUTPUT      writes OUTPUT/rank{rank}_of_{number of ranks}.json
"""

import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

import kd.training.build
from kd.data.collate import Batch, collate
from kd.data.dataset import Example
from kd.distributed.layout import Layout
from kd.distributed.process_group import init_distributed
from kd.engine.checkpoint import load_checkpoint, save_checkpoint
from kd.engine.ds_config import check_hpz, student_ds_config
from kd.engine.zero3 import gathered, num_shards, shard_bytes
from kd.errors import UserError
from kd.logs import configure_logging
from kd.models.head import head_of
from kd.models.student import Student
from kd.recipe import Recipe
from kd.teachers.live import LiveTeacher
from kd.training.build import build_live_teacher, build_student
from kd.training.step import train_step

NUM_STEPS = 3
UNEQUAL_NODES = ((0, 2, 3), (1,))


class Collectives(TorchDispatchMode):
    """Inside, the ranks of each collective's group are noted, whoever starts it."""

    def __init__(self, kind: str = "") -> None:
        super().__init__()
        self.kind = kind  # part of its name in PyTorch
        self.groups: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function.namespace == "c10d" and self.kind in function.name():
            (group,) = (
                a
                for a in arguments
                if isinstance(a, torch.ScriptObject) and "ProcessGroup" in str(a._type())
            )
            self.groups.add(tuple(dist.get_process_group_ranks(dist.ProcessGroup.unbox(group))))
        return function(*arguments, **(keywords or {}))


def main() -> None:
    models, output = Path(sys.argv[1]), Path(sys.argv[2])
    layout = init_distributed()
    rank, world_size = layout.rank, layout.world_size
    configure_logging(rank)
    results: dict[str, Any] = {
        "nodes": layout.nodes,
        "world": run_case(models, output, layout, shard="world"),
    }
    if world_size == 4:
        results["node"] = run_case(models, output, layout, shard="node")
        results["hpz"] = run_case(
            models, output, layout, shard="node", student_json=str(models / "hpz2.json")
        )
        results["hpZ across nodes"] = across_nodes(
            make_recipe(models, shard="node", student_json=str(models / "hpz4.json")), layout
        )
        results["damaged node"] = find_damage(make_recipe(models, shard="node"), layout)
        results["unequal nodes"] = unequal_nodes(
            make_recipe(models, shard="node", teacher="experts_teacher"), layout
        )
    (output / f"rank{rank}_of_{world_size}.json").write_text(json.dumps(results))
    dist.barrier()


def make_recipe(
    models: Path, *, shard: str, teacher: str = "teacher", student_json: str = "zero3_cpu.json"
) -> Recipe:
    return Recipe.model_validate(
        {
            "teacher": {"model": str(models / teacher), "shard": shard},
            "student": {"model": str(models / "student")},
            "data": {"path": "unused.jsonl"},
            "training": {"global_batch_size": 8, "micro_batch_size": 1, "learning_rate": 1e-2},
            "deepspeed": {"student": student_json, "teacher": "zero3_cpu.json"},
        }
    )


def run_case(models: Path, output: Path, layout: Layout, **fields: str) -> dict[str, Any]:
    recipe, world_size = make_recipe(models, **fields), layout.world_size
    teacher = build_live_teacher(recipe, layout)
    student = build_student(recipe, student_ds_config(recipe, world_size, "cpu"), layout)
    batches = [make_batch(layout.rank, index) for index in range(8 // world_size)]
    digest = digest_gradients(student.engine)
    losses = [train_step(student, teacher, batches, 1e-2, layout).loss for _ in range(NUM_STEPS)]
    result = {
        "losses": losses,
        "gradients": digest.hexdigest(),
        "teacher bytes": shard_bytes(teacher.model.parameters()),
        "teacher shards": num_shards(teacher.model.parameters()),
        "teacher is untouched by hpZ": all(
            p.ds_zero_param_process_group is None for p in teacher.model.parameters()
        ),
        "student groups": groups_of(student.engine),
        "hpZ group": hpz_group(student.engine),
    }
    if "student_json" in fields:
        result["resumed"] = resume(student, teacher, output, batches, layout)
    with Collectives() as forward:
        teacher.hidden_states(**batches[0].model_inputs)
    weights = head_of(teacher.model)
    with Collectives() as head, gathered(weights.weight_VH, weights.bias_V):
        pass
    with teacher.targets(batches[0]) as targets:
        loss = student.loss(batches[0], targets).loss
    with Collectives("allgather") as backward:
        student.engine.backward(loss)
    result |= {"teacher": sorted(forward.groups), "teacher head": sorted(head.groups)}
    return result | {"student's gathers in backward": sorted(backward.groups)}


def resume(
    student: Student, teacher: LiveTeacher, output: Path, batches: list[Batch], layout: Layout
) -> list[list[float]]:
    """Losses after a checkpoint, and again after going back to it."""

    def losses() -> list[float]:
        return [train_step(student, teacher, batches, 1e-2, layout).loss for _ in range(2)]

    save_checkpoint(student.engine, output / "checkpoints", NUM_STEPS, {})
    first = losses()
    load_checkpoint(student.engine, output / "checkpoints" / f"step_{NUM_STEPS}", dict)
    return [first, losses()]


def across_nodes(recipe: Recipe, layout: Layout) -> str:
    with pytest.raises(UserError) as error:
        check_hpz(recipe, student_ds_config(recipe, layout.world_size, "cpu"), layout.nodes)
    return str(error.value)


def find_damage(recipe: Recipe, layout: Layout) -> str | None:
    """What building says when weights do not arrive on the node without rank 0."""
    repartition, log_size = kd.training.build.repartition, kd.training.build._say_size

    def damage(model: Any, *arguments: Any) -> None:
        repartition(model, *arguments)
        if layout.node == 1:
            for parameter in model.parameters():
                parameter.ds_tensor.add_(1.0)

    # The latter waits for every rank
    kd.training.build.repartition, kd.training.build._say_size = (
        damage,
        lambda *_: None,
    )
    try:
        build_live_teacher(recipe, layout)
    except UserError as error:
        return str(error)
    finally:
        kd.training.build.repartition, kd.training.build._say_size = repartition, log_size
    return None


def unequal_nodes(recipe: Recipe, layout: Layout) -> dict[str, Any]:
    """A mixture of experts divided over three ranks and, whole, on one, each rank with tokens of
    its own.
    """
    teacher = build_live_teacher(recipe, replace(layout, nodes=UNEQUAL_NODES))
    batch = make_batch(layout.rank, 0)
    whole = AutoModelForCausalLM.from_pretrained(recipe.teacher.model).eval()
    expected = whole.model(batch.input_ids).last_hidden_state.detach()
    teacher.hidden_states(**batch.model_inputs)  # once, all ranks compare their order of modules
    with Collectives() as forward:
        actual = teacher.hidden_states(**batch.model_inputs)
    return {
        "error": float((actual - expected).norm() / expected.norm()),
        "tied": teacher.model.lm_head.weight is teacher.model.get_input_embeddings().weight,
        "shards": num_shards(teacher.model.parameters()),
        "teacher": sorted(forward.groups),
    }


def make_batch(rank: int, index: int) -> Batch:
    input_ids = np.random.default_rng([rank, index]).integers(0, 150, 6 + 5 * rank)
    example = Example(
        input_ids, input_ids, 0, num_tokens_3=np.array([len(input_ids), 0, 0]), read_start=0
    )
    return collate([example], pad_token_id=0)


def groups_of(engine: Any) -> list[list[int]]:
    """The groups that a student's parameters and its engine use, each once."""
    groups = {id(p.ds_process_group): p.ds_process_group for p in engine.module.parameters()}
    groups[0] = engine.optimizer.dp_process_group
    return sorted({tuple(dist.get_process_group_ranks(group)) for group in groups.values()})


def hpz_group(engine: Any) -> list[int] | None:
    group = next(engine.module.parameters()).ds_zero_param_process_group
    return group and dist.get_process_group_ranks(group)


def digest_gradients(engine: Any) -> Any:
    """A digest that is updated with every gradient before each optimizer step."""
    digest, step = hashlib.sha256(), engine.step

    def digest_and_step() -> None:
        if engine.is_gradient_accumulation_boundary():
            for parameter in engine.module.parameters():
                digest.update(safe_get_full_grad(parameter).numpy().tobytes())
        step()

    engine.step = digest_and_step
    return digest


if __name__ == "__main__":
    main()
