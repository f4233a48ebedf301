"""What a run measures: one JSON line for each optimizer step, and peak memory."""

import contextlib
import json
import logging
import math
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from kd.files import parse_json, write_jsonl
from kd.runs.records import read_metrics
from kd.training.progress_lines import ProgressLines

log = logging.getLogger(__name__)


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
    """Rank 0's view of a run: appends records to metrics.jsonl, and shows progress: by a bar on a
    terminal, by lines elsewhere.
    """

    def __init__(
        self, path: Path, *, start_step: int, total_steps: int, progress: ProgressLines
    ) -> None:
        self._lines = StepLines(path, read_metrics(path), start_step=start_step)
        self.progress = progress
        self._bar = tqdm(
            total=total_steps,
            initial=start_step,
            unit="step",
            dynamic_ncols=True,
            disable=not sys.stderr.isatty(),
        )

    def write(self, record: dict[str, Any]) -> None:
        self._lines.write(record)
        if self._bar.disable:
            self.progress.add(record)
        with contextlib.suppress(OSError):  # whoever watched may have gone, and ssh with it
            self._bar.set_postfix_str(
                f"loss {record['loss']:.4f} lr {record['lr']:.1e}", refresh=False
            )
            self._bar.update(1)

    def close(self) -> None:
        self._bar.close()
        self._lines.close()


def _finite(value: Any) -> Any:
    """The record with null for what is not finite, at any depth: NaN is not JSON."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
