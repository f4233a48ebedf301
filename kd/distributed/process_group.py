"""The process group: the one place that calls deepspeed.init_distributed."""

import datetime
import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

from kd.distributed.device import device_of_rank, use_device
from kd.distributed.layout import Layout
from kd.distributed.nodes import divide, node_key
from kd.distributed.ports import free_port
from kd.errors import UserError

T = TypeVar("T")

# What torch needs to know, and what srun sets for each task of a step. A batch script is no task,
# and lacks the second.
OF_SLURM = {
    "RANK": "SLURM_PROCID",
    "WORLD_SIZE": "SLURM_STEP_NUM_TASKS",
    "LOCAL_RANK": "SLURM_LOCALID",
}
# How launchers of MPI and SLURM say the same.
WORLD_SIZES = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
LOCAL_RANKS = ("SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID")
# How other launchers say that there are several processes, without saying what torch needs to know.
OTHER_LAUNCHERS = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


def is_rank() -> bool:
    """Whether a launcher, or srun, started this process as one of its ranks."""
    return "RANK" in os.environ or int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1


def find_ranks() -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT where the launcher has not: for
    srun, or one rank.

    Raises UserError when several processes were started without RANK, or without MASTER_ADDR and
    MASTER_PORT.
    """
    if not is_rank():
        find_rank()
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        return
    find_rank()
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise UserError(
                f"{name} is not set: before srun, export MASTER_ADDR (the first node's name) and "
                "MASTER_PORT (a free port there), as launch/slurm/job.sh does"
            )


def find_rank() -> tuple[int, int, int]:
    """(rank, world size, local rank), which ranks need that never meet; under srun they are set in
    the environment.

    Raises UserError when several processes were started without RANK.
    """
    if is_rank():
        if "RANK" not in os.environ:
            os.environ |= {name: os.environ[of_slurm] for name, of_slurm in OF_SLURM.items()}
        _complete()
        rank, world_size, local_rank = (int(os.environ[name]) for name in OF_SLURM)
        return rank, world_size, local_rank
    for name in OTHER_LAUNCHERS:
        if int(os.environ.get(name, "1")) > 1:
            raise UserError(
                f"{name} = {os.environ[name]}, but RANK is not set: start one process per GPU "
                "with deepspeed or torchrun, or set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and "
                "MASTER_PORT for each"
            )
    return 0, 1, 0


def _complete() -> None:
    """Some launchers set only RANK: the others are taken from what they say in their own
    names. Raises UserError for one that nobody says, or that is no such number.
    """
    numbers = {"RANK": int(os.environ["RANK"]) if os.environ["RANK"].isdecimal() else -1}
    for name, others in {"WORLD_SIZE": WORLD_SIZES, "LOCAL_RANK": LOCAL_RANKS}.items():
        found = [value for key in (name, *others) if (value := os.environ.get(key)) is not None]
        if not found and name == "LOCAL_RANK" and os.environ.get("WORLD_SIZE") == "1":
            found = ["0"]
        if not found:
            raise UserError(
                f"RANK = {os.environ['RANK']} is set but {name} is not: let the launcher set "
                "RANK, WORLD_SIZE and LOCAL_RANK for each process, or start with deepspeed, "
                "torchrun or srun"
            )
        os.environ[name] = found[0]
        numbers[name] = int(found[0]) if found[0].isdecimal() else -1
    rank, world_size, local_rank = (numbers[name] for name in OF_SLURM)
    if not (0 <= rank < world_size and 0 <= local_rank < world_size):
        said = ", ".join(f"{name} = {os.environ[name]!r}" for name in OF_SLURM)
        raise UserError(f"{said}: RANK and LOCAL_RANK must be from 0 to WORLD_SIZE - 1")


def init_distributed(timeout_minutes: float = 30.0) -> Layout:
    """Join the launcher's process group, or make one of a single rank.

    timeout_minutes: how long a rank waits for the others in any collective.
    Collective: every rank must call this. Raises UserError as find_ranks does.
    """
    find_ranks()
    # This op is compiled on first use (minutes), and an interrupted build leaves a lock that hangs
    # later runs.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    device = device_of_rank(int(os.environ["LOCAL_RANK"]))
    use_device(device)
    deepspeed.init_distributed(
        dist_backend="nccl" if device.type == "cuda" else "gloo",
        timeout=datetime.timedelta(minutes=timeout_minutes),
        auto_mpi_discovery=False,
        verbose=False,
    )
    rank, world_size = dist.get_rank(), dist.get_world_size()
    return Layout(
        rank=rank,
        world_size=world_size,
        data_parallel_rank=rank,
        data_parallel_size=world_size,
        nodes=divide(gather_objects(node_key())),
        device=device,
    )


def on_rank_zero(function: Callable[[], T]) -> T:
    """Call function on rank 0 only; every rank returns its result, or raises its UserError.

    Collective: every rank must call this. The result travels by pickle between ranks of one run.
    Any other exception ends rank 0, and the launcher the rest.
    """
    box: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = function()
        except UserError as error:
            box[1] = str(error)
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise UserError(box[1])
    return box[0]


def gather_objects(value: T) -> list[T]:
    """The values of all ranks, by rank; they travel by pickle between ranks of one run.

    Collective: every rank must call this.
    """
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def gather_numbered(mine: Mapping[int, T]) -> list[T]:
    """The values of all ranks in the order of their numbers, 0, 1, ...; each rank has some of them.

    Collective: every rank must call this.
    """
    everyones: dict[int, T] = {}
    for part in gather_objects(mine):
        everyones |= part
    return [everyones[number] for number in range(len(everyones))]


def all_reduce_sum(sums: Mapping[str, Tensor | float], device: torch.device) -> dict[str, Any]:
    """Element-wise sums over all ranks in float64, of one all-reduce: {name: float, or list for a
    tensor of one dimension}.

    Collective: every rank must call this, with the same names and shapes.
    """
    tensors = {
        name: torch.as_tensor(value, dtype=torch.float64, device=device)
        for name, value in sums.items()
    }
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors.values()])
    dist.all_reduce(flat)
    values = iter(flat.tolist())  # the one wait for the device
    return {
        name: [next(values) for _ in range(tensor.numel())] if tensor.dim() else next(values)
        for name, tensor in tensors.items()
    }


def sum_over_ranks(value: float, device: torch.device) -> Tensor:
    """The sum in float64, a scalar on the device: the host does not wait for it.

    Collective: every rank must call this.
    """
    total = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total


def any_rank(value: bool, device: torch.device) -> bool:
    """Whether the value is true on any rank. Collective: every rank must call this."""
    return bool(all_reduce_sum({"value": value}, device)["value"])


def barrier() -> None:
    """Wait for all ranks. Collective: every rank must call this."""
    dist.barrier()
