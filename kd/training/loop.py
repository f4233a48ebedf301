"""The training loop: read train() from top to bottom for the whole of a run, train_step() for one
optimizer step.
"""

import hashlib
import logging
import math
import os
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kd.data.collate import Batch
from kd.data.dataset import Data, load_data
from kd.data.loader import Loader, validation_batches
from kd.data.tokenizers import load_tokenizers
from kd.distributed.agreement import check_same_everywhere
from kd.distributed.interruption import Interruption
from kd.distributed.nodes import ranks_of_nodes
from kd.distributed.peers import gather_peers, watching
from kd.distributed.process_group import (
    all_reduce_sum,
    any_rank,
    find_ranks,
    init_distributed,
    on_rank_zero,
)
from kd.distributed.watchdog import Watchdog
from kd.engine.checkpoint import (
    choose_checkpoint,
    damage_of,
    load_checkpoint,
    prune,
    save_checkpoint,
    set_aside_after,
)
from kd.engine.ds_config import check_hpz, student_ds_config
from kd.engine.export import export_student
from kd.errors import Interrupted, UserError
from kd.files import write_json
from kd.logs import configure_logging
from kd.losses import resolve_backend
from kd.recipe import Recipe
from kd.runs.environment import facts_of_rank
from kd.runs.folder import INTERRUPTED, SUCCESS, open_run, record_data
from kd.teachers.live import Teacher
from kd.training.build import build_student, build_teacher
from kd.training.diagnostics import NUM_SUMS, flatten, region_sums, summarise
from kd.training.metrics import MetricsLog, peak_memory_gib
from kd.training.plan_report import PlanReport, plan_training
from kd.training.schedule import learning_rate

log = logging.getLogger(__name__)


class Progress(NamedTuple):
    """What the loop itself must remember between a checkpoint and its resumption."""

    step: int = 0
    num_skipped: int = 0
    best_step: int | None = None
    best_loss: float | None = None


class StepResult(NamedTuple):
    """Global means of one optimizer step over its supervised tokens, and whether the step was
    taken.
    """

    loss: float
    kd: float
    ce: float
    num_tokens: int
    num_input_tokens: int
    grad_norm: float
    skipped: bool
    diagnostics: dict[str, Any] | None


def train(recipe: Recipe, interruption: Interruption, resume: str | None = None) -> None:
    """Train the recipe's student and export it. resume: None (a new run), "auto", or the path of a
    checkpoint.

    Called by every rank. Raises UserError, on every rank, for whatever the user can put right;
    Interrupted when the interruption was requested on any rank and a checkpoint was written;
    LostPeer when another rank has gone.
    """
    find_ranks()
    with watching([]):
        timeout = timedelta(minutes=recipe.run.collective_timeout_minutes)
        check_same_everywhere(facts_of_rank(recipe), timeout)
        device = init_distributed(recipe.run.collective_timeout_minutes)
        peers = gather_peers()
    with watching(peers):
        _train(recipe, interruption, resume, device)


def _train(
    recipe: Recipe, interruption: Interruption, resume: str | None, device: torch.device
) -> None:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    configure_logging(rank)
    training, folder = recipe.training, recipe.run_dir
    student_config = student_ds_config(recipe, world_size, device.type)
    nodes = ranks_of_nodes()
    check_hpz(recipe, student_config, nodes)
    _check_loss_backend(recipe, device)
    on_rank_zero(lambda: open_run(recipe, resume))
    checkpoint = _choose_checkpoint(folder, resume)

    tokenizer, data = _load_data(recipe)
    on_rank_zero(lambda: record_data(folder, str(data.report), data_fingerprint(data)))
    loader = Loader(
        data.train,
        training.global_batch_size,
        training.micro_batch_size,
        recipe.run.seed,
        tokenizer.pad_token_id,
    )
    total_steps = training.max_steps or training.epochs * loader.steps_per_epoch
    teacher = build_teacher(recipe, device)
    model, student = build_student(recipe, student_config, device)
    torch.manual_seed(recipe.run.seed + rank)  # for models with dropout; a checkpoint restores it
    progress = Progress(**load_checkpoint(student, checkpoint)) if checkpoint else Progress()

    metrics = report = None
    if rank == 0:
        set_aside_after(folder / "checkpoints", progress.step)
        metrics = MetricsLog(
            folder / "metrics.jsonl", start_step=progress.step, total_steps=total_steps
        )
        plan = plan_training(recipe, loader, nodes)
        report = (
            PlanReport(plan, loader, teacher.model if teacher else None, student, device)
            if plan
            else None
        )
    with Watchdog(recipe.run.watchdog_minutes) as watchdog:
        for step in range(progress.step, total_steps):
            started = time.perf_counter()
            batches = loader.micro_batches(step, rank, world_size)
            rate = learning_rate(step, total_steps, training)
            result = train_step(student, teacher, batches, rate, device)
            progress = progress._replace(
                step=step + 1, num_skipped=progress.num_skipped + result.skipped
            )
            record = _record(
                progress.step,
                loader.steps_per_epoch,
                rate,
                result,
                time.perf_counter() - started,
                device,
            )
            record["flops"] = report.flops(step) if report else None
            stops = progress.num_skipped > training.skip_nonfinite
            ends = progress.step == total_steps
            validates = not stops and (progress.step % training.checkpoint_every == 0 or ends)
            watchdog.pat()
            if validates:
                record |= validate(student, teacher, data, recipe, tokenizer.pad_token_id, device)
                progress = _with_best(progress, record.get("val_loss"))
            if report:
                report.add(record)
            if metrics:
                metrics.write(record)
                _send_to_monitor(student, record)
            if stops:
                _stop_nonfinite(progress.step, result, batches, training.skip_nonfinite)
            interrupted = any_rank(interruption.is_requested(), device)
            if validates or interrupted:
                save_checkpoint(student, folder / "checkpoints", progress.step, progress._asdict())
                best = (progress.best_step, progress.best_loss)
                log.info("step %d saved; best: step %s, val_loss %s", progress.step, *best)
                if rank == 0:
                    prune(
                        folder / "checkpoints",
                        keep_last=training.keep_last,
                        best_step=progress.best_step,
                    )
            if interrupted and not ends:
                _leave_interrupted(folder, progress)
            watchdog.pat()
    if report:
        report.write()
    if metrics:
        metrics.close()
    _finish(student, model, tokenizer, folder, progress)


def train_step(
    student: Any, teacher: Teacher | None, batches: list[Batch], rate: float, device: torch.device
) -> StepResult:
    """One optimizer step over this rank's micro-batches of the global batch.

    Each micro-batch's loss is a sum over its tokens, divided once by the number of supervised
    tokens in the whole global batch: how tokens are spread over ranks and micro-batches does not
    change the gradient. DeepSpeed averages gradients over ranks, hence the factor world_size; its
    own division by accumulation steps is switched off.
    """
    (num_tokens,) = all_reduce_sum([sum(batch.num_supervised for batch in batches)], device)
    scale = dist.get_world_size() / max(num_tokens, 1.0)
    num_skipped_before = student.skipped_steps
    for group in student.optimizer.param_groups:
        group["lr"] = rate
    sums = torch.zeros(3 + NUM_SUMS, dtype=torch.float64, device=device)
    for batch in batches:
        loss, batch_sums = distill_batch(student, teacher, batch.to(device))
        sums += batch_sums
        # 1 for a finite loss; NaN for an infinite one, so that its gradient cannot pass for a
        # finite one.
        poison = 1.0 + 0.0 * loss.detach()
        student.backward(loss * (scale * poison), scale_wrt_gas=False)
        student.step()
    loss_sum, kd_sum, ce_sum, *regions, num_input_tokens = all_reduce_sum(
        [*sums.tolist(), sum(batch.num_input_tokens for batch in batches)], device
    )
    grad_norm = float(student.get_global_grad_norm() or 0.0)
    finite = (
        math.isfinite(loss_sum)
        and math.isfinite(grad_norm)
        and student.skipped_steps == num_skipped_before
    )
    tokens = max(num_tokens, 1.0)
    return StepResult(
        loss_sum / tokens,
        kd_sum / tokens,
        ce_sum / tokens,
        int(num_tokens),
        int(num_input_tokens),
        grad_norm,
        not finite,
        summarise(regions),
    )


def distill_batch(
    student: Any, teacher: Teacher | None, batch: Batch
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of one micro-batch on this rank, a sum over its supervised tokens, and all sums to
    be logged.

    These are loss, kd, ce and the region_sums: float64 (3 + NUM_SUMS,). Every rank must call it.
    """
    if teacher is None:
        loss, kd, ce, rows = student(batch.input_ids, batch.labels, batch.row_index)
    else:
        teacher_hidden = teacher.hidden_states(batch.input_ids)
        with teacher.head() as teacher_head:
            loss, kd, ce, rows = student(
                batch.input_ids, batch.labels, batch.row_index, teacher_hidden, teacher_head
            )
    return loss, torch.cat(
        [torch.stack([loss.detach(), kd, ce]).double(), region_sums(rows, batch.region_index)]
    )


@torch.no_grad()
def validate(
    student: Any,
    teacher: Teacher | None,
    data: Data,
    recipe: Recipe,
    pad_token_id: int,
    device: torch.device,
) -> dict[str, Any]:
    """Loss per supervised token of the validation set, under the training objective; empty without
    such a set.
    """
    if data.validation is None:
        return {}
    student.eval()
    sums, num_supervised = torch.zeros(3 + NUM_SUMS, dtype=torch.float64, device=device), 0
    batches = validation_batches(
        data.validation,
        recipe.training.micro_batch_size,
        dist.get_rank(),
        dist.get_world_size(),
        pad_token_id,
    )
    for batch in batches:
        sums += distill_batch(student, teacher, batch.to(device))[1]
        num_supervised += batch.num_supervised
    student.train()
    loss, kd, ce, *regions, num_tokens = all_reduce_sum([*sums.tolist(), num_supervised], device)
    means = {"val_loss": loss / num_tokens, "val_kd": kd / num_tokens, "val_ce": ce / num_tokens}
    return means | {"val_diagnostics": summarise(regions)}


def _load_data(recipe: Recipe) -> tuple[PreTrainedTokenizerBase, Data]:
    tokenizer = load_tokenizers(recipe)
    # One rank of each node first: it tokenises, unless that was done before; the others find its
    # cache.
    data = load_data(recipe, tokenizer) if os.environ["LOCAL_RANK"] == "0" else None
    dist.barrier()
    if data is None:
        data = load_data(recipe, tokenizer)
    log.info("%s", data.report)
    return tokenizer, data


def data_fingerprint(data: Data) -> str:
    """SHA-256 of which rows are trained and validated on, and of the length of their sections."""
    digest = hashlib.sha256()
    for examples in (data.train, data.validation):
        if examples is not None:
            digest.update(examples.row_N.tobytes() + examples.num_tokens_N3.tobytes())
    return digest.hexdigest()


def _check_loss_backend(recipe: Recipe, device: torch.device) -> None:
    """Before a model is loaded."""
    try:
        resolve_backend(recipe.loss.backend, device)
    except ValueError as error:
        raise UserError(f"loss.backend = {recipe.loss.backend!r}: {error}") from None


def _choose_checkpoint(folder: Path, resume: str | None) -> Path | None:
    if resume is None:
        return None
    path = choose_checkpoint(folder / "checkpoints", resume)
    if path is None:
        log.info("--resume auto: %s has no whole checkpoint, starting fresh", folder)
    else:
        log.info("resuming from %s", path)
    return path


def _with_best(progress: Progress, val_loss: float | None) -> Progress:
    if val_loss is None or not math.isfinite(val_loss):
        return progress
    if progress.best_loss is not None and progress.best_loss <= val_loss:
        return progress
    return progress._replace(best_step=progress.step, best_loss=val_loss)


def _stop_nonfinite(step: int, result: StepResult, batches: list[Batch], allowed: int) -> None:
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, [row + 1 for batch in batches for row in batch.ids])
    rows = ", ".join(str(row) for part in parts for row in part)
    raise UserError(
        f"step {step}: loss {result.loss} and gradient norm {result.grad_norm} are not both "
        f"finite, and "
        f"training.skip_nonfinite = {allowed} allows no more such steps. Rows of the batch, "
        f"counted from 1: {rows}. "
        "Look at these rows; continue with --resume auto and a higher training.skip_nonfinite, or "
        "begin a new run "
        "(--set run.name=NAME) with a lower training.learning_rate"
    )


def _leave_interrupted(folder: Path, progress: Progress) -> None:
    if dist.get_rank() == 0:
        write_json(folder / INTERRUPTED, progress._asdict())
        log.info("asked to stop: step %d is saved, continue with --resume auto", progress.step)
    dist.barrier()
    raise Interrupted


def _record(
    step: int,
    steps_per_epoch: int,
    rate: float,
    result: StepResult,
    seconds: float,
    device: torch.device,
) -> dict[str, Any]:
    return {
        "step": step,
        "epoch": step / steps_per_epoch,
        "loss": result.loss,
        "kd": result.kd,
        "ce": result.ce,
        "lr": rate,
        "grad_norm": result.grad_norm,
        "num_tokens": result.num_tokens,
        "num_input_tokens": result.num_input_tokens,
        "tokens_per_second": result.num_input_tokens / seconds,
        "step_ms": seconds * 1000,
        "peak_memory_gib": peak_memory_gib(device),
        "skipped": result.skipped,
        "diagnostics": result.diagnostics,
    }


def _send_to_monitor(student: Any, record: dict[str, Any]) -> None:
    """To whichever of TensorBoard, CSV and W&B the recipe switched on, through DeepSpeed's
    monitor.
    """
    if student.monitor.enabled:
        scalars = [
            scalar
            for key, value in record.items()
            if key != "step"
            for scalar in flatten(f"kd/{key}", value)
        ]
        student.monitor.write_events([(name, value, record["step"]) for name, value in scalars])


def _finish(
    student: Any,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    progress: Progress,
) -> None:
    """Export the last and the best student, then mark the run as a success."""
    exports = folder / "export"
    export_student(student, model, tokenizer, exports / "last")
    best = folder / "checkpoints" / f"step_{progress.best_step}"
    damage = None
    if progress.best_step not in (None, progress.step):
        damage = damage_of(best)
        if damage is None:
            load_checkpoint(student, best)
    if damage is None:
        export_student(student, model, tokenizer, exports / "best")
    elif dist.get_rank() == 0:
        log.warning(
            "the best checkpoint, %s, is damaged (%s): export/last is all there is", best, damage
        )
    if dist.get_rank() == 0:
        write_json(folder / SUCCESS, progress._asdict())
        log.info("done: %s", exports)
    dist.barrier()
