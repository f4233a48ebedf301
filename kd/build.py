"""Teacher and student from a recipe: loaded, in their engines, their weights proven to have arrived."""

import logging
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from kd.engine.distributed import initialize
from kd.engine.ds_config import teacher_ds_config
from kd.engine.zero3 import num_parameters, set_moe_leaf_modules, shard_bytes
from kd.models.distiller import Distiller
from kd.models.load import load_partitioned, load_whole, random_model
from kd.models.probe import reference_states, verify_weights
from kd.models.teacher import TeacherModule, ZeroTeacher
from kd.recipe import Recipe

log = logging.getLogger(__name__)


def build_teacher(recipe: Recipe, device: torch.device) -> ZeroTeacher | None:
    """The recipe's teacher in its own ZeRO-3 engine, its weights proven to have arrived."""
    if recipe.teacher is None:
        return None
    ds_config = teacher_ds_config(recipe)
    reference = None
    if dist.get_rank() == 0:
        reference = reference_states(load_whole(recipe.teacher, ds_config, role="teacher"), role="teacher")
    model = load_partitioned(recipe.teacher, ds_config, role="teacher")
    set_moe_leaf_modules(model)
    teacher = ZeroTeacher(initialize(TeacherModule(model), ds_config))
    verify_weights(model, reference, role="teacher", device=device, hidden_states=teacher.hidden_states)
    _log_size("teacher", model)
    return teacher


def build_student(recipe: Recipe, ds_config: dict[str, Any], device: torch.device) -> tuple[PreTrainedModel, Any]:
    """The recipe's student and its engine around student and loss, its weights proven to have arrived."""
    section, reference = recipe.student, None
    if section.init == "random":
        model = random_model(section, ds_config, role="student", seed=recipe.run.seed)
        reference = reference_states(model, role="student")
    else:
        if dist.get_rank() == 0:
            reference = reference_states(load_whole(section, ds_config, role="student"), role="student")
        model = load_partitioned(section, ds_config, role="student")
    if section.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    set_moe_leaf_modules(model)
    engine = initialize(Distiller(model, recipe.loss), ds_config)
    verify_weights(model, reference, role="student", device=device)
    _log_size("student", model)
    return model.train(), engine


def _log_size(role: str, model: PreTrainedModel) -> None:
    parameters = list(model.parameters())
    log.info(
        "%s: %.2f M parameters, %.1f MiB on this rank",
        role,
        num_parameters(parameters) / 1e6,
        shard_bytes(parameters) / 2**20,
    )
