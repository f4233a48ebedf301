"""DeepSpeed's launcher on this machine, for the commands that start a run themselves."""

import os
import sys
from pathlib import Path

import torch

from kd.distributed.ports import free_port
from kd.recipe import Recipe

LAUNCHER = [sys.executable, "-m", "deepspeed.launcher.runner", "--quiet", "--no_local_rank"]


def local_launch(recipe: Recipe, script: Path) -> tuple[list[str], dict[str, str]]:
    """The command of a script on this machine's visible GPUs, and its environment.

    Without a GPU, or with DS_ACCELERATOR=cpu, it starts two ranks on the CPU if they can divide the
    recipe's batch, else one. Raises UserError when the GPUs cannot divide the batch.
    """
    environment, options = (
        dict(os.environ),
        ["--master_port", os.environ.get("MASTER_PORT") or str(free_port())],
    )
    num_gpus = 0 if os.environ.get("DS_ACCELERATOR") == "cpu" else torch.cuda.device_count()
    if not num_gpus:  # else --num_gpus would make the launcher take the first ones
        training = recipe.training
        num_ranks = min(2, -(-training.global_batch_size // training.micro_batch_size))
        threads = max(1, (os.cpu_count() or 1) // num_ranks)
        # PASSIVE: ranks that wait leave their cores to the others.
        defaults = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
        environment = {**defaults, **environment, "DS_ACCELERATOR": "cpu"}
        options += ["--num_gpus", str(num_ranks)]
    return [*LAUNCHER, *options, str(script)], environment
