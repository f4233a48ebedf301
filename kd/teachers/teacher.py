"""The interface of all kinds of teacher."""

import contextlib
from typing import Protocol

from kd.data.collate import Batch
from kd.losses import Targets


class Teacher(Protocol):
    """Gives what a student learns from. Each kind of teacher is a module of kd.teachers."""

    def targets(self, batch: Batch) -> contextlib.AbstractContextManager[Targets]:
        """The targets of a batch on this rank's device, without gradient, whole inside the context.

        Collective: every rank must enter it.
        """


def targets_of(
    teacher: Teacher | None, batch: Batch
) -> contextlib.AbstractContextManager[Targets | None]:
    """None where a run has no teacher: plain fine-tuning."""
    return contextlib.nullcontext() if teacher is None else teacher.targets(batch)
