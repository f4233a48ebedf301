"""The learning rate as a pure function of the step, so that a resumed run needs no scheduler
state.
"""

import math

from kd.recipe import TrainingSection

# torch.optim.lr_scheduler.OneCycleLR's defaults: where the cycle starts, and how far it ends below
# that.
ONE_CYCLE_START = 1 / 25
ONE_CYCLE_END = ONE_CYCLE_START / 1e4


def learning_rate(step: int, total_steps: int, training: TrainingSection) -> float:
    """Learning rate of optimizer step `step` (from 0) of `total_steps`.

    one_cycle: OneCycleLR with cosine annealing and pct_start = warmup_fraction, momentum not
        cycled.
    cosine: linear warm-up over warmup_fraction of the steps, then half a cosine to 0.
    constant: the same warm-up, then flat.
    """
    peak = training.learning_rate
    if training.schedule == "one_cycle":
        summit = training.warmup_fraction * total_steps - 1
        if step <= summit:
            return _anneal(peak * ONE_CYCLE_START, peak, step / summit if summit else 1.0)
        return _anneal(
            peak, peak * ONE_CYCLE_END, (step - summit) / max(total_steps - 1 - summit, 1)
        )
    warmup_steps = round(training.warmup_fraction * total_steps)
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    if training.schedule == "constant":
        return peak
    return _anneal(peak, 0.0, (step - warmup_steps) / (total_steps - warmup_steps))


def _anneal(start: float, end: float, progress: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2
