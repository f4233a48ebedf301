"""The fused loss against its peers: time against two floors, peak memory and error, as JSON and
Markdown.

    python benchmarks/loss.py --device cpu|cuda [--peers all] [--shapes 1536,3584,151936 ...]
                              [--num-tokens 8192 ...] [--divergences forward_kl ...] [--seconds
                              1500] [--output DIR]
    python benchmarks/loss.py --render benchmarks/results/loss_cpu.json

A cell is one peer on one shape, and a process of its own; cells are measured in order of importance
and written one by one. Cells that the output has for the same commit, hardware, versions and
settings are skipped, so that a second call continues where `--seconds` ended the first; of the
others the output keeps the latest. A peer that fails is a row.
"""

import argparse
import hashlib
import importlib.util
import json
import math
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from measure import errors, forward_backward, peak_of_call, times_and_floors
from peers import BETA, PEERS, Peer, Shape, make_problem

from kd.distributed.device import use_device
from kd.files import write_json, write_text
from kd.runs.environment import environment

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SHAPES = {
    "cuda": [Shape(1536, 3584, 151936), Shape(2560, 4096, 151936), Shape(2048, 4096, 128256)],
    "cpu": [Shape(384, 768, 32000)],
}
NUM_TOKENS = {"cuda": [8192, 32768, 4096, 65536, 1024], "cpu": [512]}
DTYPE = {"cuda": "bfloat16", "cpu": "float32"}
# Of the first shape and divergence these peers, at the first two numbers of tokens, come before all
# others.
FIRST_PEERS = ("ours", "ours_bf16_logits", "liger_compiled", "trl", "eager")
PACKAGES = ("torch", "triton", "liger-kernel", "trl")
# A process that has not answered by then hangs.
CELL_LIMIT_S = 900

RENDER_COMMAND = "python benchmarks/loss.py --render FILE"
LEGEND = """\
Forward and backward, T = 1, no cross-entropy, all rows supervised, gradients of the student's
hidden states and head for an incoming gradient that is not 1. TFLOP/s count 2 * N * V * (3 * Hs +
Ht) for everyone. Floors are the four matrix products alone, timed in turn with the loss: bare,
each once over all rows, or over slices where a row says so; planned, at the chunks and in the
logits' dtype of this project's plan, with an fp32 gradient of the head. Peak is memory beyond
what was resident before the call. Errors are relative L2 errors of loss, gradient of hidden
states and gradient of the head against float64 on the CPU."""
HEADER = """\
| peer | tokens | ms (p20-p80) | TFLOP/s | of bare floor | of planned floor | peak GiB \
| errors, random pair | errors, matched pair | commit |
|---|---|---|---|---|---|---|---|---|---|"""


@dataclass(frozen=True)
class Cell:
    """What one process measures; num_threads is torch's, None where it chooses."""

    peer: str
    divergence: str
    shape: Shape
    num_tokens: int
    dtype: str
    device: str
    num_threads: int | None
    measure_seconds: float


def main() -> None:
    args = parse_arguments()
    if args.cell:
        print(json.dumps(measure(args.cell)))
    elif args.render:
        write_text(
            args.render.with_suffix(".md"),
            markdown(json.loads(args.render.read_text(encoding="utf-8"))),
        )
    else:
        benchmark(args)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure the fused loss and its peers.")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument(
        "--peers", nargs="+", choices=("all", *PEERS), default=["all"], metavar="PEER"
    )
    parser.add_argument(
        "--shapes", nargs="+", type=_shape, metavar="HS,HT,V", help="hidden sizes and vocabulary"
    )
    parser.add_argument("--num-tokens", nargs="+", type=_positive, metavar="N")
    parser.add_argument(
        "--divergences", nargs="+", choices=tuple(BETA), default=list(BETA), metavar="NAME"
    )
    parser.add_argument(
        "--seconds", type=_positive, help="stop after this long; without it, measure every cell"
    )
    parser.add_argument(
        "--measure-seconds",
        type=_seconds,
        help="timed part of a cell; default 20 on the CPU, else 3",
    )
    parser.add_argument(
        "--threads", type=_positive, help="torch's threads; default 1 on the CPU, else torch's own"
    )
    parser.add_argument(
        "--commit", help="of the code, in a plain copy of a checkout; default KD_COMMIT"
    )
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument(
        "--render", type=_file, metavar="FILE", help="write the table of a JSON file beside it"
    )
    parser.add_argument("--cell", type=_cell, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: cuda, but torch sees no CUDA device; use --device cpu")
    return args


def benchmark(args: argparse.Namespace) -> None:
    """Measure the cells that the output lacks, and write JSON and Markdown after each."""
    deadline = None if args.seconds is None else time.monotonic() + args.seconds
    where = provenance(args.device, args.commit)
    path = args.output / f"loss_{_slug(where['hardware']) if args.device == 'cuda' else 'cpu'}.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    command = f"python benchmarks/loss.py {' '.join(sys.argv[1:])}".strip()
    header = {"command": command, "environment": environment() | {"commit": where["commit"]}}
    cells = ordered_cells(args)
    for number, cell in enumerate(cells, start=1):
        identity = asdict(cell) | where
        if any(_has(row, identity) for row in rows):
            continue
        result = run_cell(cell, deadline)
        if result is None:
            print(
                f"{args.seconds} s are over: {len(cells) - number + 1} of {len(cells)} cells not "
                "reached",
                flush=True,
            )
            break
        rows = [row for row in rows if not _has(row, asdict(cell))] + [identity | result]
        write_json(path, header | {"rows": rows})
        write_text(path.with_suffix(".md"), markdown(header | {"rows": rows}))
        print(
            f"[{number}/{len(cells)}] {_title(identity)}: {cell.peer}: {_outcome(result)}",
            flush=True,
        )


def ordered_cells(args: argparse.Namespace) -> list[Cell]:
    """All cells that the arguments ask for, most important first; arguments are in order of
    importance as given.
    """
    peers = list(PEERS) if "all" in args.peers else args.peers
    shapes, num_tokens = (
        args.shapes or SHAPES[args.device],
        args.num_tokens or NUM_TOKENS[args.device],
    )
    num_threads = args.threads or (1 if args.device == "cpu" else None)
    seconds = args.measure_seconds or (20.0 if args.device == "cpu" else 3.0)
    cells = [
        Cell(peer, divergence, shape, tokens, DTYPE[args.device], args.device, num_threads, seconds)
        for shape in shapes
        for divergence in args.divergences
        for tokens in num_tokens
        for peer in peers
    ]

    def is_first(cell: Cell) -> bool:
        is_main = cell.shape == shapes[0] and cell.divergence == args.divergences[0]
        return is_main and cell.num_tokens in num_tokens[:2] and cell.peer in FIRST_PEERS

    return sorted(cells, key=is_first, reverse=True)  # stable: the order above holds within


def run_cell(cell: Cell, deadline: float | None) -> dict[str, Any] | None:
    """The row of a cell, measured in a process of its own; None if the deadline came first.

    A row that was not measured says why in its `status`, in one line.
    """
    reason = inapplicable(PEERS[cell.peer], cell.device)
    if reason:
        return {"status": reason}
    limit_s = CELL_LIMIT_S if deadline is None else min(CELL_LIMIT_S, deadline - time.monotonic())
    if limit_s <= 0:
        return None
    threads = {"OMP_NUM_THREADS": str(cell.num_threads)} if cell.num_threads else {}
    process = subprocess.Popen(
        cell_command(cell),
        cwd=ROOT,
        env=os.environ | threads,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # so that its compiler's processes end with it
    )
    try:
        stdout, stderr = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        return (
            {"status": f"failed: no result after {CELL_LIMIT_S} s"}
            if limit_s == CELL_LIMIT_S
            else None
        )
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    if process.returncode == 0:
        return json.loads(stdout.strip().splitlines()[-1])
    return {"status": _failure(process.returncode, stderr)}


def cell_command(cell: Cell) -> list[str]:
    return [sys.executable, str(Path(__file__).resolve()), "--cell", json.dumps(asdict(cell))]


def inapplicable(peer: Peer, device: str) -> str | None:
    """Why a peer cannot be measured here, or None."""
    if device not in peer.devices:
        return f"not applicable: needs {' or '.join(peer.devices)}"
    if peer.package and importlib.util.find_spec(peer.package) is None:
        return f"not installed: {peer.package}; it is in the extra 'bench'"
    return None


def measure(cell: Cell) -> dict[str, Any]:
    """The row of a cell, measured in this process: memory alone first, then time beside the floors,
    then error.
    """
    if cell.num_threads:
        torch.set_num_threads(cell.num_threads)
    peer, device, dtype = PEERS[cell.peer], torch.device(cell.device, 0), getattr(torch, cell.dtype)
    use_device(device)  # as training does, for every peer
    row: dict[str, Any] = {"status": "measured"}
    try:
        problem = make_problem(
            cell.shape, cell.num_tokens, cell.divergence, dtype=dtype, device=device
        )
        call = partial(forward_backward, peer.loss, problem)
        peak = peak_of_call(call, problem)
    except torch.OutOfMemoryError:
        return {"status": "out of memory"}
    row["peak_gib"] = peak / 2**30
    try:
        row |= times_and_floors(
            call,
            problem,
            cell.shape,
            peer.logits_dtype,
            reserved_bytes=peak,
            seconds=cell.measure_seconds,
        )
    except torch.OutOfMemoryError:
        return row | {"status": "out of memory beside the buffers of the floors"}
    del problem, call  # room for the next ones
    row["errors"] = errors(
        peer.loss, cell.shape, cell.num_tokens, cell.divergence, dtype=dtype, device=device
    )
    return row


def markdown(results: dict[str, Any]) -> str:
    """The table of a results file: a section for each shape and divergence; made from `results`
    alone.
    """
    rows = results["rows"]
    lines = [f"Made from the JSON file beside this one by `{RENDER_COMMAND}`.", ""]
    for hardware, versions in dict.fromkeys((row["hardware"], _versions(row)) for row in rows):
        lines.append(f"Hardware: {hardware}. Versions: {versions}.")
    lines += ["", LEGEND]
    for title in dict.fromkeys(map(_title, rows)):
        section = [row for row in rows if _title(row) == title]
        section.sort(key=lambda row: (row["num_tokens"], list(PEERS).index(row["peer"])))
        lines += ["", f"## {title}", "", HEADER]
        lines += [_table_row(row) for row in section if row["status"] == "measured"]
        lines += ["", *_notes(section)]
    return "\n".join(lines) + "\n"


def _table_row(row: dict[str, Any]) -> str:
    cells = [
        row["peer"],
        str(row["num_tokens"]),
        "{median:.4g} ({p20:.4g}-{p80:.4g})".format(**row["ms"]),
        f"{row['tflops']:.3g}",
        f"{row['bare_floor_fraction']:.0%}",
        f"{row['planned_floor_fraction']:.0%}",
        f"{row['peak_gib']:.2f}",
        *(_error_cell(row["errors"][case]) for case in ("random", "matched")),
        (row["commit"] or "unknown")[:7],
    ]
    return f"| {' | '.join(cells)} |"


def _error_cell(case: dict[str, float | None]) -> str:
    values = (case[name] for name in ("loss", "grad_hidden", "grad_head"))
    return ", ".join("not finite" if value is None else f"{value:.1e}" for value in values)


def _notes(section: list[dict[str, Any]]) -> Iterator[str]:
    """How far apart teacher and student were, which rows have a bare floor in slices, and which
    were not measured.
    """
    yield from dict.fromkeys(_pairs(row["errors"]) for row in section if "errors" in row)
    for row in section:
        name = f"- {row['peer']}, {row['num_tokens']} tokens"
        if row.get("bare_floor_rows", row["num_tokens"]) < row["num_tokens"]:
            yield f"{name}: bare floor in slices of {row['bare_floor_rows']} rows"
        if row["status"] != "measured":
            yield f"{name}: {row['status']}"


def _pairs(case_errors: dict[str, dict[str, Any]]) -> str:
    sizes = "{num_tokens} rows, {vocab_size} columns".format(**case_errors["random"])
    kls = ", ".join(f"{case} pair {pair['kl']:.3g}" for case, pair in case_errors.items())
    return f"- errors on {sizes}; KL(teacher, student) per row in nats: {kls}"


def _title(row: dict[str, Any]) -> str:
    threads = "" if row["num_threads"] is None else f", torch threads: {row['num_threads']}"
    sizes = "Hs {student_hidden_size}, Ht {teacher_hidden_size}, V {vocab_size}".format(
        **row["shape"]
    )
    return f"{row['divergence']}, {sizes}, {row['dtype']}{threads}"


def _versions(row: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} {version or 'not installed'}" for name, version in row["versions"].items()
    )


def _outcome(result: dict[str, Any]) -> str:
    if result["status"] != "measured":
        return result["status"]
    return (
        f"{result['ms']['median']:.4g} ms, {result['bare_floor_fraction']:.0%} of bare, "
        f"{result['planned_floor_fraction']:.0%} of planned, {result['peak_gib']:.2f} GiB"
    )


def provenance(device: str, commit: str | None = None) -> dict[str, Any]:
    """What a row was measured with: commit, hardware, versions of the packages that matter."""
    return {
        "commit": commit or code_commit(),
        "hardware": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def code_commit() -> str | None:
    """The checkout's commit, with "+" and a digest of the changes when code differs from it;
    results are no code.

    KD_COMMIT names it in a plain copy of a checkout, which has no git to ask.
    """
    commit = environment()["commit"]
    if commit is None or not commit.endswith("+"):
        return commit
    diff = ["git", "diff", "HEAD", "--", ".", ":(exclude)benchmarks/results"]
    changes = subprocess.run(diff, cwd=ROOT, capture_output=True, check=True).stdout
    return commit + hashlib.sha256(changes).hexdigest()[:8] if changes else commit.removesuffix("+")


def _failure(returncode: int, stderr: str) -> str:
    """One line for a process that failed: its last line on stderr, or that memory ran out."""
    last = (stderr.strip().splitlines() or ["no message"])[-1]
    if (
        returncode == -signal.SIGKILL
        or "can't allocate memory" in last
        or last.startswith("MemoryError")
    ):
        return "out of memory"
    return f"failed with exit status {returncode}: {last[:200]}"


def _has(row: dict[str, Any], fields: dict[str, Any]) -> bool:
    return all(row.get(name) == value for name, value in fields.items())


def _cpu_name() -> str:
    match = re.search(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return f"{match[1] if match else platform.machine()}, {os.cpu_count()} CPUs"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def _shape(text: str) -> Shape:
    sizes = text.split(",")
    if len(sizes) != 3:
        raise argparse.ArgumentTypeError(
            f"{text!r} must be three sizes HS,HT,V, such as 1536,3584,151936"
        )
    return Shape(*map(_positive, sizes))


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 1")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number of seconds above 0")
    return seconds


def _file(text: str) -> Path:
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(
            f"{text!r} is no file; give the JSON that a measurement wrote"
        )
    return Path(text)


def _cell(text: str) -> Cell:
    fields = json.loads(text)
    return Cell(**fields | {"shape": Shape(**fields["shape"])})


if __name__ == "__main__":
    main()
