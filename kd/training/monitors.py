"""What else a run's scalars go to, as [monitor] says: TensorBoard, CSV and Weights & Biases.

All have the same names, in groups that open as such: scalars(). DeepSpeed's own monitor is left
out: it counts steps in micro-batches, after which W&B takes no step of a lower number.
"""

import contextlib
import csv
import importlib.util
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from kd.distributed.process_group import on_rank_zero
from kd.engine.checkpoint import read_manifest
from kd.errors import UserError
from kd.files import write_text
from kd.logs import labelled
from kd.recipe import Recipe
from kd.training.decisions import Progress
from kd.training.diagnostics import MEASURES, flatten

log = logging.getLogger(__name__)

FINISH_SECONDS = 60.0  # for W&B to send what it has, while all ranks wait
LOSSES = {
    "loss": "total",
    "kd": "kd",
    "ce": "ce",
    "val_loss": "val_total",
    "val_kd": "val_kd",
    "val_ce": "val_ce",
}
ACCURACY = ("accuracy", "unclosed_fraction", "mean_response_tokens")
SPEED = (
    "tokens_per_second",
    "step_ms",
    "peak_memory_gib",
    "teacher_wait_ms",
    "flops",
    "flops_spared",
    "flops_of_sampling",
)


def scalars(record: dict[str, Any]) -> dict[str, float]:
    """The numbers of a record of metrics.jsonl, by names whose first part is their group.

    loss/                    total, kd, ce, and val_total, val_kd, val_ce of a validation
    divergence/              forward_kl and so on, over all supervised tokens; val_forward_kl
    divergence_by_section/   forward_kl_cot; divergence_by_position/forward_kl_eighth_1, of the
                             whole, untruncated trace; divergence_by_source/forward_kl_NAME
    rollouts/, accuracy/     as in metrics.jsonl; accuracy/ci95_low and ci95_high
    speed/                   tokens a second, time, memory, FLOPs
    training/                the rest: lr, grad_norm, epoch, skipped, numbers of tokens
    """
    return dict(_scalars(record))


def _scalars(record: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for key, value in record.items():
        if key in LOSSES:
            yield f"loss/{LOSSES[key]}", value
        elif key in ("diagnostics", "val_diagnostics"):
            yield from _divergences(value, key.removesuffix("diagnostics")) if value else ()
        elif key == "accuracy":
            low, high = value["ci95"]
            yield from flatten(key, {"ci95_low": low, "ci95_high": high})
            yield from flatten(key, {name: value[name] for name in ACCURACY})
        elif key == "rollouts":
            yield from flatten(key, value)
        elif key not in ("format_version", "step"):
            yield from flatten(f"{'speed' if key in SPEED else 'training'}/{key}", value)


def _divergences(diagnostics: dict[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    eighths = enumerate(diagnostics["by_position"], start=1)
    parts = {
        "section": diagnostics["by_section"],
        "position": {f"eighth_{number}": means for number, means in eighths},
        "source": diagnostics.get("by_source", {}),
    }
    for measure in MEASURES:
        yield f"divergence/{prefix}{measure}", diagnostics[measure]
        for kind, means_of in parts.items():
            for name, means in means_of.items():
                if means is not None:
                    # TensorBoard's cards show what follows the last slash
                    part = f"{prefix}{measure}_{name.replace('/', '_')}"
                    yield f"divergence_by_{kind}/{part}", means[measure]


class Monitor(Protocol):
    """One place that scalars go to."""

    def write(self, values: dict[str, float], step: int) -> None: ...
    def text(self, name: str, text: str, step: int) -> None: ...
    def close(self) -> None: ...


def open_monitors(recipe: Recipe, checkpoint: Path | None) -> "Monitors | None":
    """The recipe's, on rank 0; None on the others. checkpoint: from which the run is resumed.

    Collective: every rank must call this. Raises UserError for one that is not installed or does
    not start.
    """
    opened = []

    def open_them() -> None:
        step = read_manifest(checkpoint, Progress).step if checkpoint else 0
        opened.append(Monitors(recipe, start_step=step))

    on_rank_zero(open_them)
    return opened[0] if opened else None


class Monitors:
    """Those of a recipe, on rank 0. None of them ends a run: what one cannot take is a warning."""

    def __init__(self, recipe: Recipe, *, start_step: int) -> None:
        """start_step: what follows it is repeated by a run that is resumed."""
        section, folder = recipe.monitor, recipe.run_dir / "monitor"
        self._monitors: list[Monitor] = []
        if section.tensorboard:
            self._monitors.append(TensorBoardMonitor(folder, start_step))
        if section.csv:
            self._monitors.append(CsvMonitor(folder / "scalars.csv", start_step))
        if section.wandb_project:
            try:
                self._monitors.append(WandbMonitor(recipe, section.wandb_project, folder))
            except UserError as error:
                if not start_step:
                    raise
                log.warning("%s. This run continues without it", error)

    def write(self, record: dict[str, Any]) -> None:
        """record: of metrics.jsonl."""
        if self._monitors:
            values, step = scalars(record), record["step"]
            self._tell(lambda monitor: monitor.write(values, step))

    def text(self, name: str, text: str, step: int) -> None:
        """For TensorBoard and W&B, after the scalars of the same step."""
        self._tell(lambda monitor: monitor.text(name, text, step))

    def close(self) -> None:
        self._tell(lambda monitor: monitor.close())
        self._monitors.clear()

    def _tell(self, call: Callable[[Monitor], None]) -> None:
        for monitor in list(self._monitors):
            try:
                call(monitor)
            except OSError as error:  # a full disk, or a signal that ended W&B's process too
                name = type(monitor).__name__
                log.warning("%s: %s; it gets no more of this run", name, error.strerror or error)
                self._monitors.remove(monitor)
                with contextlib.suppress(OSError):
                    monitor.close()


class TensorBoardMonitor:
    def __init__(self, folder: Path, start_step: int) -> None:
        _check_installed("monitor.tensorboard", "tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        # TensorBoard hides what an earlier start wrote of steps that are repeated.
        self._writer = SummaryWriter(str(folder), purge_step=start_step + 1)

    def write(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def text(self, name: str, text: str, step: int) -> None:
        self._writer.add_text(name, text, step)

    def close(self) -> None:
        self._writer.close()


class CsvMonitor:
    """One file of rows (step, name, value)."""

    def __init__(self, path: Path, start_step: int) -> None:
        path.parent.mkdir(exist_ok=True)
        text = path.read_bytes().decode(errors="replace") if path.exists() else ""
        parts = [line.partition(",") for line in text.split("\n")[1:-1]]
        # A crash of the machine may leave lines that are none
        kept = ["".join(p) for p in parts if p[0].isdecimal() and int(p[0]) <= start_step]
        write_text(path, "\n".join(["step,name,value", *kept, ""]))
        self._file = path.open("a", newline="", encoding="utf-8")
        self._rows = csv.writer(self._file, lineterminator="\n")

    def write(self, values: dict[str, float], step: int) -> None:
        self._rows.writerows((step, name, value) for name, value in values.items())
        self._file.flush()

    def text(self, name: str, text: str, step: int) -> None:
        """A text is no scalar."""

    def close(self) -> None:
        self._file.close()


class WandbMonitor:
    """A run of W&B for each start of a run, in a group of the run's name, with its recipe."""

    def __init__(self, recipe: Recipe, project: str, folder: Path) -> None:
        """folder: in which W&B has its own files, also where WANDB_MODE=offline."""
        _check_installed("monitor.wandb_project", "wandb")
        import wandb

        folder.mkdir(exist_ok=True)
        try:
            self._run = wandb.init(
                project=project,
                group=recipe.run.name,
                name=recipe.run.name,
                dir=folder,
                config=recipe.model_dump(mode="json"),
                settings=wandb.Settings(silent=True, finish_timeout=FINISH_SECONDS),
            )
        except (wandb.Error, OSError, ValueError) as error:  # ValueError: a setting of W&B's own
            raise UserError(
                f"monitor.wandb_project = {project!r}: W&B does not start: {error}. Run `wandb "
                "login`, set WANDB_MODE=offline, or leave monitor.wandb_project out"
            ) from None
        self._end = wandb.teardown
        self._table = wandb.Table
        if self._run.disabled:
            where = "disabled (WANDB_MODE)"
        elif self._run.offline:
            where = f"offline; `wandb sync {Path(self._run.dir).parent}` sends it"
        else:
            where = str(self._run.url)
        log.info("%s", labelled("wandb", where))

    def write(self, values: dict[str, float], step: int) -> None:
        self._run.log(values, step=step)

    def text(self, name: str, text: str, step: int) -> None:
        table = self._table(columns=["step", "text"], data=[[step, text]])
        self._run.log({name: table}, step=step)

    def close(self) -> None:
        """No process of W&B is left after it."""
        try:
            self._run.finish()
        finally:
            self._end(0)


def _check_installed(key: str, package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise UserError(f'{key} needs {package}: install the extra "track", or leave it out')
