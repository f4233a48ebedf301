"""The distillation loss, computed from hidden states and lm_heads."""

from kd.losses.distillation import distillation_loss, resolve_backend
from kd.losses.divergences import DIVERGENCES, Divergence, Objective
from kd.losses.expected import expected_logit_loss
from kd.losses.inputs import DistillationLoss, RowDiagnostics
from kd.losses.sparse import sparse_distillation_loss
from kd.losses.targets import (
    DenseTargets,
    Head,
    SampledTargets,
    Targets,
    TopKTargets,
    VectorTargets,
)

__all__ = [
    "DIVERGENCES",
    "DenseTargets",
    "DistillationLoss",
    "Divergence",
    "Head",
    "Objective",
    "RowDiagnostics",
    "SampledTargets",
    "Targets",
    "TopKTargets",
    "VectorTargets",
    "distillation_loss",
    "expected_logit_loss",
    "resolve_backend",
    "sparse_distillation_loss",
]
