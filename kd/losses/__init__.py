"""The distillation loss, computed from hidden states and lm_heads."""

from kd.losses.distillation import distillation_loss, resolve_backend
from kd.losses.divergences import DIVERGENCES, Divergence, Objective
from kd.losses.inputs import DistillationLoss, RowDiagnostics
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
    "resolve_backend",
    "sparse_distillation_loss",
]
