"""How far the chunked loss is from exact arithmetic, measured in what eager bfloat16 loses."""

from dataclasses import replace

import pytest
import torch
from backends import BACKENDS

from kd.losses import DIVERGENCES, distillation_loss

pytestmark = pytest.mark.slow


def nearly_matched(problem):
    """Give the student the teacher's head and almost its hidden states, as late in training."""
    noise = torch.randn(problem.teacher_hidden.shape, generator=torch.Generator().manual_seed(1))
    return replace(
        problem,
        student_head=problem.teacher_head,
        student_hidden=(problem.teacher_hidden.float() + 0.1 * noise).to(
            problem.teacher_hidden.dtype
        ),
    )


def relative_error(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("match", ["random", "nearly matched"])
@pytest.mark.parametrize("logits_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_error_is_at_most_twice_that_of_eager_bfloat16_whatever_the_logits_and_the_match(
    make_problem, evaluate, backend, divergence, logits_dtype, match
):
    problem = make_problem((64,), (32, 32), (500, 500), dtype=torch.bfloat16)
    if match == "nearly matched":
        problem = nearly_matched(problem)
    options = {"divergence": divergence, "ce_weight": 0.0, "kd_weight": 1.0}
    exact = evaluate(problem.to(torch.float64), backend="reference", **options)
    eager = evaluate(problem, backend="reference", logits_dtype=torch.bfloat16, **options)
    actual = evaluate(problem, backend=backend, logits_dtype=logits_dtype, chunk_size=10, **options)
    assert exact.result.loss > 0.5
    assert actual.gradients[0].dtype == actual.gradients[1].dtype == torch.bfloat16
    assert actual.result.loss.dtype == torch.float32
    for gradient, eager_gradient, truth in zip(
        actual.gradients[:2], eager.gradients[:2], exact.gradients[:2], strict=True
    ):
        error, eager_error = relative_error(gradient, truth), relative_error(eager_gradient, truth)
        assert error <= 2 * eager_error
        if logits_dtype is None:
            # Half a unit in the last place of the bfloat16 gradient, and no more
            assert error < 3e-3
    if logits_dtype is None:
        assert relative_error(actual.result.loss, exact.result.loss) < 1e-4


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_float32_agrees_with_float64(make_problem, evaluate, backend):
    problem = make_problem(dtype=torch.float32)
    options = {"backend": backend, "divergence": "jsd", "temperature": 2.0, "bias": True}
    exact, actual = evaluate(problem.to(torch.float64), **options), evaluate(problem, **options)
    assert actual.result.loss.dtype == torch.float32
    for gradient, truth in zip(actual.gradients, exact.gradients, strict=True):
        assert relative_error(gradient, truth) < 1e-5


def test_head_gradient_is_accumulated_in_float32(make_problem, evaluate):
    """A thousand chunks of a row each: summed in bfloat16, the head's gradient would lose most of
    them.
    """
    problem = make_problem((1000,), (4, 4), (8, 8), dtype=torch.bfloat16)
    problem = replace(problem, student_hidden=problem.student_hidden.abs() + 1)
    exact = evaluate(problem.to(torch.float64), backend="reference")
    actual = evaluate(problem, chunk_size=1)
    assert relative_error(actual.gradients[1], exact.gradients[1]) < 3e-3


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_autocast_changes_nothing(make_problem, evaluate, backend):
    p = make_problem(dtype=torch.float32)
    expected = evaluate(p, backend=backend)
    head = p.student_head.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = distillation_loss(
            p.student_hidden, head, p.teacher_hidden, p.teacher_head, p.labels, backend=backend
        ).loss
    loss.backward()
    assert torch.equal(loss, expected.result.loss)
    assert torch.equal(head.grad, expected.gradients[1])


def test_teacher_and_student_may_be_of_two_dtypes(make_problem, evaluate):
    p = make_problem(dtype=torch.bfloat16)
    mixed = replace(
        p.to(torch.float32), teacher_hidden=p.teacher_hidden, teacher_head=p.teacher_head
    )
    expected, actual = evaluate(p.to(torch.float32)), evaluate(mixed)
    torch.testing.assert_close(actual.result.loss, expected.result.loss)


def test_float16_gradients_do_not_underflow_before_the_loss_scale_reaches_them(
    make_problem, evaluate
):
    problem = make_problem((256,), dtype=torch.float16)
    # a mean of small gradients, below the least float16 until it is scaled
    options = {"reduction": "mean", "grad_output": 2.0**20, "student_scale": 1e-3}
    exact = evaluate(problem.to(torch.float64), backend="reference", **options)
    actual = evaluate(problem, **options)
    for gradient, truth in zip(actual.gradients[:2], exact.gradients[:2], strict=True):
        assert relative_error(gradient, truth) < 1e-3


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "mixed_kl"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_offset_between_the_models_costs_few_digits(make_problem, evaluate, backend, divergence):
    """Logits may differ by a constant that no softmax sees."""
    problem = nearly_matched(make_problem((32,), (16, 16), (200, 200), dtype=torch.float32))
    problem = replace(problem, teacher_bias=torch.full((200,), 50.0), student_bias=torch.zeros(200))
    options = {"divergence": divergence, "ce_weight": 0.0, "bias": True}
    exact = evaluate(problem.to(torch.float64), backend="reference", **options)
    actual = evaluate(problem, backend=backend, **options)
    assert relative_error(actual.result.kd, exact.result.kd) < 1e-4
    assert relative_error(actual.gradients[0], exact.gradients[0]) < 1e-4
