"""A training run from start to end: read train() from top to bottom; kd.training.decisions has its
loop, kd.training.step one step of it.
"""

import contextlib
import logging
import time
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from kd.constants import FORMAT_VERSION
from kd.data.collate import Batch
from kd.data.dataset import Data, Examples
from kd.data.fingerprints import data_fingerprints
from kd.data.loader import Loader, check_fills_a_batch, validation_batches
from kd.data.tokenizers import load_tokenizers
from kd.distributed.device import memory_gib
from kd.distributed.interruption import Interruption
from kd.distributed.layout import Layout
from kd.distributed.nodes import size_to_plan
from kd.distributed.peers import gather_peers, watching
from kd.distributed.process_group import (
    any_rank,
    barrier,
    find_ranks,
    gather_objects,
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
from kd.engine.ds_config import check_hpz, student_ds_config, teacher_ds_config
from kd.engine.engine import check_ds_config
from kd.engine.export import set_generation_config
from kd.errors import Interrupted, NothingToLearn, UserError
from kd.files import write_json, write_text
from kd.logs import configure_logging
from kd.losses import resolve_backend
from kd.models.model_folder import check_data_ids, check_models
from kd.models.student import Student
from kd.plan.gpus import find_site
from kd.plan.lengths import batch_shape
from kd.plan.placement import settle
from kd.recipe import Recipe
from kd.rollouts.rollouts import RolloutFigures, Rollouts
from kd.runs.folder import (
    INTERRUPTED,
    NOTHING_TO_LEARN,
    SUCCESS,
    as_begun,
    open_run,
    record_data,
)
from kd.runs.shared_folder import check_shared
from kd.teachers.cached import CachedTeacher
from kd.teachers.live import LiveTeacher
from kd.training.build import (
    build_rollouts,
    build_selection,
    build_student,
    build_teacher,
    choose_layout,
    gathers_whole,
)
from kd.training.decisions import Progress, run_steps
from kd.training.first_lines import divergence_name, say, say_how, say_where
from kd.training.meeting import load_data_by_node, meet
from kd.training.metrics import MetricsLog, StepLines, peak_memory_gib, whole_lines
from kd.training.monitors import Monitors, open_monitors
from kd.training.plan_report import PlanReport, plan_training
from kd.training.progress_lines import ProgressLines, WallTime, step_of
from kd.training.schedule import learning_rate
from kd.training.selection import Selection
from kd.training.step import StepResult, Validation, train_step, validate

log = logging.getLogger(__name__)


def train(recipe: Recipe, interruption: Interruption, resume: str | None = None) -> None:
    """Train the recipe's student and export it.

    resume: None (a new run), "auto", or the path of a checkpoint.

    Collective: every rank must call this. Raises UserError, on every rank, for whatever the user
    can put right; Interrupted when the interruption was requested on any rank and a checkpoint was
    written; LostPeer when another rank has gone.
    """
    find_ranks()
    with watching([]):
        layout = meet(recipe)
        peers = gather_peers()
        interruption.arm()
    with watching(peers):
        configure_logging(layout.rank)
        say_where(recipe, layout)
        recipe = _without_autos(recipe, layout)
        ds_config = student_ds_config(recipe, layout.data_parallel_size, layout.device.type)
        check_ds_config(ds_config, recipe.deepspeed.student)
        if recipe.teacher:
            check_ds_config(teacher_ds_config(recipe), recipe.deepspeed.teacher)
        check_hpz(recipe, ds_config, layout.nodes)
        _check_loss_backend(recipe, layout.device)
        num_embedded = on_rank_zero(lambda: check_models(recipe))
        on_rank_zero(lambda: open_run(recipe, resume))
        check_shared(f"run.output_dir = {recipe.run.output_dir!r}", recipe.run_dir, layout)
        checkpoint = _choose_checkpoint(recipe.run_dir, resume)

        say("data", f"reading; tokenised rows are kept in {recipe.data.cache_dir}")
        tokenizer, data = _load_data(recipe, layout)
        on_rank_zero(lambda: check_data_ids(data, tokenizer, num_embedded))
        check_fills_a_batch(data.train, recipe.training.global_batch_size)
        on_rank_zero(lambda: record_data(recipe.run_dir, str(data.report), data_fingerprints(data)))
        monitors = open_monitors(recipe, checkpoint)
        teacher = build_teacher(recipe, data, tokenizer, layout)
        student = build_student(recipe, ds_config, layout)
        shape = batch_shape(recipe, choose_layout(recipe, student, teacher))
        loader = Loader(data.train, shape, recipe.run.seed, tokenizer.pad_token_id)
        say_how(recipe, layout, shape, student, teacher)
        set_generation_config(student.model, tokenizer)
        torch.manual_seed(recipe.run.seed + layout.rank)  # for dropout; a checkpoint restores it
        progress = Progress()
        if checkpoint:
            progress = load_checkpoint(student.engine, checkpoint, Progress)

        whole = gathers_whole(recipe, layout)
        rollouts = build_rollouts(recipe, loader, student, teacher, tokenizer, layout, whole=whole)
        selection = build_selection(recipe, student, tokenizer, layout, whole=whole)
        run = TrainingRun(
            recipe,
            layout,
            student,
            teacher,
            rollouts,
            selection,
            tokenizer,
            loader,
            data.validation,
            monitors,
            interruption,
            progress,
        )
        # However the run ends, W&B gets the last steps: closing sends them
        with contextlib.closing(monitors) if monitors else contextlib.nullcontext():
            with run.watchdog:
                progress = run_steps(run, progress, run.total_steps, recipe.training)
            run.finish(progress)


class TrainingRun:
    """The RunActions that kd.training.decisions directs: models, data, and where results go."""

    def __init__(
        self,
        recipe: Recipe,
        layout: Layout,
        student: Student,
        teacher: LiveTeacher | CachedTeacher | None,
        rollouts: Rollouts | None,
        selection: Selection | None,
        tokenizer: PreTrainedTokenizerFast,
        loader: Loader,
        validation: Examples | None,
        monitors: Monitors | None,
        interruption: Interruption,
        start: Progress,
    ) -> None:
        self.recipe, self.layout = recipe, layout
        self.student, self.teacher, self.tokenizer = student, teacher, tokenizer
        self.rollouts, self.selection = rollouts, selection
        self.loader, self.validation = loader, validation
        self.monitors, self.interruption = monitors, interruption
        self.watchdog = Watchdog(recipe.run.watchdog_minutes)
        training, folder = recipe.training, recipe.run_dir
        self.total_steps = training.max_steps or training.epochs * loader.steps_per_epoch
        self.checkpoints = folder / "checkpoints"
        self.metrics: MetricsLog | None = None
        self.rollout_lines: StepLines | None = None
        self.report: PlanReport | None = None
        self.wall_time = WallTime()
        self._batches: list[Batch] = []  # of the step at work
        self._record: dict[str, Any] = {}  # of the step just taken
        if layout.rank == 0:
            set_aside_after(self.checkpoints, start.step)
            self.metrics = MetricsLog(
                folder / "metrics.jsonl",
                start_step=start.step,
                total_steps=self.total_steps,
                progress=ProgressLines(
                    self.wall_time,
                    total_steps=self.total_steps,
                    every_seconds=recipe.run.log_seconds,
                    divergence=divergence_name(recipe),
                ),
            )
            if rollouts:
                path = folder / "rollouts.jsonl"
                self.rollout_lines = StepLines(path, whole_lines(path), start_step=start.step)
            plan = plan_training(recipe, loader, layout.nodes)
            if plan:
                weights = teacher.weights if teacher else []
                self.report = PlanReport(plan, loader, weights, student.engine, layout)

    def take_step(self, step: int) -> StepResult:
        """Optimizer step `step`, counted from 0; in files steps are counted from 1."""
        started = time.perf_counter()
        rate, figures = learning_rate(step, self.total_steps, self.recipe.training), None
        with self.wall_time.spent_on("data"):
            self._batches = self.loader.micro_batches(step, self.layout)
        if self.rollouts:
            sampled, figures = self.rollouts.of_step(step)
            self._batches += sampled
            self.wall_time.add("sampling", figures.seconds)
        cached = self.teacher if isinstance(self.teacher, CachedTeacher) else None
        waited = cached.waited_seconds if cached else 0.0
        if cached and step + 1 < self.total_steps:  # while this step computes
            with self.wall_time.spent_on("data"):
                cached.read_ahead(self.loader.micro_batches(step + 1, self.layout))
        result = train_step(self.student, self.teacher, self._batches, rate, self.layout)
        seconds = time.perf_counter() - started
        self.wall_time.add("steps", seconds)
        self.wall_time.add("cache", cached.waited_seconds - waited if cached else 0.0)
        if not result.num_supervised_tokens:
            log.warning(
                "step %d: nothing to learn from: no sampled response has a token in "
                "data.loss_sections; raise rollout.max_new_tokens, or widen loss_sections",
                step + 1,
            )
        self._record = {
            "format_version": FORMAT_VERSION,
            "step": step + 1,
            "epoch": (step + 1) / self.loader.steps_per_epoch,
            "loss": result.loss,
            "kd": result.kd,
            "ce": result.ce,
            "lr": rate,
            "grad_norm": result.grad_norm,
            "num_supervised_tokens": result.num_supervised_tokens,
            "num_input_tokens": result.num_input_tokens,
            "tokens_per_second": result.num_input_tokens / seconds,
            "step_ms": seconds * 1000,
            "peak_memory_gib": peak_memory_gib(self.layout.device),
            "skipped": result.skipped,
            "teacher_wait_ms": (cached.waited_seconds - waited) * 1000 if cached else None,
            "diagnostics": result.diagnostics,
            "rollouts": figures.as_record(seconds) if figures else None,
            **self._flops(step, figures),
        }
        self.watchdog.pat()
        return result

    def _flops(self, step: int, figures: RolloutFigures | None) -> dict[str, float | None]:
        """Of a step, by formula; None where no plan could be made."""
        if self.report is None:
            return dict.fromkeys(("flops", "flops_spared", "flops_of_sampling"))
        return self.report.flops(step, figures.lengths if figures else None)

    def validate(self) -> Validation | None:
        """None without a validation set, and when the run was interrupted meanwhile."""
        if self.validation is None:
            return None
        batches = validation_batches(
            self.validation,
            self.loader.shape,
            self.layout,
            self.tokenizer.pad_token_id,
        )
        with self.wall_time.spent_on("validation"):
            return validate(self.student, self.teacher, batches, self.layout, self.is_interrupted)

    def evaluate(self) -> float | None:
        """The student's accuracy on training.selection_path."""
        if self.selection is None:
            return None
        with self.wall_time.spent_on("validation"):
            summary = self.selection.measure()
        self._record["accuracy"] = {
            "accuracy": summary.accuracy,
            "ci95": list(summary.ci95),
            "num_problems": summary.num_problems,
            "unclosed_fraction": summary.unclosed_fraction,
            "mean_response_tokens": summary.mean_response_tokens,
        }
        log.info(
            "%s  accuracy %.3f (95%% %.3f-%.3f) on %d problems, %.0f%% unclosed",
            step_of(self._record["step"], self.total_steps),
            summary.accuracy,
            *summary.ci95,
            summary.num_problems,
            100 * summary.unclosed_fraction,
        )
        self.watchdog.pat()
        return summary.accuracy

    def record(self, validation: Validation | None) -> None:
        """Rank 0 writes the line of the step just taken, and sends it to the monitors."""
        if self.metrics is not None:
            with self.wall_time.spent_on("metrics"):
                self._write(self.metrics, validation)

    def _write(self, metrics: MetricsLog, validation: Validation | None) -> None:
        record = dict(self._record)
        if validation is not None:
            record |= {f"val_{name}": value for name, value in validation._asdict().items()}
        for name in ("diagnostics", "val_diagnostics"):
            if (found := record.get(name)) and "by_source" in found:
                names = [table.name for table in self.recipe.data.tables]
                names += ["rollouts"] if len(found["by_source"]) > len(names) else []
                record[name] = found | {
                    "by_source": dict(zip(names, found["by_source"], strict=True))
                }
        if self.report:
            self.report.add(record)
        metrics.write(record)
        if validation is not None:
            metrics.progress.add_validation(record)
        if self.monitors:
            self.monitors.write(record)
        if self.rollouts and self.rollout_lines and validation is not None:
            sample = self.rollouts.first_sample(record["step"])
            self.rollout_lines.write(sample)
            if self.monitors:
                text = sample["prompt"] + sample["response"]
                self.monitors.text("rollouts/sample", text, sample["step"])

    def stop(self, progress: Progress, result: StepResult) -> None:
        places = gather_objects([place for batch in self._batches for place in batch.places])
        rows = ", ".join(str(place.row + 1) for part in places for place in part)
        allowed = self.recipe.training.skip_nonfinite
        raise UserError(
            f"step {progress.step}: loss {result.loss} and gradient norm {result.grad_norm} are "
            f"not both finite, and training.skip_nonfinite = {allowed} allows no more such steps. "
            f"Rows of the batch, counted from 1: {rows}. Look at these rows; continue with "
            "--resume auto and a higher training.skip_nonfinite, or begin a new run (--set "
            "run.name=NAME) with a lower training.learning_rate"
        )

    def is_interrupted(self) -> bool:
        return any_rank(self.interruption.is_requested(), self.layout.device)

    def save(self, progress: Progress) -> None:
        with self.wall_time.spent_on("checkpoints"):
            state = progress._asdict()
            save_checkpoint(self.student.engine, self.checkpoints, progress.step, state)
        chosen_by = {"val_loss": progress.best_loss, "accuracy": progress.best_accuracy}
        name = self.recipe.training.select_best
        at, best = step_of(progress.step, self.total_steps), ""
        if progress.best_step is not None:
            best = f"; best is step {progress.best_step}, {name} {chosen_by[name] or 0.0:.4f}"
        log.info("%s  saved%s", at, best)
        if self.layout.rank == 0:
            keep_last = self.recipe.training.keep_last
            prune(self.checkpoints, keep_last=keep_last, best_step=progress.best_step)
        self.watchdog.pat()

    def leave(self, progress: Progress) -> None:
        if self.layout.rank == 0:
            write_json(self.recipe.run_dir / INTERRUPTED, progress._asdict())
            log.info("asked to stop: step %d is saved, continue with --resume auto", progress.step)
        if self.monitors:  # after the marker, for it may take a minute, and before others have left
            self.monitors.close()
        barrier()
        raise Interrupted

    def finish(self, progress: Progress) -> None:
        """Write the plan, export the last and the best student, and mark the run as a success."""
        if self.report:
            self.report.write(self.wall_time.shares())
        if self.metrics:
            self.metrics.close()
        if self.rollout_lines:
            self.rollout_lines.close()
        if self.monitors:
            self.monitors.close()
        if isinstance(self.teacher, CachedTeacher):
            self.wall_time.say_waits(self.teacher.waited_seconds)
        log.info("wall time since this start: %s", self.wall_time)
        exports = self.recipe.run_dir / "export"
        self.student.export(self.tokenizer, exports / "last")
        best = self.checkpoints / f"step_{progress.best_step}"
        damage = None
        if progress.best_step not in (None, progress.step):
            damage = damage_of(best, Progress)
            if damage is None:
                load_checkpoint(self.student.engine, best, Progress)
        if damage is None:
            self.student.export(self.tokenizer, exports / "best")
        elif self.layout.rank == 0:
            log.warning(
                "the best checkpoint, %s, is damaged (%s): export/last is all there is",
                best,
                damage,
            )
        if self.layout.rank == 0:
            write_json(self.recipe.run_dir / SUCCESS, progress._asdict())
            log.info("done: %s", exports)
        barrier()


def _load_data(recipe: Recipe, layout: Layout) -> tuple[PreTrainedTokenizerFast, Data]:
    tokenizer = load_tokenizers(recipe)
    try:
        data = load_data_by_node(recipe, tokenizer, layout)
    except NothingToLearn as error:
        if layout.rank == 0:  # a study's cell need not be tried again
            write_text(recipe.run_dir / NOTHING_TO_LEARN, f"{error}\n")
        raise
    say("data", str(data.report))
    return tokenizer, data


def _without_autos(recipe: Recipe, layout: Layout) -> Recipe:
    """What its run began with in the place of each "auto", or else what the plan says.

    Collective: every rank must call this.
    """
    if not recipe.autos:
        return recipe
    begun = on_rank_zero(lambda: as_begun(recipe))
    if not begun.autos:
        say("plan", f"auto: as {recipe.run_dir} began")
        return begun
    num_nodes, ranks_per_node = size_to_plan(layout.nodes)
    gib = memory_gib(layout.device, ranks_per_node)
    site = find_site(layout.device, layout.nodes)
    settled, why = on_rank_zero(lambda: settle(recipe, num_nodes, ranks_per_node, gib, site))
    say("plan", why)
    return settled


def _check_loss_backend(recipe: Recipe, device: torch.device) -> None:
    """Before a model is loaded."""
    try:
        resolve_backend(recipe.loss.backend, device)
    except ValueError as error:
        raise UserError(f"loss.backend = {recipe.loss.backend!r}: {error}") from None


def _choose_checkpoint(folder: Path, resume: str | None) -> Path | None:
    if resume is None:
        return None
    path = choose_checkpoint(folder / "checkpoints", resume, Progress)
    if path is None:
        log.info("--resume auto: %s has no whole checkpoint, starting fresh", folder)
    else:
        log.info("resuming from %s", path)
    return path
