"""Properties of the loss: its algebra, what carries a gradient, and how gradients add up."""

import pytest
import torch
from backends import BACKENDS as CHUNKED_BACKENDS

from kd.losses import DIVERGENCES, distillation_loss

BACKENDS = ["reference", *CHUNKED_BACKENDS]


def test_micro_batches_accumulate_to_the_gradient_of_the_whole_batch(make_problem, evaluate):
    p = make_problem(ignored=3)
    hidden, head = (
        p.student_hidden.clone().requires_grad_(),
        p.student_head.clone().requires_grad_(),
    )
    for part in (slice(0, 4), slice(4, 13)):
        loss = distillation_loss(
            hidden[part], head, p.teacher_hidden[part], p.teacher_head, p.labels[part], chunk_size=3
        ).loss
        (loss / 7).backward()
    expected = evaluate(p, grad_output=1 / 7)
    torch.testing.assert_close(hidden.grad, expected.gradients[0])
    torch.testing.assert_close(head.grad, expected.gradients[1])


def test_backward_may_run_twice(make_problem):
    p = make_problem()
    head = p.student_head.clone().requires_grad_()
    loss = distillation_loss(
        p.student_hidden, head, p.teacher_hidden, p.teacher_head, p.labels
    ).loss
    once, twice = (
        torch.autograd.grad(scale * loss, head, retain_graph=True)[0] for scale in (1.0, 2.0)
    )
    torch.testing.assert_close(2 * once, twice)


def test_cross_entropy_does_not_depend_on_kd_weight(make_problem, evaluate):
    problem = make_problem(vocab_sizes=(37, 31))
    with_kd, without_kd = (evaluate(problem, kd_weight=weight).result for weight in (0.5, 0.0))
    assert with_kd.ce == without_kd.ce
    assert with_kd.kd > 0.05
    assert without_kd.kd == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_loss_carries_a_gradient_and_the_teacher_gets_none(make_problem, backend):
    p = make_problem()
    learners = [t.clone().requires_grad_() for t in (p.student_hidden, p.student_head)]
    teachers = [t.clone().requires_grad_() for t in (p.teacher_hidden, p.teacher_head)]
    weights = torch.ones(13, requires_grad=True)
    result = distillation_loss(
        *learners, *teachers, p.labels, token_weights=weights, backend=backend
    )
    assert [value.requires_grad for value in result] == [True, False, False, False]
    result.loss.backward()
    assert all(tensor.grad is None for tensor in (*teachers, weights))


@pytest.mark.parametrize("backend", CHUNKED_BACKENDS)
def test_inputs_are_left_as_they_were_and_may_be_strided(make_problem, evaluate, backend):
    problem = make_problem()
    expected = evaluate(problem, chunk_size=4, bias=True)
    p = {name: torch.stack([t, t], dim=-1)[..., 0] for name, t in vars(problem).items()}
    before = {name: tensor.clone() for name, tensor in p.items()}
    head = p["student_head"].T.contiguous().T.requires_grad_()
    result = distillation_loss(
        p["student_hidden"],
        head,
        p["teacher_hidden"],
        p["teacher_head"],
        p["labels"],
        student_bias=p["student_bias"],
        teacher_bias=p["teacher_bias"],
        chunk_size=4,
        backend=backend,
    )
    result.loss.backward()
    torch.testing.assert_close(head.grad, expected.gradients[1])
    assert all(torch.equal(before[name], tensor) for name, tensor in p.items())


def test_identities_of_the_divergences(make_problem):
    p = make_problem(hidden_sizes=(6, 6), ignored=0)
    student, teacher = (p.student_hidden, p.student_head), (p.teacher_hidden, p.teacher_head)

    def kd(first, second, divergence, **options):
        return distillation_loss(*first, *second, p.labels, divergence=divergence, **options).kd

    for divergence in DIVERGENCES:
        assert kd(student, student, divergence).abs() < 1e-12
        assert kd(student, teacher, divergence) > 0.1
    forward, reverse = kd(student, teacher, "forward_kl"), kd(student, teacher, "reverse_kl")
    torch.testing.assert_close(kd(teacher, student, "reverse_kl"), forward)
    torch.testing.assert_close(kd(student, teacher, "mixed_kl", mix_weight=1.0), forward)
    mixed = kd(student, teacher, "mixed_kl", mix_weight=0.25)
    torch.testing.assert_close(mixed, 0.25 * forward + 0.75 * reverse)
    torch.testing.assert_close(kd(student, teacher, "jsd"), kd(teacher, student, "jsd"))
    torch.testing.assert_close(
        kd(student, teacher, "jsd", beta=0.3), kd(teacher, student, "jsd", beta=0.7)
    )
    for limit, skewed in ((forward, "skew_kl"), (reverse, "skew_reverse_kl")):
        torch.testing.assert_close(
            kd(student, teacher, skewed, alpha=1e-9), limit, rtol=1e-5, atol=0
        )
        assert kd(student, teacher, skewed, alpha=1 - 1e-9) < 1e-6
    assert kd(student, teacher, "tvd", reduction="mean") < 1
    assert kd(student, teacher, "jsd", reduction="mean") < torch.log(torch.tensor(2.0))


@pytest.mark.parametrize("backend", CHUNKED_BACKENDS)
def test_a_token_that_is_ruled_out_costs_cross_entropy_nothing(make_problem, evaluate, backend):
    problem = make_problem()
    problem.student_bias[:2] = -torch.inf
    problem.labels[problem.labels >= 0] += 2
    options = {"teacher": False, "kd_weight": 0.0, "bias": True}
    expected, actual = (
        evaluate(problem, backend=name, **options) for name in ("reference", backend)
    )
    assert expected.result.ce.isfinite()
    torch.testing.assert_close(actual.result.ce, expected.result.ce)
    torch.testing.assert_close(actual.gradients[0], expected.gradients[0])


@pytest.mark.parametrize("backend", CHUNKED_BACKENDS)
def test_backward_with_the_graph_kept_equals_the_last_one(make_problem, backend):
    p = make_problem()
    hidden, head = p.student_hidden.requires_grad_(), p.student_head.requires_grad_()
    loss = distillation_loss(
        hidden, head, p.teacher_hidden, p.teacher_head, p.labels, backend=backend
    ).loss
    kept = torch.autograd.grad(loss, (hidden, head), torch.full_like(loss, 3), retain_graph=True)
    last = torch.autograd.grad(loss, (hidden, head), torch.full_like(loss, 3))
    assert all(torch.equal(*pair) for pair in zip(kept, last, strict=True))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, (hidden, head))
