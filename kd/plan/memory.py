"""The memory of a run, on its GPUs, its hosts and its disk, and what would make it fit."""

import functools
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from kd.engine.ds_config import is_zero3, read_ds_config
from kd.errors import UserError
from kd.plan.activations import num_tokens_read, saved_activations
from kd.plan.rank_memory import GIB, RankMemory, filler_gib, rank_memory
from kd.plan.shapes import model_shapes, teacher_shapes
from kd.plan.trainable import trainable_of
from kd.plan.zero_memory import ZeroEngine
from kd.recipe import Recipe

# Beside what tensors take: the CUDA context, NCCL's buffers, and what the allocator cannot use.
RESERVED_GIB = 3.0
MAX_NODES_FACTOR = 16
LONGEST_PROMPT = 1024  # tokens of a prompt that gets a sampled response, by assumption


@dataclass(frozen=True)
class Engines:
    """Both models as a recipe divides them over ranks."""

    student: ZeroEngine
    teacher: ZeroEngine | None

    @property
    def vocab_size(self) -> int:
        """Of what both models know."""
        return min(engine.shapes.vocab_size for engine in self)

    def __iter__(self) -> Iterator[ZeroEngine]:
        yield from (engine for engine in (self.student, self.teacher) if engine)


@dataclass(frozen=True)
class MemoryPlan:
    """What a run of `recipe` on num_nodes * gpus_per_node ranks takes, in GiB."""

    recipe: Recipe
    num_nodes: int
    gpus_per_node: int
    num_tokens: int  # read of the longest sequence
    gib_per_rank: RankMemory
    moment: str  # of a step, which takes most
    gather_peak_gib: float  # weights that are whole at a time, at most: perhaps at another moment
    activations_checkpointed_gib: float
    activations_whole_gib: float
    checkpoint_gib: float
    # training.keep_last checkpoints, the best, one being written; two exports, one being written
    disk_gib: float
    host_gib: float  # of a node: while the larger model is loaded, or with offloaded states
    received_gib_per_step: float  # by a rank in one optimizer step: weights, and gradients

    @property
    def total_gib(self) -> float:
        return self.gib_per_rank.total

    def verdict(self, gpu_gib: float) -> str | None:
        """None if the run fits on GPUs of gpu_gib, else what would make it fit."""
        if self._fits(gpu_gib):
            return None
        needs = (
            f"{self.total_gib:.1f} GiB per GPU, with the peak in {self.moment}, and "
            f"{RESERVED_GIB:.0f} GiB for CUDA do not fit in {gpu_gib:.1f} GiB"
        )
        for factor, changes in itertools.product(
            range(1, MAX_NODES_FACTOR + 1), _settings(self.recipe)
        ):
            num_nodes = self.num_nodes * factor
            try:
                other = memory_plan(self.recipe.with_values(changes), num_nodes, self.gpus_per_node)
            except UserError:
                continue  # more ranks than its global batch can be divided over
            if other._fits(gpu_gib):
                words = [f"{key} = {json.dumps(value)}" for key, value in changes.items()]
                words += [f"{num_nodes} nodes"] if factor > 1 else []
                return f"{needs}: use {' and '.join(words)} ({other.total_gib:.1f} GiB)"
        return (
            f"{needs}, and no other setting helps: use larger GPUs, or lower "
            "truncation.max_full_tokens"
        )

    def _fits(self, gpu_gib: float) -> bool:
        return self.total_gib + RESERVED_GIB <= gpu_gib


def memory_plan(recipe: Recipe, num_nodes: int = 1, gpus_per_node: int = 1) -> MemoryPlan:
    """The memory of a run. Sequences are as long as the recipe lets pass: what its truncation
    leaves of max_full_tokens, or, where it states none, of all positions that the student has.

    Raises UserError for a recipe whose files are missing, or that leaves a choice to the plan.
    """
    engines = engines_of(recipe, num_nodes, gpus_per_node)
    student, teacher = engines.student, engines.teacher
    accumulation = recipe.max_micro_batches(num_nodes * gpus_per_node)
    num_tokens = num_tokens_read(
        recipe.truncation,
        recipe.truncation.max_full_tokens or student.shapes.max_position_embeddings,
    )
    if recipe.rollout is not None:
        longest = min(LONGEST_PROMPT, student.shapes.max_position_embeddings)
        num_tokens = max(num_tokens, longest + recipe.rollout.max_new_tokens)
    budget = recipe.training.max_tokens_per_micro_batch
    batch_tokens = (
        max(budget, num_tokens) if budget else num_tokens * recipe.training.micro_batch_size
    )
    gib_per_rank, moment, gather_peak_gib = rank_memory(recipe, student, teacher, batch_tokens)
    kept = functools.partial(saved_activations, student.shapes, batch_tokens, student.width)
    saved = functools.partial(kept, lora=recipe.student.lora)
    # Only rank 0 reads the files of a model that is partitioned while it is loaded, and else every
    # rank.
    loading = max(
        engine.model_bytes * (1 if engine.stage == 3 else gpus_per_node) for engine in engines
    )
    received = accumulation * sum(engine.received_per_micro_batch for engine in engines)
    return MemoryPlan(
        recipe,
        num_nodes,
        gpus_per_node,
        num_tokens,
        gib_per_rank,
        moment,
        gather_peak_gib,
        activations_checkpointed_gib=saved(checkpointing=True) / GIB,
        activations_whole_gib=saved(checkpointing=False) / GIB,
        checkpoint_gib=student.checkpoint_bytes / GIB,
        disk_gib=(
            (recipe.training.keep_last + 2) * student.checkpoint_bytes + 3 * student.model_bytes
        )
        / GIB,
        host_gib=max(loading, gpus_per_node * sum(engine.host_bytes for engine in engines)) / GIB,
        received_gib_per_step=(received + student.received_per_step) / GIB,
    )


def engines_of(recipe: Recipe, num_nodes: int, gpus_per_node: int) -> Engines:
    """Raises UserError for a recipe whose files are missing, or that leaves a choice to the
    plan.
    """
    if recipe.autos:
        raise UserError(
            f'{" and ".join(recipe.autos)} = "auto" depends on the kind of GPU: name the GPU, or '
            "write a value"
        )
    world_size = num_nodes * gpus_per_node
    trainable = trainable_of(recipe.student, model_shapes(recipe.student, role="student"))
    ds_config = read_ds_config(recipe, "student")
    student = ZeroEngine(trainable.shapes, ds_config, world_size, trainable)
    return Engines(student, _teacher_engine(recipe, num_nodes, gpus_per_node))


def plan_filler(
    recipe: Recipe, num_nodes: int, gpus_per_node: int, budget: int, kind: str
) -> float:
    """GiB of a rank that fills a cache of this kind, for a recipe of whole traces: the teacher is
    there, and no student. budget: tokens of a micro-batch, where no trace is longer.

    Raises UserError for a recipe whose files are missing.
    """
    student = model_shapes(recipe.student, role="student")
    longest = recipe.truncation.max_full_tokens or student.max_position_embeddings
    teacher = _teacher_engine(recipe, num_nodes, gpus_per_node)
    assert teacher is not None
    return filler_gib(teacher, max(budget, longest), kind)


def _teacher_engine(recipe: Recipe, num_nodes: int, gpus_per_node: int) -> ZeroEngine | None:
    shapes = teacher_shapes(recipe)
    if recipe.teacher is None or shapes is None:
        return None
    shard = recipe.teacher.shard if recipe.teacher.cache is None else "gpu"
    # "auto" is chosen only for training: what fills a cache divides it over the world
    num_sharing = {"gpu": 1, "node": gpus_per_node}.get(shard, num_nodes * gpus_per_node)
    ds_config = read_ds_config(recipe, "teacher")
    return ZeroEngine(shapes, ds_config, num_sharing, trainable=None, is_plain=shard == "gpu")


def _settings(recipe: Recipe) -> Iterator[dict[str, Any]]:
    """What may be set without changing what is learned: nothing, one key, two, ..."""
    student = read_ds_config(recipe, "student")
    settings: list[dict[str, Any]] = []
    if recipe.training.micro_batch_size > 1:
        settings.append({"training.micro_batch_size": 1})
    if not recipe.student.gradient_checkpointing:
        settings.append({"student.gradient_checkpointing": True})
    if recipe.teacher is not None and recipe.teacher.shard != "world":
        settings.append({"teacher.shard": "world"})
    if not is_zero3(student):
        settings.append({"deepspeed.student": "zero3_bf16.json"})
    if "offload_optimizer" not in student["zero_optimization"]:
        settings.append({"deepspeed.student": "zero3_bf16_offload.json"})
    for num_chosen in range(len(settings) + 1):
        for chosen in itertools.combinations(settings, num_chosen):
            yield {key: value for setting in chosen for key, value in setting.items()}
