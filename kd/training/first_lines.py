"""The first lines of a run's log: what runs where, and why."""

import datetime
import logging
import socket

import torch
from transformers import PreTrainedModel

from kd.data.step_plan import BatchShape
from kd.distributed.device import memory_gib
from kd.distributed.layout import Layout
from kd.distributed.nodes import size_to_plan
from kd.engine.ds_config import read_ds_config
from kd.logs import labelled
from kd.models.loading import why_attention
from kd.models.student import Student
from kd.recipe import LossSection, Recipe
from kd.teachers.cached import CachedTeacher
from kd.teachers.live import LiveTeacher

log = logging.getLogger(__name__)


def say(label: str, text: str) -> None:
    """One fact of the run, in a line of the log."""
    log.info("%s", labelled(label, text))


def say_where(recipe: Recipe, layout: Layout) -> None:
    """Run, ranks and device."""
    say("run", f"{recipe.run.name}, in {recipe.run_dir}, on {datetime.date.today().isoformat()}")
    _, ranks_per_node = size_to_plan(layout.nodes)
    gib, device = memory_gib(layout.device, ranks_per_node), layout.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    each = "each" if device.type == "cuda" else "for each of them"
    nodes = f"{len(layout.nodes)} nodes" if len(layout.nodes) > 1 else "1 node"
    where = f"{layout.world_size} on {nodes} (rank 0 on {socket.gethostname()})"
    say("ranks", f"{where}, {name}, {gib:.1f} GiB {each}")


def say_how(
    recipe: Recipe,
    layout: Layout,
    shape: BatchShape,
    student: Student,
    teacher: LiveTeacher | CachedTeacher | None,
) -> None:
    """Attention, micro-batches and loss. Once both models are loaded."""
    models = {"student": student.model}
    if isinstance(teacher, LiveTeacher):
        models["teacher"] = teacher.model
    say("attention", "; ".join(_attention(recipe, role, model) for role, model in models.items()))
    say("batch", _batch(recipe, layout, shape))
    say("loss", _loss(recipe))


def divergence_name(recipe: Recipe) -> str | None:
    """What lines on progress call the divergence from the teacher; None without one."""
    if recipe.teacher is None:
        return None
    parts = [recipe.loss, *([recipe.rollout_loss] if recipe.rollout else [])]
    return "KL" if all(part.divergence.endswith("kl") for part in parts) else "divergence"


def _attention(recipe: Recipe, role: str, model: PreTrainedModel) -> str:
    section = recipe.teacher if role == "teacher" else recipe.student
    assert section is not None
    ds_config = read_ds_config(recipe, "teacher" if role == "teacher" else "student")
    why = why_attention(section, model, ds_config, role=role)
    return f"{role} {model.config._attn_implementation} ({why})"


def _batch(recipe: Recipe, layout: Layout, shape: BatchShape) -> str:
    training = recipe.training
    sampled = f", {recipe.num_rollouts} of them sampled" if recipe.num_rollouts else ""
    whole = f"{training.global_batch_size} sequences a step{sampled}"
    if training.max_tokens_per_micro_batch is not None:
        size = f"micro-batches of at most {training.max_tokens_per_micro_batch:,} tokens"
        return f"{whole}: on each rank {size}, as many as a step needs, {shape.layout}"
    number = recipe.max_micro_batches(layout.data_parallel_size)
    size = f"{number} micro-batch{'es' if number > 1 else ''} of at most "
    return f"{whole}: on each rank {size}{training.micro_batch_size} sequences, {shape.layout}"


def _loss(recipe: Recipe) -> str:
    """In words: the weights of its parts, and for what they are."""

    def words(loss: LossSection) -> str:
        parts = {loss.divergence: loss.kd_weight, "cross-entropy": loss.ce_weight}
        return " + ".join(f"{weight:g} {name}" for name, weight in parts.items() if weight)

    supervised = "+".join(recipe.data.loss_sections)
    text = f"{words(recipe.loss)}, over {supervised}"
    if recipe.rollout:
        text += f"; of sampled responses {words(recipe.rollout_loss)}"
    return text
