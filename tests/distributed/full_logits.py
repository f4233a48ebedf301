"""The loss that two ranks are compared with: one process, full logits, plain autograd."""

from typing import Any

import torch

from kd import distillation_loss
from kd.data.collate import Batch
from kd.recipe import Recipe


def full_loss(recipe: Recipe, student: Any, teacher: Any, batch: Batch) -> torch.Tensor:
    """Sum over the supervised tokens of a batch; gradients reach the student alone."""
    with torch.no_grad():
        teacher_hidden = teacher.model(batch.input_ids).last_hidden_state
    return distillation_loss(
        student.model(batch.input_ids).last_hidden_state,
        student.lm_head.weight,
        teacher_hidden,
        teacher.lm_head.weight,
        batch.labels,
        temperature=recipe.loss.temperature,
        kd_weight=recipe.loss.kd_weight,
        ce_weight=recipe.loss.ce_weight,
        backend="reference",
    ).loss
