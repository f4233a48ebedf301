"""What the chunked loss costs: products, memory, waits for the device, and what it keeps for
backward.
"""

import subprocess
import sys
import textwrap
import weakref
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from kd.losses import DIVERGENCES, Head, Objective, distillation_loss
from kd.losses.chunk_plan import ChunkPlan
from kd.losses.chunked import chunked_loss
from kd.losses.inputs import supervised_inputs
from kd.losses.row_functions import RowChunk, torch_rows

ROOT = Path(__file__).resolve().parents[2]


class MemoryMeter(TorchDispatchMode):
    """Elements of the largest tensor made while it is on, and bytes of all of them at their
    peak.
    """

    def __init__(self):
        super().__init__()
        self.live_bytes = self.peak_bytes = self.largest_elements = 0
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.largest_elements = max(self.largest_elements, tensor.numel())
                self._track(tensor.untyped_storage())
        return result

    def _track(self, storage):
        key, num_bytes = storage._cdata, storage.nbytes()
        if key not in self.seen:
            self.seen.add(key)
            self.live_bytes += num_bytes
            self.peak_bytes = max(self.peak_bytes, self.live_bytes)
            weakref.finalize(storage, self._forget, key, num_bytes)

    def _forget(self, key, num_bytes):
        self.seen.discard(key)
        self.live_bytes -= num_bytes


def forward_and_backward(problem, meter, **options):
    hidden, head = (
        problem.student_hidden.clone().requires_grad_(),
        problem.student_head.clone().requires_grad_(),
    )
    with meter:
        result = distillation_loss(
            hidden, head, problem.teacher_hidden, problem.teacher_head, problem.labels, **options
        )
        result.loss.backward()
    assert result.kd > 1
    return meter


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_no_tensor_larger_than_a_chunk_of_logits_is_made(make_problem, divergence):
    num_rows, vocab_size, chunk_size = 512, 400, 32
    problem = make_problem((num_rows,), (8, 12), (vocab_size, vocab_size), dtype=torch.float32)
    options = {"divergence": divergence, "temperature": 2.0, "student_softcap": 5.0}
    meter = forward_and_backward(problem, MemoryMeter(), chunk_size=chunk_size, **options)
    assert meter.largest_elements == chunk_size * vocab_size
    reference = forward_and_backward(problem, MemoryMeter(), backend="reference", **options)
    assert reference.largest_elements >= 500 * vocab_size


def test_logits_take_what_they_may(make_problem):
    problem = make_problem((512,), (8, 12), (400, 400), dtype=torch.float32)
    meter = forward_and_backward(problem, MemoryMeter(), logits_gib=4 * 400 * 45 / 2**30)
    assert meter.largest_elements == 40 * 400  # and the teacher has 5 rows


def test_peak_memory_grows_by_hidden_states_alone(make_problem):
    sizes = {
        "hidden_sizes": (8, 12),
        "vocab_sizes": (400, 400),
        "ignored": 0,
        "dtype": torch.float32,
    }
    peak = {}
    for num_rows in (512, 2048):
        problem = make_problem((num_rows,), **sizes)
        peak[num_rows] = forward_and_backward(problem, MemoryMeter(), chunk_size=32).peak_bytes
    # the student's gradient twice (computed, scaled), and numbers: labels, indices, weights, values
    bytes_of_a_row = 4 * 2 * 8 + 10 * 8
    assert peak[2048] - peak[512] <= (2048 - 512) * bytes_of_a_row < 0.2 * (2048 - 512) * 4 * 400


def test_logits_of_both_chunks_and_blocks_of_intermediates_are_all_that_lives(
    make_problem, monkeypatch
):
    monkeypatch.setattr("kd.losses.row_functions.CPU_BLOCK_ELEMENTS", 400)
    num_rows, vocab_size, chunk_size = 512, 400, 128
    problem = make_problem((num_rows,), (4, 4), (vocab_size, vocab_size), dtype=torch.float32)
    meter = forward_and_backward(problem, MemoryMeter(), chunk_size=chunk_size, divergence="jsd")
    logits_bytes = 4 * (chunk_size + chunk_size // 8) * vocab_size
    assert logits_bytes < meter.peak_bytes < 1.4 * logits_bytes


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_intermediates_of_a_block_are_gone_before_the_next(divergence, monkeypatch):
    monkeypatch.setattr("kd.losses.row_functions.CPU_BLOCK_ELEMENTS", 8 * 400)
    head, objective = Head(torch.empty(0), None, None, 1.0), Objective(divergence, temperature=2.0)
    peaks = []
    for num_rows in (8, 64):
        # of 64 rows both times, for a view counts as the whole of its storage
        logits, values = torch.randn(3, 64, 400), torch.ones(3, 64)
        labels, diagnostics = torch.zeros(64, dtype=torch.int64), torch.empty(64, 5)
        rows = RowChunk(*logits[:2], labels, *values, logits[2], diagnostics).part(slice(num_rows))
        meter = MemoryMeter()
        with meter:
            torch_rows(rows, objective, head, head)
        peaks.append(meter.peak_bytes)
    assert peaks[0] == peaks[1] > logits.nbytes + 4 * 8 * 400 * 4


@pytest.mark.parametrize(
    ("frozen_head", "needs_grad", "with_teacher", "student_products", "teacher_products"),
    [
        (False, True, True, 3, 1),
        (True, True, True, 2, 1),
        (False, False, True, 1, 1),
        (False, True, False, 3, 0),
    ],
)
def test_products_are_the_fewest_possible(
    make_problem, frozen_head, needs_grad, with_teacher, student_products, teacher_products
):
    p = make_problem(ignored=0, dtype=torch.float32)
    hidden, head = p.student_hidden.requires_grad_(), p.student_head.requires_grad_(not frozen_head)
    counter = FlopCounterMode(display=False)
    with torch.set_grad_enabled(needs_grad), counter:
        loss = distillation_loss(
            hidden,
            head,
            p.teacher_hidden,
            p.teacher_head,
            p.labels,
            kd_weight=0.5 * with_teacher,
            chunk_size=4,
        ).loss
        assert loss.requires_grad == needs_grad
        if needs_grad:
            loss.backward()
    assert counter.get_total_flops() == 2 * 13 * 31 * (student_products * 6 + teacher_products * 9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_with_row_index_nothing_reads_a_value_from_the_device(
    make_problem, divergence, dtype, monkeypatch
):
    """The meta device has no values: a branch on one, an item() or a nonzero() raises there.

    It knows the products of bf16 operands into fp32 that only CUDA runs, and so shows that dtypes
    fit.
    """
    monkeypatch.setattr("kd.losses.heads.operand", lambda tensor, _: tensor)
    hidden, head, teacher_hidden, teacher_head, labels, bias, _ = (
        tensor.to("meta") for tensor in vars(make_problem(dtype=dtype)).values()
    )
    learners = [tensor.requires_grad_() for tensor in (hidden, head, bias)]
    inputs = supervised_inputs(
        hidden,
        Head(head, bias, softcap=5.0, scale=0.5),
        teacher_hidden,
        Head(teacher_head, None, None, 1.0),
        labels,
        Objective(divergence, temperature=2.0),
        token_weights=torch.ones(13, device="meta"),
        row_index=torch.arange(11, device="meta"),
        ignore_index=-100,
        reduction="mean",
        vocab_size=30,
        logits_dtype=None,
    )
    result, rows = chunked_loss(inputs, ChunkPlan(4, 2), torch_rows, with_diagnostics=True)
    result.loss.backward()
    assert result.loss.dtype == result.kd.dtype == rows.forward_kl.dtype == torch.float32
    assert [(t.grad.shape, t.grad.dtype) for t in learners] == [(t.shape, dtype) for t in learners]


def test_heads_are_not_kept_for_backward(make_problem):
    """A head gathered for the forward may be released, and sharded again, before the backward."""
    p = make_problem()
    head = p.student_head.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        distillation_loss(p.student_hidden, head, p.teacher_hidden, p.teacher_head, p.labels)
    heads = {head.untyped_storage().data_ptr(), p.teacher_head.untyped_storage().data_ptr()}
    assert kept
    assert heads.isdisjoint(tensor.untyped_storage().data_ptr() for tensor in kept)


@pytest.mark.process
def test_resident_memory_stays_below_one_full_matrix_of_logits():
    script = """
        import torch
        from kd.losses import distillation_loss

        N, V, H = 4096, 4096, 16
        torch.manual_seed(0)
        hidden, head = torch.randn(N, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
        teacher_hidden, teacher_head = torch.randn(N, H), torch.randn(V, H)
        labels = torch.randint(V, (N,))

        def peak_after(rows, **options):
            distillation_loss(
                hidden[:rows], head, teacher_hidden[:rows], teacher_head, labels[:rows], **options
            ).loss.backward()
            # VmHWM and not ru_maxrss: the latter begins at what the parent process held when it
            # forked.
            (line,) = (line for line in open("/proc/self/status") if line.startswith("VmHWM"))
            return int(line.split()[1]) * 1024 / (4 * N * V)

        start = peak_after(64, backend="reference")
        chunked = peak_after(N, chunk_size=64)
        print(chunked - start, peak_after(N, backend="reference") - start)
    """
    output = subprocess.check_output(
        [sys.executable, "-c", textwrap.dedent(script)], cwd=ROOT, text=True
    )
    chunked, reference = map(float, output.split())
    assert chunked < 0.5
    assert reference > 4
