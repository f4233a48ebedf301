"""The loss from a teacher's top K: against plain autograd over K + 1 outcomes, and against the
whole teacher.
"""

import itertools

import pytest
import torch

from kd.losses import DIVERGENCES, Head, distillation_loss, sparse_distillation_loss
from kd.losses.reference import full_logits

OPTIONS = {
    "beta": 0.3,
    "alpha": 0.2,
    "mix_weight": 0.7,
    "kd_weight": 0.6,
    "ce_weight": 0.3,
    "chunk_size": 4,
}
FINITE = {
    "bucket": DIVERGENCES,
    "ignore": tuple(d for d in DIVERGENCES if d not in ("reverse_kl", "mixed_kl")),
}

# what the test is about -> (the problem, the options)
CASES = {
    "ragged last chunk": ({}, {}),
    "one row a chunk": ({}, {"chunk_size": 1}),
    "chunk larger than N": ({}, {"chunk_size": 1000}),
    "larger student vocabulary": ({"vocab_sizes": (37, 31)}, {"vocab_size": 31}),
    "temperature": ({}, {"temperature": 2.5}),
    "bias, scale and softcap": ({}, {"bias": True, "student_scale": 0.4, "student_softcap": 2.0}),
    "weighted mean": ({}, {"reduction": "mean", "token_weights": torch.linspace(0, 2, 13)}),
    "kd only": ({}, {"ce_weight": 0.0}),
    "ce only": ({}, {"kd_weight": 0.0}),
    "frozen head": ({}, {"frozen": ("head",)}),
    "grad_output": ({}, {"grad_output": -2.5}),
    "two leading dimensions": ({"rows": (3, 5)}, {}),
    "no supervised row": ({"ignored": 13}, {}),
    "no row": ({"rows": (0,)}, {}),
}


def top_k(problem, k, temperature=1.0):
    """The teacher's k most likely tokens of each row and their log-probabilities."""
    head = Head(problem.teacher_head, None, None, 1.0)
    logits = full_logits(problem.teacher_hidden, head, problem.teacher_head.dtype)
    log_p, ids = (logits / temperature).log_softmax(-1).topk(k, dim=-1)
    return ids, log_p


def evaluate_sparse(
    problem, k=5, *, frozen=(), bias=False, grad_output=1.0, teacher=None, **options
):
    """The result, and gradients of hidden states, head and bias."""
    tensors = {
        "hidden": problem.student_hidden,
        "head": problem.student_head,
        "bias": problem.student_bias,
    }
    leaves = {name: t.clone().requires_grad_(name not in frozen) for name, t in tensors.items()}
    ids, log_p = teacher or top_k(problem, k, options.get("temperature", 1.0))
    if bias:
        options["student_bias"] = leaves["bias"]
    result = sparse_distillation_loss(
        leaves["hidden"], leaves["head"], ids, log_p, problem.labels, **options
    )
    result.loss.backward(torch.full_like(result.loss, grad_output))
    return result, [leaf.grad for leaf in leaves.values()]


def assert_same(actual, expected, rtol=1e-9):
    for value, truth in zip((*actual[0], *actual[1]), (*expected[0], *expected[1]), strict=True):
        assert (value is None) == (truth is None)
        if truth is not None:
            torch.testing.assert_close(value, truth, rtol=rtol, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("tail", "divergence"), [(tail, d) for tail, finite in FINITE.items() for d in finite]
)
def test_values_and_gradients_equal_the_reference(make_problem, tail, divergence, case):
    shapes, options = CASES[case]
    problem, options = (
        make_problem(**shapes),
        OPTIONS | {"tail": tail, "divergence": divergence} | options,
    )
    expected = evaluate_sparse(problem, backend="reference", **options)
    if (problem.labels != -100).any():
        assert expected[0].loss > 0.05
        assert expected[0].kd > 0.05
    assert_same(evaluate_sparse(problem, **options), expected)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_with_all_tokens_it_is_the_loss_of_the_whole_teacher(make_problem, evaluate, divergence):
    problem, options = make_problem(), OPTIONS | {"divergence": divergence, "temperature": 1.7}
    whole = evaluate(problem, **options)
    assert whole.result.kd > 1
    for tail in FINITE:
        if divergence in FINITE[tail]:
            assert_same(
                evaluate_sparse(problem, 31, tail=tail, **options),
                (whole.result, whole.gradients),
                rtol=1e-7,
            )


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_with_a_bucket_it_grows_with_k_towards_the_whole_and_is_never_negative(
    make_problem, divergence
):
    """Merging outcomes cannot raise a divergence: the data-processing inequality."""
    p = make_problem(ignored=0)
    whole = distillation_loss(
        p.student_hidden,
        p.student_head,
        p.teacher_hidden,
        p.teacher_head,
        p.labels,
        divergence=divergence,
    ).kd
    ids, log_p = top_k(p, 31)
    kds = [
        evaluate_sparse(p, teacher=(ids[:, :k], log_p[:, :k]), divergence=divergence)[0].kd
        for k in (1, 2, 4, 8, 16, 31)
    ]
    assert 0 < kds[0] < 0.9 * whole
    assert all(less <= more + 1e-12 for less, more in itertools.pairwise(kds))
    torch.testing.assert_close(kds[-1], whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("tail", "divergence"), [(tail, d) for tail, finite in FINITE.items() for d in finite]
)
def test_it_is_never_negative_when_probabilities_are_rounded_and_models_agree(
    make_problem, tail, divergence, dtype
):
    p = make_problem((50,), (6, 6), dtype=torch.float32)
    ids, log_p = top_k(p, 3)
    for hidden, row_ids, row_log_p, label in zip(
        p.teacher_hidden, ids, log_p.to(dtype), p.labels, strict=True
    ):
        result = sparse_distillation_loss(
            hidden,
            p.teacher_head,
            row_ids,
            row_log_p,
            label.clamp_min(0),
            tail=tail,
            divergence=divergence,
        )
        assert result.kd >= 0


@pytest.mark.parametrize("gap", [100.0, 1e4])
@pytest.mark.parametrize(
    ("tail", "divergence"), [(tail, d) for tail, finite in FINITE.items() for d in finite]
)
def test_certain_models_stay_finite(tail, divergence, gap):
    """Both distributions underflow outside one token, in float32; one id is there to fill K."""
    head = torch.eye(8).requires_grad_()
    hidden = (gap * torch.eye(8)[:1]).requires_grad_()
    ids, log_p = torch.tensor([[1, 2, 3]]), torch.tensor([[0.0, -200.0, -torch.inf]])
    result = sparse_distillation_loss(
        hidden,
        head,
        ids,
        log_p,
        torch.tensor([2]),
        tail=tail,
        divergence=divergence,
        temperature=1.5,
    )
    result.loss.backward()
    assert result.kd > 0.1
    assert all(value.isfinite().all() for value in (result.loss, hidden.grad, head.grad))


def test_gradients_pass_gradcheck(make_problem):
    p = make_problem(rows=(3,), hidden_sizes=(2, 3), vocab_sizes=(5, 5), ignored=1)
    ids, log_p = top_k(p, 2, 1.7)

    def loss(hidden, head):
        options = OPTIONS | {"temperature": 1.7, "student_softcap": 4.0, "divergence": "jsd"}
        return sparse_distillation_loss(hidden, head, ids, log_p, p.labels, **options).loss

    assert torch.autograd.gradcheck(
        loss, [t.clone().requires_grad_() for t in (p.student_hidden, p.student_head)]
    )


@pytest.mark.parametrize("logits_dtype", [None, torch.bfloat16])
def test_bfloat16_errs_at_most_twice_as_much_as_eager(make_problem, logits_dtype):
    problem = make_problem((64,), (32, 32), (500, 500), dtype=torch.bfloat16)
    teacher = top_k(problem.to(torch.float64), 20)
    exact = evaluate_sparse(problem.to(torch.float64), teacher=teacher, backend="reference")[1]
    eager = evaluate_sparse(
        problem, teacher=teacher, backend="reference", logits_dtype=torch.bfloat16
    )[1]
    actual = evaluate_sparse(problem, teacher=teacher, chunk_size=10, logits_dtype=logits_dtype)[1]
    for gradient, eager_gradient, truth in zip(actual[:2], eager[:2], exact[:2], strict=True):
        assert (gradient.double() - truth).norm() <= 2 * (eager_gradient.double() - truth).norm()


BAD = {
    "misspelt tail": ({"tail": "buckets"}, "tail='buckets'.*'bucket'"),
    "infinite": (
        {"tail": "ignore", "divergence": "reverse_kl"},
        "tail='ignore', divergence='reverse_kl'.*'bucket'",
    ),
    "no triton": ({"backend": "triton"}, "backend='triton'.*torch"),
    "ids in int32": ({"teacher_ids": lambda ids: ids.int()}, "teacher_ids is torch.int32.*int64"),
    "ids without K": (
        {"teacher_ids": lambda ids: ids[:, 0]},
        r"teacher_ids is torch.int64 \(13,\).*K >= 1",
    ),
    "too few log-probabilities": (
        {"teacher_logprobs": lambda log_p: log_p[:, 1:]},
        r"teacher_logprobs.*\(13, 4\)",
    ),
    "id too large": ({"teacher_ids": lambda ids: ids + 31}, r"teacher_ids must lie in \[0, 31\)"),
    "id twice": (
        {"teacher_ids": lambda ids: torch.zeros_like(ids)},
        "teacher_ids of a row must be distinct.*-inf",
    ),
    "probabilities": (
        {"teacher_logprobs": lambda log_p: log_p.exp()},
        "teacher_logprobs must be log-probabilities",
    ),
    "nan": (
        {"teacher_logprobs": lambda log_p: log_p * torch.nan},
        "teacher_logprobs must be .*not NaN",
    ),
    "elsewhere": ({"teacher_ids": lambda ids: ids.to("meta")}, "teacher_ids is on meta.*cpu"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_argument_is_named_with_value_and_remedy(make_problem, case):
    p = make_problem()
    ids, log_p = top_k(p, 5)
    arguments = {
        "student_hidden": p.student_hidden,
        "student_head": p.student_head,
        "teacher_ids": ids,
        "teacher_logprobs": log_p,
        "labels": p.labels,
    }
    sparse_distillation_loss(**arguments)
    change, message = BAD[case]
    for name, value in change.items():
        arguments[name] = value(arguments[name]) if callable(value) else value
    with pytest.raises(ValueError, match=message):
        sparse_distillation_loss(**arguments)
