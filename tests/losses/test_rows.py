"""Row functions: properties of one chunk's values and gradient that no projection can blur."""

import pytest
import torch

from kd.losses import DIVERGENCES, Objective
from kd.losses.reference import kd_rows
from kd.losses.rows import torch_rows

ROW_FUNCTIONS = {"torch": torch_rows}


@pytest.fixture(params=ROW_FUNCTIONS)
def rows(request):
    return ROW_FUNCTIONS[request.param]


def random_logits(num_rows=5, vocab_size=23, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(vocab_size, (num_rows,), generator=generator)
    student, teacher = torch.randn(2, num_rows, vocab_size, generator=generator, dtype=torch.float64)
    return student.to(dtype), teacher.to(dtype), labels


@pytest.mark.parametrize("block_elements", [1, 2 * 23, 10**9])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradient_is_that_of_autograd_whatever_the_block(rows, divergence, block_elements, monkeypatch):
    monkeypatch.setattr("kd.losses.rows.BLOCK_ELEMENTS", block_elements)
    student, teacher, labels = random_logits()
    weights = torch.linspace(0.5, 2, 5, dtype=torch.float64)
    objective = Objective(divergence, beta=0.3, alpha=0.2, mix_weight=0.7, temperature=1.7, ce_weight=0.0)
    leaf = student.clone().requires_grad_()
    kd = kd_rows(leaf, teacher, objective)
    (objective.kd_weight * kd * weights).sum().backward()
    actual_kd, _, dlogits = rows(student, teacher, labels, weights, objective, needs_grad=True)
    assert kd.min() > 0.01
    torch.testing.assert_close(actual_kd, kd.detach())
    torch.testing.assert_close(dlogits, leaf.grad)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradient_of_a_row_sums_to_zero(rows, divergence):
    student, teacher, labels = random_logits()
    objective, weights = Objective(divergence, temperature=0.7), torch.ones(5, dtype=torch.float64)
    dlogits = rows(student, teacher, labels, weights, objective, needs_grad=True)[2]
    assert dlogits.abs().sum(-1).min() > 0.1
    assert dlogits.sum(-1).abs().max() < 1e-14


@pytest.mark.parametrize("needs_grad", [False, True])
def test_without_a_teacher_kd_is_zero_and_gradient_that_of_cross_entropy(rows, needs_grad):
    student, _, labels = random_logits()
    expected_ce = torch.nn.functional.cross_entropy(student, labels, reduction="none")
    expected = 0.5 * (student.softmax(-1) - torch.nn.functional.one_hot(labels, 23))
    weights = torch.ones(5, dtype=torch.float64)
    kd, ce, dlogits = rows(student, None, labels, weights, Objective(), needs_grad)
    assert kd.abs().max() == 0
    torch.testing.assert_close(ce, expected_ce)
    assert (dlogits is not None) == needs_grad
    if needs_grad:
        torch.testing.assert_close(dlogits, expected)


# gap: how many nats the most likely token leads by; float32 exp underflows beyond 104
@pytest.mark.parametrize("gap", [100.0, 1e4])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_one_hot_teacher_and_underflowing_student_stay_finite(rows, divergence, temperature, gap):
    student, teacher, _ = random_logits(dtype=torch.float32)
    student[:, 0] += gap
    teacher[:, 1] += gap
    labels, weights = torch.full((5,), 2), torch.ones(5)
    objective = Objective(divergence, temperature=temperature)
    kd, ce, dlogits = rows(student, teacher, labels, weights, objective, needs_grad=True)
    assert kd.isfinite().all()
    assert kd.min() > 0.1 * temperature**2
    torch.testing.assert_close(ce, torch.full((5,), gap), rtol=0.1, atol=0)
    assert dlogits.isfinite().all()
    assert dlogits.sum(-1).abs().max() < 1e-4 * gap
    if divergence in ("forward_kl", "mixed_kl"):  # the bounded divergences saturate: their gradient is 0
        assert dlogits[:, 1].max() < -0.1 * temperature * objective.kd_weight


def test_bfloat16_logits_are_summed_in_float32(rows):
    student, teacher, labels = random_logits(vocab_size=5000, dtype=torch.bfloat16)
    expected = kd_rows(student.double(), teacher.double(), Objective())
    kd, ce, dlogits = rows(student, teacher, labels, torch.ones(5), Objective(), needs_grad=True)
    assert kd.dtype == ce.dtype == torch.float32
    assert dlogits.dtype in (torch.bfloat16, torch.float32)
    torch.testing.assert_close(kd.double(), expected, rtol=1e-5, atol=0)
