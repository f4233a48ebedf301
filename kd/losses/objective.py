"""Objective: which divergence, at which temperature, in which mix with cross-entropy; checked when
built.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from kd.losses.checks import check_choice

Divergence = Literal[
    "forward_kl", "reverse_kl", "mixed_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd"
]
DIVERGENCES: tuple[Divergence, ...] = get_args(Divergence)

# The field that parametrises a divergence; those not named here have no parameter.
_PARAMETER = {
    "mixed_kl": "mix_weight",
    "jsd": "beta",
    "skew_kl": "alpha",
    "skew_reverse_kl": "alpha",
}


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
        check_choice("divergence", self.divergence, DIVERGENCES)
        self._check_parameter()
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise ValueError(
                f"temperature={self.temperature!r} must be positive and finite; 1.0 is neutral"
            )
        for name in ("kd_weight", "ce_weight"):
            weight = getattr(self, name)
            if not (weight >= 0 and math.isfinite(weight)):
                raise ValueError(
                    f"{name}={weight!r} must be finite and not negative; 0 drops the term"
                )

    @property
    def parameter(self) -> float:
        """The beta, alpha or mix_weight of the divergence; 0.0 for a divergence without one."""
        name = _PARAMETER.get(self.divergence)
        return getattr(self, name) if name else 0.0

    def _check_parameter(self) -> None:
        name, value = _PARAMETER.get(self.divergence), self.parameter
        if name == "mix_weight" and not 0 <= value <= 1:
            raise ValueError(
                f"mix_weight={value!r} must lie in [0, 1]; 1 is forward_kl, 0 is reverse_kl"
            )
        if name == "beta" and not 0 < value < 1:
            raise ValueError(
                f"beta={value!r} must lie strictly between 0 and 1, for jsd is identically zero at "
                f"both; "
                "choose divergence='forward_kl' or divergence='reverse_kl' instead"
            )
        if name == "alpha" and not 0 < value < 1:
            unskewed = "forward_kl" if self.divergence == "skew_kl" else "reverse_kl"
            raise ValueError(
                f"alpha={value!r} must lie strictly between 0 and 1, for {self.divergence} is zero "
                f"at 1; "
                f"choose divergence={unskewed!r} for alpha=0"
            )
