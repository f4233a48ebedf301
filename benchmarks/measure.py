"""Measures of a loss: time in turn with two floors of matrix products, peak memory, and error
against float64.

The floors are the four products that no design can leave out, 2 * N * V * (3 * Hs + Ht) FLOP:
student logits, teacher logits, gradient of the student's hidden states, gradient of its head.

Shapes: N rows, C rows of a chunk of the student, D of the teacher, V vocabulary, H hidden size (Hs
student, Ht teacher).
"""

import ctypes
import math
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peers import Problem, Shape, make_problem
from torch import Tensor

from kd.losses import distillation_loss
from kd.losses.chunk_plan import ChunkPlan, even_parts, plan_chunks

Call = Callable[[], None]
Loss = Callable[[Problem], Tensor]

# Rows and columns of the problem on which errors are measured: its float64 logits fit, and take
# seconds on a CPU.
ERROR_ROWS = {"cpu": 256, "cuda": 2048}
ERROR_VOCAB_SIZE = 8192
# Left free when the bare floor takes the largest slices that fit.
SPARE_BYTES = 2**30


def forward_backward(loss: Loss, problem: Problem) -> Tensor:
    """One call for the loss and both gradients; the loss, detached.

    The incoming gradient is 1 / (2 * N), as where the global batch holds twice the rows: no peer
    may assume 1.
    """
    clear_gradients(problem)
    value = loss(problem)
    value.backward(torch.full_like(value, 0.5 / problem.labels_N.numel()))
    return value.detach()


def clear_gradients(problem: Problem) -> None:
    problem.student_hidden_NH.grad = problem.student_head_VH.grad = None


def num_flop(shape: Shape, num_tokens: int) -> int:
    """Of the four products: what every design is credited with, whatever it recomputes."""
    return (
        2
        * num_tokens
        * shape.vocab_size
        * (3 * shape.student_hidden_size + shape.teacher_hidden_size)
    )


def time_in_turn(
    calls: dict[str, Call],
    device: torch.device,
    *,
    seconds: float,
    min_rounds: int = 5,
    max_rounds: int = 100,
) -> dict[str, list[float]]:
    """Milliseconds of each call. A round calls each once, so that other load on the machine hits
    all alike.

    One round warms up, one estimates how many fit in `seconds`. On CUDA nothing waits until the
    last round is queued.
    """
    for _ in range(2):
        start = time.perf_counter()
        for call in calls.values():
            call()
        _synchronize(device)
        round_s = time.perf_counter() - start
    num_rounds = min(max_rounds, max(min_rounds, int(seconds / round_s)))
    marks: dict[str, list[tuple[Any, Any]]] = {name: [] for name in calls}
    for _ in range(num_rounds):
        for name, call in calls.items():
            start = _mark(device)
            call()
            marks[name].append((start, _mark(device)))
    _synchronize(device)
    return {name: [_elapsed_ms(*pair) for pair in pairs] for name, pairs in marks.items()}


def times_and_floors(
    call: Call,
    problem: Problem,
    shape: Shape,
    logits_dtype: torch.dtype,
    *,
    reserved_bytes: int,
    seconds: float,
) -> dict[str, Any]:
    """Time a call in turn with both floors, whose buffers leave `reserved_bytes` to it; `tflops`
    counts `num_flop`.
    """
    num_tokens, device = problem.labels_N.numel(), problem.labels_N.device
    plan = plan_chunks(shape.vocab_size, logits_dtype)
    planned = planned_floor(problem, plan, logits_dtype)
    bare_rows = rows_that_fit(problem, reserved_bytes)
    calls = {"measured": call, "bare": bare_floor(problem, bare_rows), "planned": planned}
    samples = time_in_turn(calls, device, seconds=seconds)
    times = {name: spread(values) for name, values in samples.items()}
    return {
        "num_rounds": len(samples["measured"]),
        "ms": times["measured"],
        "tflops": num_flop(shape, num_tokens) / times["measured"]["median"] / 1e9,
        "bare_floor_ms": times["bare"],
        "bare_floor_rows": bare_rows,
        "bare_floor_fraction": floor_fraction(samples["bare"], samples["measured"]),
        "planned_floor_ms": times["planned"],
        "planned_floor_rows": list(plan),
        "planned_floor_fraction": floor_fraction(samples["planned"], samples["measured"]),
    }


def spread(samples: list[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile."""
    p20, _, _, p80 = statistics.quantiles(samples, n=5, method="inclusive")
    return {"median": statistics.median(samples), "p20": p20, "p80": p80}


def floor_fraction(floor_ms: list[float], measured_ms: list[float]) -> float:
    """Median over rounds of floor / measured: 1 is a loss as fast as its products alone."""
    return statistics.median(
        floor / measured for floor, measured in zip(floor_ms, measured_ms, strict=True)
    )


def bare_floor(problem: Problem, slice_rows: int) -> Call:
    """The four products, each once over slices of `slice_rows`, which are all N rows wherever (N,
    V) fits.

    Inputs and outputs have the dtype of the problem, but float32 on a CPU: that has no fast bf16
    product. Each call takes new memory for both logits and both gradients, as every loss must: on a
    CPU the first touch of a page costs.
    """
    student_hidden_NH, student_head_VH, teacher_hidden_NH, teacher_head_VH = _operands(problem)
    num_rows = student_hidden_NH.shape[0]
    slice_rows = min(slice_rows, num_rows)

    def products() -> None:
        student_CV, teacher_CV = (
            student_hidden_NH.new_empty(slice_rows, student_head_VH.shape[0])
            for _ in ("student", "teacher")
        )
        grad_hidden_NH, grad_head_VH = (
            torch.empty_like(student_hidden_NH),
            torch.empty_like(student_head_VH),
        )
        for start in range(0, num_rows, slice_rows):
            rows = slice(start, start + slice_rows)
            hidden_CH = student_hidden_NH[rows]
            dlogits_CV = student_CV[: hidden_CH.shape[0]]
            torch.mm(
                teacher_hidden_NH[rows], teacher_head_VH.T, out=teacher_CV[: hidden_CH.shape[0]]
            )
            torch.mm(hidden_CH, student_head_VH.T, out=dlogits_CV)
            torch.mm(dlogits_CV, student_head_VH, out=grad_hidden_NH[rows])
            _accumulate(grad_head_VH, dlogits_CV.T, hidden_CH, is_first=start == 0)

    return products


def planned_floor(problem: Problem, plan: ChunkPlan, logits_dtype: torch.dtype) -> Call:
    """The four products at the plan's chunks: logits in `logits_dtype`, the head's gradient
    accumulated in fp32.

    The gradient of the logits is read in the inputs' dtype from rows that are as long as the
    logits' storage, where a row kernel leaves it; the hidden states' gradient is written in the
    inputs' dtype.
    """
    student_hidden_NH, student_head_VH, teacher_hidden_NH, teacher_head_VH = _operands(problem)
    num_rows, vocab_size = student_hidden_NH.shape[0], student_head_VH.shape[0]
    student_rows = min(plan.student_rows, num_rows)
    teacher_rows = min(plan.teacher_rows, student_rows)
    row_length = vocab_size * logits_dtype.itemsize // student_hidden_NH.dtype.itemsize
    dlogits_CV = student_hidden_NH.new_empty(student_rows, row_length).normal_()[:, :vocab_size]

    def products() -> None:
        student_CV = student_hidden_NH.new_empty(student_rows, vocab_size, dtype=logits_dtype)
        teacher_DV = student_hidden_NH.new_empty(teacher_rows, vocab_size, dtype=logits_dtype)
        grad_hidden_NH = torch.empty_like(student_hidden_NH)
        grad_head_VH = torch.empty_like(student_head_VH, dtype=torch.float32)
        for rows in even_parts(num_rows, plan.student_rows):
            hidden_CH, teacher_hidden_CH = student_hidden_NH[rows], teacher_hidden_NH[rows]
            num_chunk_rows = hidden_CH.shape[0]
            _mm(hidden_CH, student_head_VH.T, student_CV[:num_chunk_rows])
            for part in even_parts(num_chunk_rows, plan.teacher_rows):
                logits_DV = teacher_DV[: part.stop - part.start]
                _mm(teacher_hidden_CH[part], teacher_head_VH.T, logits_DV)
            chunk_CV, is_first = dlogits_CV[:num_chunk_rows], rows.start == 0
            _mm(chunk_CV, student_head_VH, grad_hidden_NH[rows])
            _accumulate(grad_head_VH, chunk_CV.T, hidden_CH, is_first=is_first)

    return products


def rows_that_fit(problem: Problem, reserved_bytes: int) -> int:
    """N if so many rows of logits fit beside `reserved_bytes` of the measured call, else N / 2, N /
    4, and so on.
    """
    device, dtype = problem.student_hidden_NH.device, _operand_dtype(problem)
    gradient_bytes = dtype.itemsize * (
        problem.student_hidden_NH.numel() + problem.student_head_VH.numel()
    )
    free_bytes = _free_bytes(device) - reserved_bytes - gradient_bytes - SPARE_BYTES
    rows = problem.labels_N.numel()
    while rows > 1 and rows * problem.student_head_VH.shape[0] * dtype.itemsize > free_bytes:
        rows = -(-rows // 2)
    return rows


def peak_of_call(call: Call, problem: Problem) -> int:
    """Bytes that a loss and its gradients take at most, after two calls that compile and make what
    libraries keep.
    """
    for _ in range(2):
        call()
    clear_gradients(problem)  # or those of the last call would count as resident
    return peak_bytes(call, problem.labels_N.device)


def peak_bytes(call: Call, device: torch.device) -> int:
    """Most memory that one call held beyond what was resident before: all of it, with gradients and
    selected rows.

    CUDA: what torch's allocator handed out. CPU: pages of this process, VmHWM of Linux.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        resident = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - resident
    # Or the call could reuse freed pages that still count as resident
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    resident = _proc_bytes("/proc/self/status", "VmRSS")
    call()
    return _proc_bytes("/proc/self/status", "VmHWM") - resident


def errors(
    loss: Loss,
    shape: Shape,
    num_tokens: int,
    divergence: str,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, dict[str, float | None]]:
    """Relative L2 errors of loss and gradients against float64 on the CPU, for a random and a
    nearly matched pair.

    On at most ERROR_ROWS rows and ERROR_VOCAB_SIZE columns. `kl` is KL(teacher || student) per row;
    None is not finite.
    """
    shape = Shape(
        shape.student_hidden_size,
        shape.teacher_hidden_size,
        min(shape.vocab_size, ERROR_VOCAB_SIZE),
    )
    num_tokens = min(num_tokens, ERROR_ROWS[device.type])
    results = {}
    for case in ("random", "matched"):
        problem = make_problem(
            shape,
            num_tokens,
            divergence,
            dtype=dtype,
            device=device,
            is_matched=case == "matched",
            seed=1,
        )
        value = forward_backward(loss, problem)
        expected = reference(problem)
        measured = (value, problem.student_hidden_NH.grad, problem.student_head_VH.grad)
        names = ("loss", "grad_hidden", "grad_head")
        results[case] = {
            "kl": reference_kl(problem),
            "num_tokens": num_tokens,
            "vocab_size": shape.vocab_size,
        } | {
            name: relative_error(got, want)
            for name, got, want in zip(names, measured, expected, strict=True)
        }
    return results


def reference(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradients of `kd.losses.reference` in float64 on the CPU, for the incoming gradient
    of the others.
    """
    double = _double(problem)
    value = forward_backward(lambda p: _reference_loss(p, p.divergence), double)
    return value, double.student_hidden_NH.grad, double.student_head_VH.grad


def reference_kl(problem: Problem) -> float:
    """KL(teacher || student) per row, in nats: says how far the pair is apart."""
    with torch.no_grad():
        return _reference_loss(_double(problem), "forward_kl").item() / problem.labels_N.numel()


def relative_error(measured: Tensor, expected: Tensor) -> float | None:
    """||measured - expected|| / ||expected||; None where it is not finite."""
    error = ((measured.detach().cpu().double() - expected).norm() / expected.norm()).item()
    return error if math.isfinite(error) else None


def _reference_loss(problem: Problem, divergence: str) -> Tensor:
    return distillation_loss(
        problem.student_hidden_NH,
        problem.student_head_VH,
        problem.teacher_hidden_NH,
        problem.teacher_head_VH,
        problem.labels_N,
        divergence=divergence,
        kd_weight=1.0,
        ce_weight=0.0,
        backend="reference",
    ).loss


def _double(problem: Problem) -> Problem:
    def widened(tensor: Tensor) -> Tensor:
        return tensor.detach().cpu().double()

    return Problem(
        widened(problem.student_hidden_NH).requires_grad_(),
        widened(problem.student_head_VH).requires_grad_(),
        widened(problem.teacher_hidden_NH),
        widened(problem.teacher_head_VH),
        problem.labels_N.cpu(),
        problem.row_index_N.cpu(),
        problem.divergence,
    )


def _operand_dtype(problem: Problem) -> torch.dtype:
    hidden_NH = problem.student_hidden_NH
    return hidden_NH.dtype if hidden_NH.is_cuda else torch.float32


def _operands(problem: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = _operand_dtype(problem)
    return (
        problem.student_hidden_NH.detach().to(dtype),
        problem.student_head_VH.detach().to(dtype),
        problem.teacher_hidden_NH.to(dtype),
        problem.teacher_head_VH.to(dtype),
    )


def _mm(a: Tensor, b: Tensor, out: Tensor) -> None:
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def _accumulate(total: Tensor, a: Tensor, b: Tensor, *, is_first: bool) -> None:
    if is_first:
        _mm(a, b, total)
    elif total.dtype == a.dtype:
        torch.addmm(total, a, b, out=total)
    else:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)


def _mark(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _elapsed_ms(start: Any, end: Any) -> float:
    return (end - start) * 1000 if isinstance(start, float) else start.elapsed_time(end)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    return _proc_bytes("/proc/meminfo", "MemAvailable")


def _proc_bytes(path: str, field: str) -> int:
    match = re.search(rf"^{field}:\s+(\d+) kB", Path(path).read_text(), re.MULTILINE)
    assert match, f"{path} has no {field}"
    return int(match[1]) * 1024
