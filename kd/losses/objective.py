"""Objective: which divergence, at which temperature, in which mix with cross-entropy; checked when
built.
"""

import math
from dataclasses import dataclass

from kd.losses.checks import check_choice
from kd.losses.divergences import DIVERGENCE_TABLE, Divergence, DivergenceSpec


@dataclass(frozen=True)
class Objective:
    """What is computed of a row: kd_weight * T^2 * divergence(teacher, student) + ce_weight *
    cross-entropy.

    `kd.losses.reference` defines the divergences. Of `beta`, `alpha` and `mix_weight` only the one
    that `divergence` reads is looked at: it is `parameter`.

    Raises:
        ValueError: a field that is out of its range or not finite.
    """

    divergence: Divergence = "forward_kl"
    beta: float = 0.5
    alpha: float = 0.1
    mix_weight: float = 0.5
    temperature: float = 1.0
    kd_weight: float = 0.5
    ce_weight: float = 0.5

    def __post_init__(self) -> None:
        check_choice("divergence", self.divergence, tuple(DIVERGENCE_TABLE))
        spec = self.spec
        if spec.parameter is not None and not spec.allows(self.parameter):
            raise ValueError(f"{spec.parameter}={self.parameter!r} {spec.rule}")
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise ValueError(
                f"temperature={self.temperature!r} must be positive and finite; 1.0 is neutral"
            )
        for name, weight in (("kd_weight", self.kd_weight), ("ce_weight", self.ce_weight)):
            if not (weight >= 0 and math.isfinite(weight)):
                raise ValueError(
                    f"{name}={weight!r} must be finite and not negative; 0 drops the term"
                )

    @property
    def spec(self) -> DivergenceSpec:
        return DIVERGENCE_TABLE[self.divergence]

    @property
    def parameter(self) -> float:
        """The beta, alpha or mix_weight of the divergence; 0.0 for a divergence without one."""
        values = {"beta": self.beta, "alpha": self.alpha, "mix_weight": self.mix_weight}
        return values[self.spec.parameter] if self.spec.parameter else 0.0
