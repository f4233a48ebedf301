"""The divergences, one table: what of each the objective, the row functions, the kernel and the
sparse loss need to know; and the objective, which picks one.

Another divergence is a case of `kd.losses.reference`, a function here, its terms in
`kd.losses.triton_kernel`, and its line in DIVERGENCE_TABLE; then its name in `kd.recipe`, which may
not import torch. The kernel does not compile for a divergence that it does not know.

Gradient. Let q = softmax(s / T), D the divergence, f = dD/dq and w = q * f. Then T^2 * dD/ds = T *
(w - q * sum(w)), and adding a multiple of q to w changes nothing. Each w below is written without a
division by a probability, so that it stays finite where q underflows: forward_kl has f = -p / q,
but w = -p. Every divergence is a function of p, q and log(p / q).

Shapes: B rows of a block, V the outcomes that teacher and student are compared over.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from kd.losses.checks import check_choice, check_number

Divergence = Literal[
    "forward_kl", "reverse_kl", "mixed_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd"
]
DIVERGENCES: tuple[Divergence, ...] = get_args(Divergence)
# Between them T^2 and logits / T are finite in float32, and T^2 is not 0.
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-18, 1e18


class DivergenceSpec(NamedTuple):
    """What is known of one divergence.

    of_rows: from p, q, log(p / q), all (B, V), and the parameter to each row's divergence, (B),
        and w, (B, V). It may overwrite p and log(p / q).
    is_mixture: its value is known after a second pass over both logits; else the sums of the first
        one tell it.
    parameter: the field of `Objective` that it reads, from 0 to 1, both ends excluded unless
        `parameter_may_be_0_or_1`; `rule` says so, and what to choose instead.
    infinite_without_tail: so it is where the teacher's probability is 0 and the student's is not.
    """

    of_rows: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    is_mixture: bool = False
    parameter: Literal["beta", "alpha", "mix_weight"] | None = None
    parameter_may_be_0_or_1: bool = False
    rule: str = ""
    infinite_without_tail: bool = False

    def allows(self, parameter: float) -> bool:
        """Whether the parameter is in its range; NaN never is."""
        return 0 < parameter < 1 or (self.parameter_may_be_0_or_1 and parameter in (0, 1))


def _forward_kl(
    p_BV: Tensor, q_BV: Tensor, log_ratio_BV: Tensor, _: float
) -> tuple[Tensor, Tensor]:
    return log_ratio_BV.mul_(p_BV).sum(-1), p_BV.neg_()  # f = -p / q


def _reverse_kl(
    p_BV: Tensor, q_BV: Tensor, log_ratio_BV: Tensor, _: float
) -> tuple[Tensor, Tensor]:
    w_BV = log_ratio_BV.neg_().mul_(q_BV)  # f = log q - log p + 1
    return w_BV.sum(-1), w_BV


def _mixed_kl(
    p_BV: Tensor, q_BV: Tensor, log_ratio_BV: Tensor, mix_weight: float
) -> tuple[Tensor, Tensor]:
    forward_B = torch.linalg.vecdot(p_BV, log_ratio_BV)
    reverse_B, reverse_w_BV = _reverse_kl(p_BV, q_BV, log_ratio_BV, 0.0)
    return torch.lerp(reverse_B, forward_B, mix_weight), reverse_w_BV.lerp_(p_BV.neg_(), mix_weight)


def _jsd(p_BV: Tensor, q_BV: Tensor, log_ratio_BV: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    log_p_over_m_BV = _log_over_mixture(log_ratio_BV, beta)
    # the terms of m's own derivative add up to the constant 1, so f = (1 - beta) * (log q - log m)
    w_BV = torch.sub(log_p_over_m_BV, log_ratio_BV).mul_(q_BV).mul_(1 - beta)
    return beta * torch.linalg.vecdot(p_BV, log_p_over_m_BV) + w_BV.sum(-1), w_BV


def _skew_kl(
    p_BV: Tensor, q_BV: Tensor, log_ratio_BV: Tensor, alpha: float
) -> tuple[Tensor, Tensor]:
    log_p_over_m_BV = _log_over_mixture(log_ratio_BV, alpha)
    skew_kl_B = torch.linalg.vecdot(p_BV, log_p_over_m_BV)
    # f = -(1 - alpha) * p / m, and q / m <= 1 / (1 - alpha)
    return skew_kl_B, log_p_over_m_BV.sub_(log_ratio_BV).exp_().mul_(p_BV).mul_(alpha - 1)


def _skew_reverse_kl(
    p_BV: Tensor, q_BV: Tensor, log_ratio_BV: Tensor, alpha: float
) -> tuple[Tensor, Tensor]:
    log_q_over_m_BV = _log_over_mixture(log_ratio_BV.neg_(), alpha)
    skew_reverse_kl_B = torch.linalg.vecdot(q_BV, log_q_over_m_BV)
    # f = log(q / m) + 1 - alpha * q / m, and q / m <= 1 / alpha
    return skew_reverse_kl_B, log_q_over_m_BV.sub_(log_q_over_m_BV.exp(), alpha=alpha).mul_(q_BV)


def _tvd(p_BV: Tensor, q_BV: Tensor, log_ratio_BV: Tensor, _: float) -> tuple[Tensor, Tensor]:
    difference_BV = torch.sub(q_BV, p_BV)
    tvd_B = 0.5 * difference_BV.abs().sum(-1)
    return tvd_B, difference_BV.sign_().mul_(q_BV).mul_(0.5)  # f = sign(q - p) / 2


def _log_over_mixture(log_ratio_BV: Tensor, weight: float) -> Tensor:
    """Return log(a / m), where m = weight * a + (1 - weight) * b and log_ratio = log(a / b)."""
    log_weight = torch.full(
        (), math.log(weight), dtype=log_ratio_BV.dtype, device=log_ratio_BV.device
    )
    return torch.logaddexp(math.log1p(-weight) - log_ratio_BV, log_weight).neg_()


DIVERGENCE_TABLE: dict[Divergence, DivergenceSpec] = {
    "forward_kl": DivergenceSpec(_forward_kl),
    "reverse_kl": DivergenceSpec(_reverse_kl, infinite_without_tail=True),
    "mixed_kl": DivergenceSpec(
        _mixed_kl,
        parameter="mix_weight",
        parameter_may_be_0_or_1=True,
        rule="must lie in [0, 1]; 1 is forward_kl, 0 is reverse_kl",
        infinite_without_tail=True,
    ),
    "jsd": DivergenceSpec(
        _jsd,
        is_mixture=True,
        parameter="beta",
        rule="must lie strictly between 0 and 1, since jsd is identically zero at both; choose "
        "divergence='forward_kl' or divergence='reverse_kl' instead",
    ),
    "skew_kl": DivergenceSpec(
        _skew_kl,
        is_mixture=True,
        parameter="alpha",
        rule="must lie strictly between 0 and 1, since skew_kl is zero at 1; choose "
        "divergence='forward_kl' for alpha=0",
    ),
    "skew_reverse_kl": DivergenceSpec(
        _skew_reverse_kl,
        is_mixture=True,
        parameter="alpha",
        rule="must lie strictly between 0 and 1, since skew_reverse_kl is zero at 1; choose "
        "divergence='reverse_kl' for alpha=0",
    ),
    "tvd": DivergenceSpec(_tvd, is_mixture=True),
}
assert tuple(DIVERGENCE_TABLE) == DIVERGENCES, (
    "a divergence has a name and no line, or a line twice"
)


@dataclass(frozen=True)
class Objective:
    """What is computed of a row: kd_weight * T^2 * divergence(teacher, student) + ce_weight *
    cross-entropy.

    `kd.losses.reference` defines the divergences. Of `beta`, `alpha` and `mix_weight` only the one
    that `divergence` reads is looked at: it is `parameter`.

    Raises:
        ValueError: a field that is out of its range or not finite.
        TypeError: a field that is no number.
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
        if spec.parameter is not None:
            check_number(spec.parameter, self.parameter)
            if not spec.allows(self.parameter):
                raise ValueError(f"{spec.parameter}={self.parameter!r} {spec.rule}")
        check_number("temperature", self.temperature)
        if not MIN_TEMPERATURE <= self.temperature <= MAX_TEMPERATURE:
            raise ValueError(
                f"temperature={self.temperature!r} must be positive and finite, from "
                f"{MIN_TEMPERATURE} to {MAX_TEMPERATURE}; 1.0 is neutral"
            )
        for name, weight in (("kd_weight", self.kd_weight), ("ce_weight", self.ce_weight)):
            check_number(name, weight)
            if not 0 <= weight <= torch.finfo(torch.float32).max:
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
