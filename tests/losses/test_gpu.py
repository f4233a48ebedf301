"""What only CUDA runs: the compiled kernel, bf16 products that return fp32, the host that never
waits, and memory.
"""

from dataclasses import replace

import pytest
import torch
from test_distillation import CASES, OPTIONS, assert_same
from test_precision import nearly_matched, relative_error

from kd.distributed.device import use_device
from kd.losses import DIVERGENCES, distillation_loss, sparse_distillation_loss

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

BACKENDS = ["torch", "triton"]


def on_gpu(problem):
    return replace(problem, **{name: tensor.cuda() for name, tensor in vars(problem).items()})


def options_on_gpu(options):
    return {
        name: value.cuda() if isinstance(value, torch.Tensor) else value
        for name, value in options.items()
    }


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_values_and_gradients_equal_the_reference(make_problem, evaluate, divergence, case):
    shapes, options = CASES[case]
    problem = on_gpu(make_problem(**shapes))
    options = options_on_gpu(OPTIONS | {"divergence": divergence} | options)
    assert_same(
        evaluate(problem, backend="triton", **options),
        evaluate(problem, backend="reference", **options),
    )


@pytest.mark.parametrize("vocab_size", [2048, 4099, 10000])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_diagnostics_and_gradients_over_many_tiles_equal_those_in_float64(
    make_problem, divergence, vocab_size
):
    p = on_gpu(make_problem((300,), (32, 48), (vocab_size, vocab_size + 64), dtype=torch.float32))
    results = []
    for problem, backend in ((p.to(torch.float64), "reference"), (p, "triton")):
        hidden, head = (
            t.clone().requires_grad_() for t in (problem.student_hidden, problem.student_head)
        )
        result, diagnostics = distillation_loss(
            hidden,
            head,
            problem.teacher_hidden,
            problem.teacher_head,
            problem.labels,
            divergence=divergence,
            temperature=2.0,
            chunk_size=64,
            backend=backend,
            return_diagnostics=True,
        )
        result.loss.backward()
        results.append((result.loss.detach(), torch.stack(diagnostics), hidden.grad, head.grad))
    for actual, exact in zip(results[1], results[0], strict=True):
        assert relative_error(actual, exact) < 1e-5


@pytest.mark.parametrize("match", ["random", "nearly matched"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_errs_little_more_than_eager_that_widens_its_products(
    make_problem, evaluate, backend, divergence, match
):
    """Eager: full logits from bf16 products widened to fp32, and bf16 dlogits, since autograd
    rounds them so.
    """
    problem = on_gpu(make_problem((256,), (64, 64), (4000, 4000), dtype=torch.bfloat16))
    if match == "nearly matched":
        problem = nearly_matched(problem)
    options = {"divergence": divergence, "kd_weight": 1.0, "ce_weight": 0.0}
    exact = evaluate(problem.to(torch.float64), backend="reference", **options)
    eager = _eager_gradients(problem, divergence)
    actual = evaluate(problem, backend=backend, chunk_size=100, **options)
    for gradient, eager_gradient, truth in zip(
        actual.gradients[:2], eager, exact.gradients[:2], strict=True
    ):
        assert relative_error(gradient, truth) <= 1.5 * relative_error(eager_gradient, truth)
    torch.testing.assert_close(actual.result.loss.double(), exact.result.loss, rtol=1e-4, atol=0)


@pytest.fixture
def as_in_training():
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction
    use_device(torch.device("cuda", torch.cuda.current_device()))
    yield
    matmul.allow_bf16_reduced_precision_reduction = before


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_over_a_real_vocabulary_are_summed_in_float32(
    make_problem, evaluate, as_in_training, backend
):
    p = make_problem((256,), (64, 64), (151936, 151936), dtype=torch.bfloat16)
    # small logits, so that all of the vocabulary takes part in the sums
    p = replace(p, student_hidden=p.student_hidden / 8, teacher_hidden=p.teacher_hidden / 8)
    problem, options = on_gpu(p), {"kd_weight": 1.0, "ce_weight": 0.0}
    exact = evaluate(problem.to(torch.float64), backend="reference", **options)
    actual = evaluate(problem, backend=backend, chunk_size=100, **options)
    for gradient, truth in zip(actual.gradients[:2], exact.gradients[:2], strict=True):
        # dlogits and the gradient are each rounded to bfloat16 once
        assert relative_error(gradient, truth) < 4e-3


def _eager_gradients(problem, divergence):
    from kd.losses import Objective
    from kd.losses.reference import kd_rows

    hidden, head = (
        t.clone().requires_grad_() for t in (problem.student_hidden, problem.student_head)
    )
    keep = problem.labels != -100
    student = (hidden[keep] @ head.T).float()
    teacher = (problem.teacher_hidden[keep] @ problem.teacher_head.T).float()
    kd_rows(student, teacher, Objective(divergence)).sum().backward()
    return hidden.grad, head.grad


def peak_bytes_of(hidden, head, *others, **options):
    """Most memory beyond what is resident, of a second call: the first makes what libraries
    keep.
    """
    for _ in range(2):
        hidden.grad = head.grad = None
        torch.cuda.reset_peak_memory_stats()
        resident = torch.cuda.memory_allocated()
        distillation_loss(hidden, head, *others, **options).loss.backward()
    return torch.cuda.max_memory_allocated() - resident


def test_peak_memory_of_a_long_batch_of_qwen_is_at_most_3_6_gb():
    sizes, num_rows, vocab_size = (1536, 3584), 32768, 151936
    (hidden, head), teacher = (
        [
            torch.randn(rows, size, dtype=torch.bfloat16, device="cuda") / 8
            for rows in (num_rows, vocab_size)
        ]
        for size in sizes
    )
    labels, row_index = (
        torch.zeros(num_rows, dtype=torch.int64, device="cuda"),
        torch.arange(num_rows, device="cuda"),
    )
    learners = (hidden.requires_grad_(), head.requires_grad_())
    assert peak_bytes_of(*learners, *teacher, labels, ce_weight=0.0, row_index=row_index) <= 3.6e9


@pytest.mark.parametrize("backend", BACKENDS)
def test_peak_memory_is_logits_of_the_chunks_and_gradients(make_problem, backend):
    num_rows, vocab_size, chunk_size = 16384, 32000, 1024
    p = on_gpu(
        make_problem(
            (num_rows,), (64, 64), (vocab_size, vocab_size), ignored=0, dtype=torch.bfloat16
        )
    )
    hidden, head, row_index = (
        p.student_hidden,
        p.student_head,
        torch.arange(num_rows, device="cuda"),
    )
    hidden.requires_grad_()
    head.requires_grad_()
    options = {"chunk_size": chunk_size, "row_index": row_index, "backend": backend}
    peak = peak_bytes_of(hidden, head, p.teacher_hidden, p.teacher_head, p.labels, **options)
    logits = 4 * (chunk_size + chunk_size // 8) * vocab_size
    gradients = 2 * 2 * num_rows * 64 + 2 * 4 * vocab_size * 64
    intermediates = 12 * 4 * 2**23 if backend == "torch" else 2**22
    assert peak < logits + gradients + intermediates < 0.35 * 4 * num_rows * vocab_size


@pytest.mark.parametrize("backend", BACKENDS)
def test_with_row_index_the_host_never_waits_and_nothing_is_compiled_twice(make_problem, backend):
    from kd.losses.triton_kernel import row_kernel

    problems = [
        on_gpu(make_problem((num_rows,), (8, 16), (3000, 3000), ignored=0, dtype=torch.bfloat16))
        for num_rows in (13, 1, 64, 77)
    ]
    indices = [torch.arange(len(p.labels), device="cuda") for p in problems]
    counts = []
    for number, (p, row_index) in enumerate(zip(problems, indices, strict=True)):
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if number else "default")  # the first may compile
        try:
            result, _ = distillation_loss(
                p.student_hidden.requires_grad_(),
                p.student_head.requires_grad_(),
                p.teacher_hidden,
                p.teacher_head,
                p.labels,
                row_index=row_index,
                chunk_size=5,
                backend=backend,
                return_diagnostics=True,
            )
            result.loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert p.student_head.grad.norm() > 0
        counts.append(len(row_kernel.device_caches[torch.cuda.current_device()][0]))
    assert len(set(counts)) == 1


def test_auto_is_triton(make_problem, evaluate):
    problem = on_gpu(make_problem((64,), (16, 16), (3000, 3000), dtype=torch.bfloat16))
    automatic, triton = evaluate(problem), evaluate(problem, backend="triton")
    assert torch.equal(automatic.result.loss, triton.result.loss)
    assert torch.equal(automatic.gradients[0], triton.gradients[0])


def test_sparse_teacher_with_row_index_never_waits(make_problem):
    p = on_gpu(make_problem((64,), (16, 16), (3000, 3000), ignored=0, dtype=torch.bfloat16))
    log_p, ids = (p.teacher_hidden @ p.teacher_head.T).float().log_softmax(-1).topk(20)
    head, row_index = p.student_head.requires_grad_(), torch.arange(64, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        sparse_distillation_loss(
            p.student_hidden, head, ids, log_p, p.labels, row_index=row_index
        ).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert head.grad.norm() > 0
