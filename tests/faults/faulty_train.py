"""launch/train.py with one fault: faulty_train.py FAULT STEP TIME_FILE ARGUMENTS...

It happens once, to rank 1, in optimizer step STEP (counted from 1); the time of day is written to
TIME_FILE first.
"""

import math
import os
import runpy
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from tiny import ROOT

import kd.engine.checkpoint
import kd.generation.tokens
import kd.training.loop
import kd.training.step
from kd.models.student import BatchLoss, HeadLoss, Student


def end_at_once(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def run_out_of_memory(*_: Any) -> None:
    raise MemoryError("rank 1 wanted more than there is")


def hang(*_: Any) -> None:
    time.sleep(3600)


def make_nan(result: BatchLoss) -> BatchLoss:
    return result._replace(loss=result.loss * math.nan)


# fault -> where it happens, and what is done there: to the call, or to its result
BEFORE = {
    "killed in forward": (HeadLoss, "forward", end_at_once),
    "killed in all-reduce": (kd.training.step, "all_reduce_sum", end_at_once),
    "killed in checkpoint": (kd.engine.checkpoint, "save", end_at_once),
    "exception": (Student, "loss", run_out_of_memory),
    "hang": (Student, "loss", hang),
    "killed in rollout": (kd.generation.tokens, "generate_tokens", end_at_once),
}
AFTER = {"nan": (Student, "loss", make_nan)}


def main() -> None:
    fault, fault_step, time_file = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    sys.argv = ["launch/train.py", *sys.argv[4:]]
    steps: list[int] = []
    # Called first in each step
    wrap(kd.training.loop, "learning_rate", before=lambda step, *_: steps.append(step + 1))

    def once(act: Callable[..., Any]) -> Callable[..., Any]:
        def maybe(*arguments: Any) -> Any:
            if dist.get_rank() == 1 and steps[-1] == fault_step and not time_file.exists():
                time_file.write_text(str(time.time()))
                return act(*arguments)
            return arguments[0]

        return maybe

    if fault in BEFORE:
        module, name, act = BEFORE[fault]
        wrap(module, name, before=once(act))
    else:
        module, name, act = AFTER[fault]
        wrap(module, name, after=once(act))
    runpy.run_path(str(ROOT / "launch" / "train.py"), run_name="__main__")


def wrap(
    module: Any,
    name: str,
    before: Callable[..., Any] = lambda *_: None,
    after: Callable[..., Any] = lambda result: result,
) -> None:
    function = getattr(module, name)

    def wrapped(*arguments: Any, **options: Any) -> Any:
        before(*arguments)
        return after(function(*arguments, **options))

    setattr(module, name, wrapped)


if __name__ == "__main__":
    main()
