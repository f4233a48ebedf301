"""The reference against formulas written down a second time, in numpy and torch.nn.functional."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kd.losses import DIVERGENCES, Head, Objective
from kd.losses.reference import full_logits, kd_rows


def _by_hand(p: np.ndarray, q: np.ndarray, divergence: str, parameter: float) -> np.ndarray:
    def kl(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.sum(a * np.log(a / b), axis=1)

    c = parameter
    return {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "mixed_kl": lambda: c * kl(p, q) + (1 - c) * kl(q, p),
        "jsd": lambda: c * kl(p, c * p + (1 - c) * q) + (1 - c) * kl(q, c * p + (1 - c) * q),
        "skew_kl": lambda: kl(p, c * p + (1 - c) * q),
        "skew_reverse_kl": lambda: kl(q, c * q + (1 - c) * p),
        "tvd": lambda: np.abs(p - q).sum(axis=1) / 2,
    }[divergence]()


def _softmax(logits: np.ndarray) -> np.ndarray:
    return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_divergence_equals_its_textbook_formula(divergence, temperature):
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(2, 5, 17))
    objective = Objective(divergence, beta=0.3, alpha=0.2, mix_weight=0.7, temperature=temperature)
    parameter = {"jsd": 0.3, "mixed_kl": 0.7}.get(divergence, 0.2)
    p, q = _softmax(teacher / temperature), _softmax(student / temperature)
    expected = _by_hand(p, q, divergence, parameter)
    assert expected.min() > 0.01
    actual = kd_rows(torch.from_numpy(student), torch.from_numpy(teacher), objective)
    np.testing.assert_allclose(actual.numpy(), temperature**2 * expected, rtol=1e-12)


def test_forward_kl_is_kl_of_teacher_to_student_with_the_teacher_entropy():
    student, teacher = torch.randn(
        2, 5, 17, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    expected = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(kd_rows(student, teacher, Objective("forward_kl")), expected)
    torch.testing.assert_close(kd_rows(teacher, student, Objective("reverse_kl")), expected)


def test_logits_are_softcap_of_scale_times_the_affine_map():
    hidden, weight, bias = (
        np.array([[1.0, 2.0]]),
        np.array([[3.0, 4.0], [-5.0, 6.0]]),
        np.array([0.5, -0.5]),
    )
    expected = 2.0 * np.tanh(0.25 * (np.array([[11.0, 7.0]]) + bias) / 2.0)
    head = Head(torch.from_numpy(weight), torch.from_numpy(bias), softcap=2.0, scale=0.25)
    actual = full_logits(torch.from_numpy(hidden), head, torch.float64)
    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-12)
