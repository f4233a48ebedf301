"""One optimizer step, and one validation: read train_step() from top to bottom."""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kd.data.collate import Batch
from kd.distributed.layout import Layout
from kd.distributed.process_group import all_reduce_sum, sum_over_ranks
from kd.models.student import BatchLoss, Student
from kd.teachers.teacher import Teacher, targets_of
from kd.training.diagnostics import region_sums, summarise

# Batches of a validation between two looks at signals, which take a collective each
ASK_EVERY = 8


class StepResult(NamedTuple):
    """Of one optimizer step over all ranks; losses are means over its supervised tokens."""

    loss: float
    kd: float
    ce: float
    num_supervised_tokens: int
    num_input_tokens: int
    grad_norm: float
    skipped: bool  # the loss or the gradient is not finite
    diagnostics: dict[str, Any] | None


class Validation(NamedTuple):
    """Means over the supervised tokens of the validation set, under the training objective."""

    loss: float
    kd: float
    ce: float
    diagnostics: dict[str, Any] | None


class Sums:
    """What is added up over batches, on the device, in float64; the host does not wait."""

    def __init__(self, device: torch.device) -> None:
        self.losses = torch.zeros(3, dtype=torch.float64, device=device)  # loss, kd, ce
        self.regions = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, batch: Batch, result: BatchLoss) -> None:
        losses = torch.stack([result.loss.detach(), result.kd, result.ce])
        self.losses += losses.double()
        sums = region_sums(result.rows_MN, batch.region_index, batch.num_sources)
        self.regions = self.regions + sums

    def over_all_ranks(self, layout: Layout, **more: Tensor | float | None) -> dict[str, Any]:
        """{"loss", "kd", "ce", "regions", and more}; None counts as 0.

        Collective: every rank must call this.
        """
        loss, kd, ce = self.losses
        sums: dict[str, Tensor | float] = {"loss": loss, "kd": kd, "ce": ce}
        sums |= {name: 0.0 if value is None else value for name, value in more.items()}
        return all_reduce_sum(sums | {"regions": self.regions}, layout.device)


def train_step(
    student: Student,
    teacher: Teacher | None,
    batches: list[Batch],
    learning_rate: float,
    layout: Layout,
) -> StepResult:
    """One optimizer step over this rank's micro-batches of the global batch.

    Each micro-batch's loss is a sum over its tokens, divided once by the number of supervised
    tokens in the whole global batch: how tokens are spread over ranks and micro-batches does not
    change the gradient. DeepSpeed averages gradients over data-parallel ranks, hence that factor;
    its own division by accumulation steps is switched off.

    Collective: every rank must call this, with the same number of micro-batches.
    """
    num_here = sum(batch.num_supervised_tokens for batch in batches)
    # On the device: the host waits once in a step, for the sums at its end.
    num_everywhere = sum_over_ranks(num_here, layout.device)
    scale = (layout.data_parallel_size / num_everywhere.clamp(min=1.0)).float()
    engine, num_skipped_before = student.engine, student.engine.skipped_steps
    student.set_learning_rate(learning_rate)

    sums = Sums(layout.device)
    for number, batch in enumerate(batches, start=1):
        batch = batch.to(layout.device)
        engine.set_gradient_accumulation_boundary(number == len(batches))
        with targets_of(teacher, batch) as targets:
            result = student.loss(batch, targets)
        sums.add(batch, result)
        # 1 for a finite loss; NaN for an infinite one, so that its gradient cannot pass for a
        # finite one.
        poison = 1.0 + 0.0 * result.loss.detach()
        engine.backward(result.loss * (scale * poison), scale_wrt_gas=False)
        engine.step()  # takes the step at the boundary only

    total = sums.over_all_ranks(
        layout,
        num_supervised_tokens=num_here,
        num_input_tokens=sum(batch.num_input_tokens for batch in batches),
        grad_norm=engine.get_global_grad_norm() if layout.rank == 0 else 0.0,  # all have the same
    )
    num_tokens, grad_norm = max(total["num_supervised_tokens"], 1.0), total["grad_norm"]
    finite = math.isfinite(total["loss"]) and math.isfinite(grad_norm)
    taken = engine.skipped_steps == num_skipped_before
    return StepResult(
        loss=total["loss"] / num_tokens,
        kd=total["kd"] / num_tokens,
        ce=total["ce"] / num_tokens,
        num_supervised_tokens=int(total["num_supervised_tokens"]),
        num_input_tokens=int(total["num_input_tokens"]),
        grad_norm=grad_norm,
        skipped=not (finite and taken),
        diagnostics=summarise(total["regions"]),
    )


@torch.no_grad()
def validate(
    student: Student,
    teacher: Teacher | None,
    batches: Iterable[Batch],
    layout: Layout,
    is_interrupted: Callable[[], bool] = lambda: False,
) -> Validation | None:
    """The loss of this rank's batches and all others'; None when is_interrupted(), asked now and
    then, says that a rank is to stop, so that a save keeps the time that is left.

    Collective: every rank must call this, with the same number of batches.
    """
    student.engine.eval()
    sums, num_here = Sums(layout.device), 0
    for number, batch in enumerate(batches, start=1):
        if number % ASK_EVERY == 0 and is_interrupted():
            student.engine.train()
            return None
        batch = batch.to(layout.device)
        with targets_of(teacher, batch) as targets:
            sums.add(batch, student.loss(batch, targets))
        num_here += batch.num_supervised_tokens
    student.engine.train()
    total = sums.over_all_ranks(layout, num_supervised_tokens=num_here)
    num_tokens = total["num_supervised_tokens"]
    return Validation(
        loss=total["loss"] / num_tokens,
        kd=total["kd"] / num_tokens,
        ce=total["ce"] / num_tokens,
        diagnostics=summarise(total["regions"]),
    )
