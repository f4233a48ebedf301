"""The loss measured on each device present: `pytest tests/profile --profile`.

One table per device; a Chrome trace and a row of profile.csv for each case, in build/profile or
`--profile-output`.
"""

import csv
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from loss import provenance
from measure import (
    bare_floor,
    errors,
    floor_fraction,
    forward_backward,
    peak_of_call,
    time_in_turn,
    times_and_floors,
)
from peers import Shape, make_problem, ours
from rich.console import Console
from rich.table import Column, Table

pytestmark = pytest.mark.profile

MEASURE_SECONDS = {"cpu": 10.0, "cuda": 3.0}
CPU_SHAPE = Shape(384, 768, 32000)
QWEN = Shape(1536, 3584, 151936)


@dataclass(frozen=True)
class Case:
    device: str
    shape: Shape
    num_tokens: int
    dtype: torch.dtype
    backend: str

    @property
    def name(self) -> str:
        shape = self.shape
        sizes = f"{shape.student_hidden_size}-{shape.teacher_hidden_size}-{shape.vocab_size}"
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.device}-{sizes}-{self.num_tokens}-{dtype}-{self.backend}"


CPU_CASES = [
    Case("cpu", CPU_SHAPE, 512, torch.float32, "torch"),
    Case("cpu", Shape(64, 96, 4000), 128, torch.bfloat16, "torch"),
]
CUDA_CASES = [
    Case("cuda", QWEN, num_tokens, torch.bfloat16, backend)
    for num_tokens in (4096, 8192)
    for backend in ("triton", "torch")
]
CASES = CUDA_CASES + CPU_CASES if torch.cuda.is_available() else CPU_CASES


@pytest.fixture(autouse=True, scope="module")
def is_asked_for(request: pytest.FixtureRequest) -> None:
    if not request.config.getoption("--profile"):
        pytest.skip("needs --profile")


@pytest.fixture(scope="module")
def rows(request: pytest.FixtureRequest) -> Iterator[list[dict[str, Any]]]:
    """Rows of profile.csv, one from each case; printed as a table per device when the last case is
    through.
    """
    measured: list[dict[str, Any]] = []
    yield measured
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        for hardware in dict.fromkeys(row["hardware"] for row in measured):
            Console(width=180).print(
                "", table([row for row in measured if row["hardware"] == hardware])
            )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_case_is_measured_traced_and_written(case, rows, request):
    folder = request.config.getoption("--profile-output")
    with threads_for(case.device):
        row = measured_row(case)
    rows.append(row)
    append_csv(folder / "profile.csv", row)
    trace = folder / f"{case.name}.json"
    write_trace(trace, case)

    assert row["bare_floor_fraction"] > 0
    assert row["planned_floor_fraction"] > 0
    assert row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
    assert row["peak_gib"] > 0
    # gradients are rounded to the dtype of the inputs: to 2 ** -9 where they are bfloat16
    limit = 1e-4 if case.dtype == torch.float32 else 0.02
    assert max(value for name, value in row.items() if name.endswith("_error")) < limit
    with (folder / "profile.csv").open(newline="", encoding="utf-8") as file:
        last = list(csv.DictReader(file))[-1]
    assert last == {name: "" if value is None else str(value) for name, value in row.items()}
    assert any(
        "mm" in event.get("name", "") for event in json.loads(trace.read_text())["traceEvents"]
    )


def test_on_the_cpu_the_loss_takes_at_most_a_quarter_more_than_its_products():
    """Target: 1.25 times the bare products at (384, 768, 32000), N = 512, fp32, forward_kl without
    CE, one thread.
    """
    problem, call = problem_and_call(CPU_CASES[0])
    calls = {"measured": call, "bare": bare_floor(problem, 512)}
    with threads_for("cpu"):
        samples = time_in_turn(calls, torch.device("cpu"), seconds=40, min_rounds=15)
    assert 1 / floor_fraction(samples["bare"], samples["measured"]) <= 1.25


@contextmanager
def threads_for(device: str) -> Iterator[None]:
    """One thread of torch where the CPU is measured: what a core does, whatever the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if device == "cpu" else before)
    yield
    torch.set_num_threads(before)


def problem_and_call(case: Case) -> tuple[Any, Any]:
    problem = make_problem(
        case.shape,
        case.num_tokens,
        "forward_kl",
        dtype=case.dtype,
        device=torch.device(case.device),
    )
    return problem, partial(forward_backward, partial(ours, backend=case.backend), problem)


def measured_row(case: Case) -> dict[str, Any]:
    device = torch.device(case.device)
    problem, call = problem_and_call(case)
    peak = peak_of_call(call, problem)
    times = times_and_floors(
        call,
        problem,
        case.shape,
        torch.float32,
        reserved_bytes=peak,
        seconds=MEASURE_SECONDS[case.device],
    )
    loss = partial(ours, backend=case.backend)
    error_cases = errors(
        loss, case.shape, case.num_tokens, "forward_kl", dtype=case.dtype, device=device
    )
    place = provenance(case.device)
    return {
        "case": case.name,
        "median_ms": times["ms"]["median"],
        "p20_ms": times["ms"]["p20"],
        "p80_ms": times["ms"]["p80"],
        "num_rounds": times["num_rounds"],
        "bare_floor_fraction": times["bare_floor_fraction"],
        "planned_floor_fraction": times["planned_floor_fraction"],
        "peak_gib": peak / 2**30,
        **{
            f"{pair}_{name}_error": error_cases[pair][name]
            for pair in ("random", "matched")
            for name in ("loss", "grad_hidden", "grad_head")
        },
        "hardware": place["hardware"],
        **place["versions"],
        "commit": place["commit"],
    }


def append_csv(path: Path, row: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(row))
        if is_new:
            writer.writeheader()
        writer.writerow(row)


def write_trace(path: Path, case: Case) -> None:
    """A Chrome trace of one forward and backward, after another that warms up."""
    _, call = problem_and_call(case)
    call()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if case.device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profiler:
        call()
        if case.device == "cuda":
            torch.cuda.synchronize()
    profiler.export_chrome_trace(str(path))


def table(rows: list[dict[str, Any]]) -> Table:
    names = (
        "case",
        "median ms (p20-p80)",
        "of bare",
        "of planned",
        "peak GiB",
        "random pair",
        "matched pair",
    )
    where = f"{rows[0]['hardware']}, commit {rows[0]['commit'] or 'unknown'}"
    columns = [Column(name, no_wrap=True) for name in names]
    result = Table(
        *columns, title=f"{where}; errors of loss, hidden states' gradient, head's gradient"
    )
    for row in rows:
        result.add_row(
            row["case"],
            f"{row['median_ms']:.4g} ({row['p20_ms']:.4g}-{row['p80_ms']:.4g})",
            f"{row['bare_floor_fraction']:.0%}",
            f"{row['planned_floor_fraction']:.0%}",
            f"{row['peak_gib']:.3f}",
            *(
                ", ".join(
                    f"{row[f'{pair}_{name}_error']:.1e}"
                    for name in ("loss", "grad_hidden", "grad_head")
                )
                for pair in ("random", "matched")
            ),
        )
    return result
