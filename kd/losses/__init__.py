"""The distillation loss, computed from hidden states and lm_heads."""

from kd.losses.distillation import DistillationLoss, distillation_loss
from kd.losses.objective import DIVERGENCES, Divergence, Objective

__all__ = ["DIVERGENCES", "DistillationLoss", "Divergence", "Objective", "distillation_loss"]
