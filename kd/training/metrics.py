"""What a run measures: one JSON line per optimizer step, a progress bar, and peak memory."""

import contextlib
import json
import logging
import math
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from kd.files import parse_json, write_jsonl
from kd.runs.records import read_metrics
from kd.training.diagnostics import flatten

log = logging.getLogger(__name__)


# Of a run's time that may go by waiting for a disk before it is worth a word
WAITING_SHARE = 0.05
# Between two lines on progress in a log, where there is no terminal for a bar
LINE_SECONDS = 30.0


class StepLines:
    """A file with a line of JSON for a step, on rank 0.

    Steps are counted from 1, as checkpoints are. A run that was interrupted after its last
    checkpoint, `start_step`, repeats steps: their lines from before move to NAME.abandoned.jsonl. A
    full disk does not end a run here, on one rank of many: what could not be written is kept and
    tried again, and the next checkpoint says what is wrong on all ranks.
    """

    def __init__(self, path: Path, records: list[dict[str, Any]], *, start_step: int) -> None:
        """records: what is in the file."""
        repeated = [record for record in records if record["step"] > start_step]
        if repeated:
            write_jsonl(path.with_suffix(".abandoned.jsonl"), repeated)
        write_jsonl(path, [record for record in records if record["step"] <= start_step])
        self._file = path.open("ab", buffering=0)
        self._unwritten = b""

    def write(self, record: dict[str, Any]) -> None:
        self._unwritten += json.dumps(_finite(record), allow_nan=False).encode() + b"\n"
        self._write_what_fits()

    def close(self) -> None:
        self._write_what_fits()
        self._file.close()

    def _write_what_fits(self) -> None:
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:
            log.warning(
                "%s: %s; its last lines are kept and tried again", self._file.name, error.strerror
            )


class MetricsLog:
    """Rank 0's view of a run: appends records to metrics.jsonl, and tells of progress: by a bar on
    a terminal, by lines elsewhere.
    """

    def __init__(self, path: Path, *, start_step: int, total_steps: int) -> None:
        self._lines = StepLines(path, read_metrics(path), start_step=start_step)
        self._total_steps, self._next_line = total_steps, 0.0
        self._bar = tqdm(
            total=total_steps,
            initial=start_step,
            unit="step",
            dynamic_ncols=True,
            disable=not sys.stderr.isatty(),
        )

    def write(self, record: dict[str, Any]) -> None:
        self._lines.write(record)
        now, is_last = time.monotonic(), record["step"] == self._total_steps
        if self._bar.disable and (now >= self._next_line or is_last):
            self._next_line = now + LINE_SECONDS
            log.info(
                "step %d of %d: loss %.4f, lr %.1e, %.0f tokens/s",
                record["step"],
                self._total_steps,
                record["loss"],
                record["lr"],
                record["tokens_per_second"],
            )
        with contextlib.suppress(OSError):  # whoever watched may have gone, and ssh with it
            self._bar.set_postfix_str(
                f"loss {record['loss']:.4f} lr {record['lr']:.1e}", refresh=False
            )
            self._bar.update(1)

    def close(self) -> None:
        self._bar.close()
        self._lines.close()


class WallTime:
    """Where the time of a run goes since it started, in seconds: a step's own, and around it."""

    def __init__(self) -> None:
        self._seconds = {"steps": 0.0, "validation": 0.0, "checkpoints": 0.0}

    def add(self, what: str, seconds: float) -> None:
        self._seconds[what] += seconds

    @contextlib.contextmanager
    def spent_on(self, what: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.add(what, time.perf_counter() - started)

    def say_waits(self, seconds: float) -> None:
        """For a teacher's cache: a warning where the disk is what a run waits for."""
        share = seconds / (sum(self._seconds.values()) or 1.0)
        level = logging.WARNING if share > WAITING_SHARE else logging.INFO
        log.log(
            level,
            "%.1f s, %.1f%% of the time, went by waiting for teacher.cache: %s",
            seconds,
            100 * share,
            "a faster disk, or a kind with fewer bytes, would help"
            if share > WAITING_SHARE
            else "its disk keeps up",
        )

    def shares(self) -> dict[str, float]:
        """{"steps_share", "validation_share", "checkpoints_share"} of their sum."""
        total = sum(self._seconds.values()) or 1.0
        return {f"{what}_share": seconds / total for what, seconds in self._seconds.items()}

    def __str__(self) -> str:
        shares = zip(self._seconds, self.shares().values(), strict=True)
        return ", ".join(f"{share:.1%} {what}" for what, share in shares)


def _finite(value: Any) -> Any:
    """The record with null for what is not finite, at any depth: NaN is not JSON."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def send_to_monitor(monitor: Any, record: dict[str, Any]) -> None:
    """To whichever of TensorBoard, CSV and W&B the recipe switched on, through DeepSpeed's monitor.

    Scalars are named kd/NAME, and their places in nested records follow, as
    kd/diagnostics/by_section/cot/forward_kl.
    """
    if monitor.enabled:
        values = {
            name: value for name, value in record.items() if name not in ("format_version", "step")
        }
        scalars = flatten("kd", values)
        monitor.write_events([(name, value, record["step"]) for name, value in scalars])


def send_text(monitor: Any, name: str, text: str, step: int) -> None:
    """A text to TensorBoard and W&B, for which DeepSpeed's monitor has no way of its own."""
    if monitor.enabled and monitor.tb_monitor is not None:
        monitor.tb_monitor.summary_writer.add_text(f"kd/{name}", text, step)
    if monitor.enabled and monitor.wandb_monitor is not None:
        import wandb

        table = wandb.Table(columns=["step", "text"], data=[[step, text]])
        monitor.wandb_monitor.log({f"kd/{name}": table}, step=step)


def whole_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a file of StepLines; none where there is none. A last line that a crash tore
    is left out.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]
    return [parse_json(line, f"{path}: line {n}") for n, line in enumerate(lines, start=1)]


def peak_memory_gib(device: torch.device) -> float:
    """Most memory that this rank has held so far: of its GPU, or of its process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 2**30
