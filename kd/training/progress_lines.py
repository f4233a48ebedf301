"""A run's progress in a log that is a file: one line every run.log_seconds, and where time went."""

import contextlib
import logging
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from typing import Any

log = logging.getLogger(__name__)

# Of a run's time that may go by waiting for a disk before it is worth a warning
WAITING_SHARE = 0.05
# Lines back from which the time left is estimated, so that one slow interval does not decide
RECENT_LINES = 10
PHASES = ("steps", "validation", "checkpoints")
# Parts of a step in which rank 0 computes nothing of it, and what happens between two steps
WAITS = ("validation", "checkpoints", "sampling", "data", "cache", "metrics")


class WallTime:
    """Where the time of rank 0 goes since the run started, in seconds.

    steps        optimizer steps, from the first look at their data; waits of ranks for one another
                 are inside, and are not known
    validation   validation, and accuracy while training
    checkpoints  writing them
    sampling     of a step: responses of [rollout], until all ranks have them
    data         of a step: making batches of this step and, for the cache, of the next
    cache        of a step: waiting for teacher.cache
    metrics      between steps: metrics.jsonl and [monitor]
    """

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def add(self, what: str, seconds: float) -> None:
        self.seconds[what] += seconds

    @contextlib.contextmanager
    def spent_on(self, what: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.add(what, time.perf_counter() - started)

    def say_waits(self, seconds: float) -> None:
        """For a teacher's cache: a warning where the disk is what a run waits for."""
        share = seconds / (sum(self.seconds[phase] for phase in PHASES) or 1.0)
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
        total = sum(self.seconds[phase] for phase in PHASES) or 1.0
        return {f"{phase}_share": self.seconds[phase] / total for phase in PHASES}

    def __str__(self) -> str:
        shares = zip(PHASES, self.shares().values(), strict=True)
        return ", ".join(f"{share:.1%} {phase}" for phase, share in shares)


class ProgressLines:
    """One line in the log for the first step, for the last, and every `every_seconds` between."""

    def __init__(
        self, wall_time: WallTime, *, total_steps: int, every_seconds: float, divergence: str | None
    ) -> None:
        """divergence: what the log calls the divergence from the teacher; None without one."""
        self._wall_time, self._total_steps = wall_time, total_steps
        self._every_seconds, self._divergence = every_seconds, divergence
        self._num_tokens = 0  # since the last line, as all below
        self._since, self._then = time.monotonic(), wall_time.seconds.copy()
        self._recent: deque[tuple[float, int]] = deque(maxlen=RECENT_LINES + 1)  # (time, step)

    def add(self, record: dict[str, Any]) -> None:
        """record: of the metrics of one step, all of which are to pass here."""
        self._num_tokens += record["num_input_tokens"]
        now, step = time.monotonic(), record["step"]
        is_due = not self._recent or now - self._since >= self._every_seconds
        if is_due or step == self._total_steps:
            self._recent.append((now, step))
            log.info("%s", "  ".join(self._parts(record, now - self._since)))
            self._num_tokens = 0
            self._since, self._then = now, self._wall_time.seconds.copy()

    def _parts(self, record: dict[str, Any], elapsed: float) -> Iterator[str]:
        step, total = record["step"], self._total_steps
        yield step_of(step, total)
        yield from self._losses(record, "")
        yield f"{self._num_tokens / max(elapsed, 1e-9):,.0f} tokens/s"
        (then, step_then), (now, _) = self._recent[0], self._recent[-1]
        if step_then < step < total:
            yield f"{duration((total - step) * (now - then) / (step - step_then))} left"
        yield self._waiting(elapsed)

    def add_validation(self, record: dict[str, Any]) -> None:
        """record: with val_loss and its parts. Always a line: there are about ten in a run."""
        parts = [step_of(record["step"], self._total_steps), "validation"]
        log.info("%s", "  ".join([*parts, *self._losses(record, "val_")]))

    def _losses(self, record: dict[str, Any], prefix: str) -> Iterator[str]:
        yield f"loss {record[f'{prefix}loss']:.4f}"
        if self._divergence:
            yield f"{self._divergence} {record[f'{prefix}kd']:.4f}"
            yield f"CE {record[f'{prefix}ce']:.4f}"

    def _waiting(self, elapsed: float) -> str:
        spent = {name: self._wall_time.seconds[name] - self._then[name] for name in WAITS}
        shares = {name: seconds / max(elapsed, 1e-9) for name, seconds in spent.items()}
        whole = f"waiting {sum(shares.values()):.0%}"
        named = ", ".join(f"{name} {share:.0%}" for name, share in shares.items() if share >= 0.005)
        return f"{whole} ({named})" if named else whole


def step_of(step: int, total_steps: int) -> str:
    """As lines of the log begin that are about a step, counted from 1."""
    return f"step {step:{len(str(total_steps))}}/{total_steps}"


def duration(seconds: float) -> str:
    """The two largest units of a time, for people: 2 h 14 min."""
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    if seconds < 599.5:
        return f"{round(seconds) // 60} min {round(seconds) % 60} s"
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{hours // 24} d {hours % 24} h"
