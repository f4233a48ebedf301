"""Which device a rank uses: DeepSpeed's accelerator decides the kind, so that DS_ACCELERATOR=cpu
holds everywhere.
"""

import os
from pathlib import Path
from typing import Literal

import torch
from deepspeed.accelerator import get_accelerator

from kd.errors import UserError

# Where NVIDIA's driver is, and what schedulers say to those that asked for GPUs
DRIVER = Path("/dev/nvidiactl")
GPU_VARIABLES = ("SLURM_JOB_GPUS", "SLURM_STEP_GPUS")


def device_type() -> Literal["cuda", "cpu"]:
    """cuda or cpu, the latter also on a machine with GPUs that are not to be used.

    Raises UserError where there should be a GPU and torch cannot use it: days on a CPU are not what
    was asked for.
    """
    if get_accelerator().device_name() == "cuda":
        return "cuda"
    said = [f"{name} = {os.environ[name]}" for name in GPU_VARIABLES if os.environ.get(name)]
    said += [f"{DRIVER} exists"] if DRIVER.exists() else []
    if said and os.environ.get("DS_ACCELERATOR") != "cpu":
        raise UserError(
            f"there should be a GPU ({said[0]}), but torch cannot use it: {_why_no_cuda()}. Fix "
            "that, or set DS_ACCELERATOR=cpu to run on the CPU"
        )
    return "cpu"


def device_of_rank(local_rank: int) -> torch.device:
    """cuda:0 where the scheduler shows each task only its own GPU, whatever LOCAL_RANK. Raises
    UserError for a rank without a GPU.
    """
    if device_type() == "cpu":
        return torch.device("cpu")
    num_visible = torch.cuda.device_count()
    if num_visible > 1 and local_rank >= num_visible:
        raise UserError(
            f"LOCAL_RANK = {local_rank}, but {num_visible} GPUs are visible: start one rank per "
            "GPU, or give each task its own with CUDA_VISIBLE_DEVICES"
        )
    return torch.device("cuda", local_rank if num_visible > 1 else 0)


def keep_gpus_of_rank(local_rank: int, num_gpus: int) -> None:
    """Hide from this process all GPUs but num_gpus, those of its rank, before torch looks at them.
    Where it sees no more than these, the scheduler has shown each task its own.

    Raises UserError for a rank for which none are left.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(i) for i in range(torch.cuda.device_count())] if visible is None else []
    names = names or [name for name in (visible or "").split(",") if name]
    if len(names) <= num_gpus:
        return
    kept = names[local_rank * num_gpus : (local_rank + 1) * num_gpus]
    if len(kept) < num_gpus:
        raise UserError(
            f"LOCAL_RANK = {local_rank} with {num_gpus} GPUs per rank, but only {len(names)} GPUs "
            "are visible: start fewer ranks per node, or lower --tensor-parallel"
        )
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(kept)


def memory_gib(device: torch.device, num_sharing: int) -> float:
    """Of the GPU, or on a CPU a rank's part of the host's, which num_sharing ranks share."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / 2**30
    host_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return host_bytes / num_sharing / 2**30


def use_device(device: torch.device) -> None:
    """Make a GPU this process's own, on which it sums products in float32: in bf16, as torch allows
    it by default where cuBLAS splits the inner dimension, a sum over the vocabulary loses digits.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


def _why_no_cuda() -> str:
    try:
        torch.cuda.init()
    except (AssertionError, RuntimeError) as error:
        return str(error).strip().partition("\n")[0]
    return "DeepSpeed finds no accelerator"
