"""What only CUDA runs: bf16 products that return fp32, and the caching allocator's own measure of memory."""

from dataclasses import replace

import pytest
import torch

from kd.losses import DIVERGENCES, distillation_loss

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

BACKENDS = ["torch"]


def on_gpu(problem):
    return replace(problem, **{name: tensor.cuda() for name, tensor in vars(problem).items()})


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_on_cuda_errs_at_most_twice_as_much_as_eager(make_problem, evaluate, backend, divergence):
    problem = on_gpu(make_problem((256,), (64, 96), (4000, 4100), dtype=torch.bfloat16))
    options = {"divergence": divergence, "temperature": 2.0}
    exact = evaluate(problem.to(torch.float64), backend="reference", **options)
    eager = evaluate(problem, backend="reference", logits_dtype=torch.bfloat16, **options)
    actual = evaluate(problem, backend=backend, chunk_size=100, **options)
    for gradient, eager_gradient, truth in zip(
        actual.gradients[:2], eager.gradients[:2], exact.gradients[:2], strict=True
    ):
        assert (gradient - truth).norm() <= 2 * (eager_gradient - truth).norm()
    torch.testing.assert_close(actual.result.loss.double(), exact.result.loss, rtol=1e-4, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_peak_memory_on_cuda_is_logits_of_a_chunk_and_the_head_gradient(make_problem, backend):
    num_rows, vocab_size, chunk_size = 16384, 32000, 1024
    p = on_gpu(make_problem((num_rows,), (64, 64), (vocab_size, vocab_size), ignored=0, dtype=torch.bfloat16))
    hidden, head, row_index = p.student_hidden, p.student_head, torch.arange(num_rows, device="cuda")
    hidden.requires_grad_()
    head.requires_grad_()
    torch.cuda.reset_peak_memory_stats()
    resident = torch.cuda.memory_allocated()
    distillation_loss(
        hidden,
        head,
        p.teacher_hidden,
        p.teacher_head,
        p.labels,
        chunk_size=chunk_size,
        row_index=row_index,
        backend=backend,
    ).loss.backward()
    peak = torch.cuda.max_memory_allocated() - resident
    assert peak < 2 * 4 * chunk_size * vocab_size + 12 * 4 * 2**23 < 0.5 * 4 * num_rows * vocab_size


@pytest.mark.parametrize("backend", BACKENDS)
def test_with_row_index_the_host_never_waits(make_problem, backend):
    p = on_gpu(make_problem((13,), (8, 16), (32, 32), ignored=0, dtype=torch.bfloat16))
    head, row_index = p.student_head.requires_grad_(), torch.arange(13, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        distillation_loss(
            p.student_hidden,
            head,
            p.teacher_hidden,
            p.teacher_head,
            p.labels,
            row_index=row_index,
            chunk_size=4,
            backend=backend,
        ).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert head.grad.norm() > 0
