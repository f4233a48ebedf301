"""What a run decides between two steps: to validate, save, stop, leave or end. No process is needed
to look at it: run_steps() takes anything that does what RunActions does.
"""

import math
from typing import NamedTuple, Protocol

from pydantic import FiniteFloat, NonNegativeInt

from kd.recipe import TrainingSection
from kd.training.step import StepResult, Validation


class Progress(NamedTuple):
    """What the loop itself must remember between a checkpoint and its resumption."""

    step: NonNegativeInt = 0
    num_skipped: NonNegativeInt = 0
    best_step: NonNegativeInt | None = None
    best_loss: FiniteFloat | None = None
    best_accuracy: FiniteFloat | None = None  # where that chooses

    def after(self, result: StepResult) -> "Progress":
        """One step further."""
        return self._replace(step=self.step + 1, num_skipped=self.num_skipped + result.skipped)

    def with_accuracy(self, accuracy: float | None, validation: Validation | None) -> "Progress":
        """The step, which is to be saved, is the best one if it answers more problems than all that
        were saved before. A tie goes to the earlier one.
        """
        if accuracy is None or (self.best_accuracy is not None and self.best_accuracy >= accuracy):
            return self
        loss = validation.loss if validation and math.isfinite(validation.loss) else None
        return self._replace(best_step=self.step, best_loss=loss, best_accuracy=accuracy)

    def with_validation(self, validation: Validation | None) -> "Progress":
        """The step, which is to be saved, is the best one if its validation loss is lower than
        those of all that were saved before.
        """
        if validation is None or not math.isfinite(validation.loss):
            return self
        if self.best_loss is not None and self.best_loss <= validation.loss:
            return self
        return self._replace(best_step=self.step, best_loss=validation.loss)


class RunActions(Protocol):
    """What run_steps() directs. Each call is collective: every rank makes the same ones."""

    def take_step(self, step: int) -> StepResult: ...
    def validate(self) -> Validation | None: ...
    def evaluate(self) -> float | None:
        """The student's accuracy."""

    def record(self, validation: Validation | None) -> None: ...
    def stop(self, progress: Progress, result: StepResult) -> None:
        """Raises UserError: too many steps were not finite."""

    def is_interrupted(self) -> bool: ...
    def save(self, progress: Progress) -> None: ...
    def leave(self, progress: Progress) -> None:
        """Raises Interrupted."""


def run_steps(
    run: RunActions, progress: Progress, total_steps: int, training: TrainingSection
) -> Progress:
    """Take the steps after `progress` up to total_steps; returns what was reached.

    A step after which the run stops is recorded, but neither validated nor saved. The best step is
    chosen among those that are both. An interruption at the last step only saves, as the last step
    does anyway.
    """
    while progress.step < total_steps:
        result = run.take_step(progress.step)
        progress = progress.after(result)
        ends = progress.step == total_steps
        stops = progress.num_skipped > training.skip_nonfinite
        saves = not stops and training.saves_after(progress.step, total_steps)
        validates = not stops and training.validates_after(progress.step, total_steps)
        evaluates = not stops and training.evaluates_after(progress.step, total_steps)
        validation = run.validate() if validates else None
        accuracy = run.evaluate() if evaluates else None
        if saves and training.select_best == "accuracy":
            progress = progress.with_accuracy(accuracy, validation)
        elif saves:
            progress = progress.with_validation(validation)
        run.record(validation)
        if stops:
            run.stop(progress, result)
        interrupted = run.is_interrupted()
        if saves or interrupted:
            run.save(progress)
        if interrupted and not ends:
            run.leave(progress)
    return progress
