"""The distillation loss, computed from hidden states and lm_heads."""

from kd.losses.distillation import (
    DistillationLoss,
    RowDiagnostics,
    distillation_loss,
    distillation_loss_with_diagnostics,
    resolve_backend,
)
from kd.losses.objective import DIVERGENCES, Divergence, Objective
from kd.losses.sparse import sparse_distillation_loss
from kd.losses.targets import DenseTargets, Head, Targets, TopKTargets

__all__ = [
    "DIVERGENCES",
    "DenseTargets",
    "DistillationLoss",
    "Divergence",
    "Head",
    "Objective",
    "RowDiagnostics",
    "Targets",
    "TopKTargets",
    "distillation_loss",
    "distillation_loss_with_diagnostics",
    "resolve_backend",
    "sparse_distillation_loss",
]
