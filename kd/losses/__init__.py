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

__all__ = [
    "DIVERGENCES",
    "DistillationLoss",
    "Divergence",
    "Objective",
    "RowDiagnostics",
    "distillation_loss",
    "distillation_loss_with_diagnostics",
    "resolve_backend",
    "sparse_distillation_loss",
]
