"""return_diagnostics: the same loss, and what each supervised row tells."""

import pytest
import torch
from backends import BACKENDS

from kd.losses import DIVERGENCES, RowDiagnostics, distillation_loss


def run(problem, **options):
    hidden, head = (
        t.clone().requires_grad_() for t in (problem.student_hidden, problem.student_head)
    )
    result, diagnostics = distillation_loss(
        hidden,
        head,
        problem.teacher_hidden,
        problem.teacher_head,
        problem.labels,
        return_diagnostics=True,
        **options,
    )
    result.loss.backward()
    return result, diagnostics, (hidden.grad, head.grad)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_are_those_of_the_reference_and_the_loss_is_unchanged(
    make_problem, evaluate, backend, divergence
):
    problem = make_problem((3, 7), vocab_sizes=(37, 31))
    options = {
        "divergence": divergence,
        "temperature": 1.7,
        "student_softcap": 3.0,
        "teacher_scale": 1.3,
    }
    _, expected, _ = run(problem, backend="reference", **options)
    result, diagnostics, gradients = run(problem, backend=backend, chunk_size=4, **options)
    plain = evaluate(problem, backend=backend, chunk_size=4, **options)
    assert torch.equal(result.loss, plain.result.loss)
    assert all(torch.equal(*pair) for pair in zip(gradients, plain.gradients, strict=False))
    assert diagnostics._fields == RowDiagnostics._fields
    for name, values in expected._asdict().items():
        assert values.shape == ((problem.labels != -100).sum(),)
        assert not getattr(diagnostics, name).requires_grad
        torch.testing.assert_close(getattr(diagnostics, name), values, msg=name)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_they_are_divergences_at_the_temperature_without_its_square(make_problem, backend):
    problem = make_problem()
    for divergence in ("forward_kl", "reverse_kl"):
        result, diagnostics, _ = run(
            problem, divergence=divergence, temperature=2.0, backend=backend
        )
        torch.testing.assert_close(4 * getattr(diagnostics, divergence).sum(), result.kd)


def test_a_student_that_is_its_teacher_agrees_everywhere(make_problem):
    p = make_problem(hidden_sizes=(6, 6), ignored=0)
    same = (p.student_hidden, p.student_head)
    _, diagnostics = distillation_loss(*same, *same, p.labels, return_diagnostics=True)
    assert diagnostics.forward_kl.abs().max() < 1e-12
    assert torch.equal(diagnostics.student_entropy, diagnostics.teacher_entropy)
    assert diagnostics.student_entropy.min() > 0.1
    assert diagnostics.top1_agreement.tolist() == [1.0] * 13


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_without_a_teacher_there_are_none(make_problem, backend):
    p = make_problem()
    result, diagnostics = distillation_loss(
        p.student_hidden,
        p.student_head,
        None,
        None,
        p.labels,
        kd_weight=0.0,
        backend=backend,
        return_diagnostics=True,
    )
    assert diagnostics is None
    assert result.ce > 1


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_without_a_supervised_row_they_are_empty(make_problem, backend):
    _, diagnostics, _ = run(make_problem(ignored=13), backend=backend)
    assert all(values.shape == (0,) for values in diagnostics)
