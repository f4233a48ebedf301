"""The chunked loss against the reference in float64: values, every gradient, every option."""

import pytest
import torch
import torch.nn.functional as F
from backends import BACKENDS

from kd.losses import DIVERGENCES, distillation_loss

OPTIONS = {"beta": 0.3, "alpha": 0.2, "mix_weight": 0.7, "kd_weight": 0.6, "ce_weight": 0.3}

# what the test is about -> (the problem, the options)
CASES = {
    "ragged last chunk": ({}, {"chunk_size": 4}),
    "rows a multiple of the chunk": ({"rows": (14,)}, {"chunk_size": 4}),
    "one row a chunk": ({}, {"chunk_size": 1}),
    "chunk larger than N": ({}, {"chunk_size": 1000}),
    "chunk chosen by the budget": ({}, {}),
    "one row": ({"rows": (1,), "ignored": 0}, {"chunk_size": 4}),
    "larger student vocabulary": ({"vocab_sizes": (37, 31)}, {"chunk_size": 4}),
    "larger teacher vocabulary": ({"vocab_sizes": (31, 37)}, {"chunk_size": 4}),
    "vocab_size below both": (
        {"vocab_sizes": (37, 35)},
        {"chunk_size": 4, "vocab_size": 33, "bias": True},
    ),
    "high temperature": ({}, {"chunk_size": 4, "temperature": 2.5}),
    "low temperature": ({}, {"chunk_size": 4, "temperature": 0.5}),
    "frozen head": ({}, {"chunk_size": 4, "frozen": ("head",)}),
    "frozen hidden": ({}, {"chunk_size": 4, "frozen": ("hidden",)}),
    "frozen bias": ({}, {"chunk_size": 4, "frozen": ("bias",), "bias": True}),
    "only bias learns": ({}, {"chunk_size": 4, "frozen": ("hidden", "head"), "bias": True}),
    "grad_output": ({}, {"chunk_size": 4, "grad_output": -2.5}),
    "bias": ({}, {"chunk_size": 4, "bias": True}),
    "scale": ({}, {"chunk_size": 4, "student_scale": 0.4, "teacher_scale": 1.3}),
    "softcap": ({}, {"chunk_size": 4, "student_softcap": 2.0, "teacher_softcap": 3.0}),
    "bias, scale and softcap": (
        {"vocab_sizes": (37, 31)},
        {
            "chunk_size": 4,
            "bias": True,
            "student_scale": 0.4,
            "student_softcap": 2.0,
            "temperature": 2.0,
        },
    ),
    "token weights": ({}, {"chunk_size": 4, "token_weights": torch.linspace(0, 2, 13)}),
    "mean": ({}, {"chunk_size": 4, "reduction": "mean"}),
    "weighted mean": (
        {},
        {"chunk_size": 4, "reduction": "mean", "token_weights": torch.linspace(0, 2, 13)},
    ),
    "kd only": ({}, {"chunk_size": 4, "ce_weight": 0.0}),
    "ce only": ({}, {"chunk_size": 4, "kd_weight": 0.0, "teacher": False}),
    "row_index": ({"ignored": 0}, {"chunk_size": 4, "row_index": torch.tensor([1, 2, 5, 7, 11])}),
    "two leading dimensions": (
        {"rows": (3, 5)},
        {"chunk_size": 4, "token_weights": torch.rand(3, 5)},
    ),
    "other ignore_index": ({"ignored": 0}, {"chunk_size": 4, "ignore_index": 3}),
}


def assert_same(actual, expected):
    for name, value in expected.result._asdict().items():
        torch.testing.assert_close(
            getattr(actual.result, name), value, rtol=1e-10, atol=1e-12, msg=name
        )
    for gradient, truth in zip(actual.gradients, expected.gradients, strict=True):
        assert (gradient is None) == (truth is None)
        if truth is not None:
            torch.testing.assert_close(gradient, truth, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_values_and_gradients_equal_the_reference(
    make_problem, evaluate, backend, divergence, case
):
    shapes, options = CASES[case]
    problem, options = make_problem(**shapes), OPTIONS | {"divergence": divergence} | options
    expected = evaluate(problem, backend="reference", **options)
    actual = evaluate(problem, backend=backend, **options)
    assert expected.result.loss > 0.05
    assert expected.result.kd > 0.05 or options["kd_weight"] == 0
    for gradient in filter(lambda g: g is not None, expected.gradients):
        assert gradient.norm() > 1e-3
    assert_same(actual, expected)


@pytest.mark.parametrize("by_index", [False, True])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_rows_weights_and_vocabulary_are_those_of_plain_torch(
    make_problem, backend, reduction, by_index
):
    """The reference and its rivals share this choice, so that no comparison of the two can test
    it.
    """
    p = make_problem((3, 5), vocab_sizes=(37, 33), ignored=0)
    ignore_index = p.labels[1, 2].item()
    keep = p.labels != ignore_index
    weights = torch.linspace(0.5, 2, 15, dtype=torch.float64).view(3, 5)
    hidden, head = (t.clone().requires_grad_() for t in (p.student_hidden, p.student_head))
    student, teacher = (
        (hidden @ head[:31].T)[keep],
        (p.teacher_hidden @ p.teacher_head[:31].T)[keep],
    )
    log_q, log_p = (student / 2).log_softmax(-1), (teacher / 2).log_softmax(-1)
    kd = (
        4
        * (F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1) * weights[keep]).sum()
    )
    ce = (F.cross_entropy(student, p.labels[keep], reduction="none") * weights[keep]).sum()
    if reduction == "mean":
        kd, ce = kd / weights[keep].sum(), ce / weights[keep].sum()
    gradients = torch.autograd.grad(0.7 * kd + 0.2 * ce, (hidden, head))
    result = distillation_loss(
        hidden,
        head,
        p.teacher_hidden,
        p.teacher_head,
        p.labels,
        temperature=2.0,
        kd_weight=0.7,
        ce_weight=0.2,
        token_weights=weights,
        vocab_size=31,
        reduction=reduction,
        ignore_index=-100 if by_index else ignore_index,
        row_index=keep.flatten().nonzero().squeeze(1) if by_index else None,
        backend=backend,
    )
    assert 0 < keep.sum() < 15
    assert result.num_tokens == keep.sum()
    torch.testing.assert_close(result.kd, kd.detach())
    torch.testing.assert_close(result.ce, ce.detach())
    torch.testing.assert_close(result.loss, 0.7 * kd + 0.2 * ce)
    torch.testing.assert_close(torch.autograd.grad(result.loss, (hidden, head)), gradients)


@pytest.mark.parametrize(
    "empty", [{"rows": (0,)}, {"rows": (0, 5)}, {"rows": (13,), "ignored": 13}]
)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_without_a_supervised_row_zero_is_attached(
    make_problem, evaluate, backend, reduction, empty
):
    problem = make_problem(**empty)
    outcome = evaluate(problem, backend=backend, reduction=reduction, bias=True)
    assert [value.item() for value in outcome.result] == [0, 0, 0, 0]
    shapes = [problem.student_hidden.shape, problem.student_head.shape, problem.student_bias.shape]
    for gradient, shape in zip(outcome.gradients, shapes, strict=True):
        assert torch.equal(gradient, torch.zeros(shape, dtype=torch.float64))


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_mean_over_zero_weights_is_zero(make_problem, evaluate, backend):
    outcome = evaluate(
        make_problem(), backend=backend, reduction="mean", token_weights=torch.zeros(13)
    )
    assert outcome.result.loss == 0
    assert outcome.result.num_tokens == 11


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_rows_beyond_the_shared_vocabulary_get_a_zero_gradient(make_problem, evaluate, backend):
    outcome = evaluate(make_problem(vocab_sizes=(37, 31)), backend=backend, bias=True)
    for gradient in outcome.gradients[1:]:
        assert gradient[:31].abs().sum(-1).min() > 0
        assert gradient[31:].abs().max() == 0


def test_ignored_rows_get_a_zero_gradient_and_others_do_not(make_problem, evaluate):
    problem = make_problem(ignored=5)
    gradient = evaluate(problem, chunk_size=3).gradients[0]
    assert torch.equal(gradient.norm(dim=-1) > 0, problem.labels != -100)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_pass_gradcheck(make_problem, backend, divergence):
    p = make_problem(rows=(3,), hidden_sizes=(2, 3), vocab_sizes=(5, 6), ignored=1)

    def loss(hidden, head, bias):
        options = OPTIONS | {"divergence": divergence, "temperature": 1.7, "student_softcap": 4.0}
        result = distillation_loss(
            hidden,
            head,
            p.teacher_hidden,
            p.teacher_head,
            p.labels,
            student_bias=bias,
            chunk_size=2,
            backend=backend,
            **options,
        )
        return 3.0 * result.loss

    inputs = [
        t.clone().requires_grad_() for t in (p.student_hidden, p.student_head, p.student_bias)
    ]
    # one random direction instead of every entry where each call takes long
    assert torch.autograd.gradcheck(loss, inputs, fast_mode=backend == "triton")


def test_row_index_gives_what_the_labels_give(make_problem, evaluate):
    problem = make_problem(ignored=4)
    row_index = (problem.labels != -100).nonzero().squeeze(1)
    assert_same(
        evaluate(problem, row_index=row_index, chunk_size=4), evaluate(problem, chunk_size=4)
    )
