"""Teacher and student from a recipe: loaded, in their engines, their weights proven to have
arrived.
"""

import logging
from typing import Any

from transformers import PreTrainedModel

from kd.distributed.layout import Layout
from kd.distributed.nodes import group_of_node
from kd.distributed.process_group import gather_objects, on_rank_zero
from kd.engine.ds_config import teacher_ds_config
from kd.engine.engine import initialize
from kd.engine.zero3 import (
    num_parameters,
    num_shards,
    repartition,
    set_moe_leaf_modules,
    shard_bytes,
)
from kd.models.loading import load_partitioned, load_whole, random_model
from kd.models.probe import Probed, reference_of, verify_weights
from kd.models.student import Student, StudentModule
from kd.plan import check_shapes
from kd.recipe import ModelSection, Recipe
from kd.teachers.live import LiveTeacher, TeacherModule

log = logging.getLogger(__name__)


def build_teacher(recipe: Recipe, layout: Layout) -> LiveTeacher | None:
    """The recipe's teacher in its own ZeRO-3 engine, its weights proven to have arrived.

    Collective: every rank must call this.
    """
    if recipe.teacher is None:
        return None
    log.info("loading the teacher, %s", recipe.teacher.model)
    ds_config = teacher_ds_config(recipe)
    reference = _reference_of(recipe.teacher, ds_config, role="teacher")
    model = load_partitioned(recipe.teacher, ds_config, role="teacher")
    if recipe.teacher.shard == "node":
        group = group_of_node(layout.nodes, recipe.run.collective_timeout_minutes)
        repartition(model, group, ds_config)
    check_shapes(recipe.teacher, model, role="teacher")
    set_moe_leaf_modules(model)
    teacher = LiveTeacher(model, initialize(TeacherModule(model), ds_config))
    verify_weights(model, teacher.probe, reference, role="teacher", device=layout.device)
    _log_size("teacher", model)
    return teacher


def build_student(recipe: Recipe, ds_config: dict[str, Any], layout: Layout) -> Student:
    """The recipe's student in its engine, its weights proven to have arrived.

    Collective: every rank must call this.
    """
    section = recipe.student
    log.info("loading the student, %s", section.model)
    if section.init == "random":
        model = random_model(section, ds_config, role="student", seed=recipe.run.seed)
        reference = reference_of(model, role="student")
    else:
        reference = _reference_of(section, ds_config, role="student")
        model = load_partitioned(section, ds_config, role="student")
    check_shapes(section, model, role="student")
    if section.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    set_moe_leaf_modules(model)
    student = Student(model, initialize(StudentModule(model, recipe.loss), ds_config))
    verify_weights(model, student.probe, reference, role="student", device=layout.device)
    _log_size("student", model)
    model.train()
    return student


def _reference_of(section: ModelSection, ds_config: dict[str, Any], *, role: str) -> Probed:
    """From a whole copy on rank 0, for every rank to compare with: a node without rank 0 has shards
    of its own.
    """
    return on_rank_zero(lambda: reference_of(load_whole(section, ds_config, role=role), role=role))


def _log_size(role: str, model: PreTrainedModel) -> None:
    """What was measured on all ranks, after a first forward pass."""
    parameters = list(model.parameters())
    measured = gather_objects((num_shards(parameters), shard_bytes(parameters) / 2**20))
    shards, mebibytes = zip(*measured, strict=True)
    log.info(
        "%s: %.2f M parameters over %s of %d ranks, %.1f to %.1f MiB on each",
        role,
        num_parameters(parameters) / 1e6,
        " or ".join(str(number) for number in sorted(set(shards))),
        len(measured),
        min(mebibytes),
        max(mebibytes),
    )
