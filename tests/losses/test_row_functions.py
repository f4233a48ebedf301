"""Row functions: properties of one chunk's values and gradient that no projection can blur."""

import pytest
import torch
from backends import BACKENDS

from kd.losses import DIVERGENCES, Head, Objective
from kd.losses.heads import gradient_view
from kd.losses.reference import kd_rows
from kd.losses.row_functions import RowChunk, torch_rows

PLAIN = Head(torch.empty(0), None, None, 1.0)


@pytest.fixture(params=BACKENDS)
def rows(request):
    """(student, teacher, labels, weights, objective) -> kd, ce, dlogits, diagnostics of one chunk
    by one backend.
    """
    function = torch_rows
    if request.param == "triton":
        from kd.losses.triton_rows import triton_rows as function

    def run(student, teacher, labels, weights, objective, *, needs_grad=True, grad_dtype=None):
        dlogits = gradient_view(student, grad_dtype or student.dtype) if needs_grad else None
        kd, ce = torch.full_like(weights, torch.nan), torch.full_like(weights, torch.nan)
        diagnostics = None if teacher is None else weights.new_full((len(weights), 5), torch.nan)
        chunk = RowChunk(student, teacher, labels, weights, kd, ce, dlogits, diagnostics)
        function(chunk, objective, PLAIN, None if teacher is None else PLAIN)
        return kd, ce, dlogits, diagnostics

    return run


def random_logits(num_rows=5, vocab_size=23, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(vocab_size, (num_rows,), generator=generator)
    student, teacher = torch.randn(
        2, num_rows, vocab_size, generator=generator, dtype=torch.float64
    )
    return student.to(dtype), teacher.to(dtype), labels


# elements of torch's block and columns of the kernel's: less than a row, whole rows and tiles with
# a rest, all at once
@pytest.mark.parametrize(("block_elements", "columns"), [(1, 4), (2 * 23, 16), (10**9, 2048)])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradient_is_that_of_autograd_whatever_the_block(
    rows, divergence, block_elements, columns, monkeypatch
):
    monkeypatch.setattr("kd.losses.row_functions.CPU_BLOCK_ELEMENTS", block_elements)
    monkeypatch.setattr("kd.losses.triton_rows.MAX_BLOCK", columns)
    student, teacher, labels = random_logits()
    weights = torch.linspace(0.5, 2, 5, dtype=torch.float64)
    objective = Objective(
        divergence, beta=0.3, alpha=0.2, mix_weight=0.7, temperature=1.7, ce_weight=0.0
    )
    leaf = student.clone().requires_grad_()
    kd = kd_rows(leaf, teacher, objective)
    (objective.kd_weight * kd * weights).sum().backward()
    actual_kd, _, dlogits, _ = rows(student, teacher, labels, weights, objective)
    assert kd.min() > 0.01
    torch.testing.assert_close(actual_kd, kd.detach())
    torch.testing.assert_close(dlogits, leaf.grad)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradient_of_a_row_sums_to_zero(rows, divergence):
    student, teacher, labels = random_logits()
    objective, weights = Objective(divergence, temperature=0.7), torch.ones(5, dtype=torch.float64)
    dlogits = rows(student, teacher, labels, weights, objective)[2]
    assert dlogits.abs().sum(-1).min() > 0.1
    assert dlogits.sum(-1).abs().max() < 1e-14


@pytest.mark.parametrize("needs_grad", [False, True])
def test_without_a_teacher_kd_is_zero_and_gradient_that_of_cross_entropy(rows, needs_grad):
    student, _, labels = random_logits()
    expected_ce = torch.nn.functional.cross_entropy(student, labels, reduction="none")
    expected = 0.5 * (student.softmax(-1) - torch.nn.functional.one_hot(labels, 23))
    weights = torch.ones(5, dtype=torch.float64)
    kd, ce, dlogits, diagnostics = rows(
        student.clone(), None, labels, weights, Objective(), needs_grad=needs_grad
    )
    assert kd.abs().max() == 0
    assert diagnostics is None
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
    kd, ce, dlogits, diagnostics = rows(student, teacher, labels, weights, objective)
    assert diagnostics.isfinite().all()
    assert kd.isfinite().all()
    assert kd.min() > 0.1 * temperature**2
    torch.testing.assert_close(ce, torch.full((5,), gap), rtol=0.1, atol=0)
    assert dlogits.isfinite().all()
    assert dlogits.sum(-1).abs().max() < 1e-4 * gap
    # The bounded divergences saturate: their gradient is 0
    if divergence in (
        "forward_kl",
        "mixed_kl",
    ):
        assert dlogits[:, 1].max() < -0.1 * temperature * objective.kd_weight


def test_bfloat16_logits_are_summed_in_float32(rows):
    student, teacher, labels = random_logits(vocab_size=5000, dtype=torch.bfloat16)
    expected = kd_rows(student.double(), teacher.double(), Objective())
    kd, ce, dlogits, _ = rows(student, teacher, labels, torch.ones(5), Objective())
    assert kd.dtype == ce.dtype == torch.float32
    assert dlogits.dtype == torch.bfloat16
    torch.testing.assert_close(kd.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_bfloat16_gradient_fits_into_the_float32_rows_it_replaces(rows, divergence, monkeypatch):
    """In rows of 24 columns, of which 23 are logits: none is overwritten before it is read."""
    monkeypatch.setattr("kd.losses.triton_rows.MAX_BLOCK", 4)
    student, teacher, labels = random_logits(dtype=torch.float32)
    expected = rows(student.clone(), teacher.clone(), labels, torch.ones(5), Objective(divergence))[
        2
    ]
    buffer = torch.zeros(5, 24)
    buffer[:, :23] = student
    actual = rows(
        buffer[:, :23],
        teacher,
        labels,
        torch.ones(5),
        Objective(divergence),
        grad_dtype=torch.bfloat16,
    )[2]
    assert actual.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()
    assert actual.stride() == (48, 1)
    torch.testing.assert_close(actual, expected.bfloat16())


@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_diagnostics_are_those_of_full_distributions_whatever_is_trained(
    rows, divergence, temperature, monkeypatch
):
    monkeypatch.setattr("kd.losses.triton_rows.MAX_BLOCK", 8)
    student, teacher, labels = random_logits(num_rows=6)
    teacher[:3] = student[:3] + 0.1 * teacher[:3]
    student[4, 3] = teacher[4, 3] = 9.0
    q, p = (student / temperature).softmax(-1), (teacher / temperature).softmax(-1)
    expected = [(p * (p / q).log()).sum(-1), (q * (q / p).log()).sum(-1)]
    expected += [-(q * q.log()).sum(-1), -(p * p.log()).sum(-1)]
    expected += [(student.argmax(-1) == teacher.argmax(-1)).double()]
    weights = torch.linspace(0, 2, 6, dtype=torch.float64)
    for needs_grad in (False, True):
        objective = Objective(divergence, temperature=temperature)
        diagnostics = rows(
            student.clone(), teacher.clone(), labels, weights, objective, needs_grad=needs_grad
        )[3]
        torch.testing.assert_close(diagnostics, torch.stack(expected, dim=1))
    assert 0 < expected[4].sum() < 6


def test_no_rows_are_no_error(rows):
    empty = torch.empty(0, 23)
    kd, ce, dlogits, diagnostics = rows(
        empty, empty, torch.empty(0, dtype=torch.int64), torch.empty(0), Objective()
    )
    assert len(kd) == len(ce) == len(dlogits) == len(diagnostics) == 0
