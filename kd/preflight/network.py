"""Whether ranks reach each other, and how fast."""

import errno
import os
import socket
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from kd.distributed.layout import Layout
from kd.distributed.nodes import group_of_node
from kd.plan import MemoryPlan
from kd.preflight.verdict import Check, fail, ok, size, skipped

NUM_WARMUP, NUM_REPEATS = 2, 5
NUM_BYTES = {"cuda": 256 * 2**20, "cpu": 8 * 2**20}


def check_port() -> Check:
    """Whether rank 0 can listen on MASTER_PORT; rank 0 calls it, before the rendezvous."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("", port))
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        where = f"{address}:{port} is in use on {socket.gethostname()}"
        return fail(
            "port",
            f"{where}: end this run if it is still at work there, or set MASTER_PORT to a "
            "free port",
        )
    return ok("port", f"{address}:{port} is free")


def check_bandwidth(
    plan: MemoryPlan, layout: Layout, timeout_minutes: float, minimum: float
) -> list[Check]:
    """Bus bandwidth among the ranks of a node and among all; fails below `minimum` GB/s.

    Collective: every rank must call this.
    """
    if layout.world_size == 1:
        return [skipped("bandwidth", "a single rank")]
    nodes, device = layout.nodes, layout.device
    group = group_of_node(nodes, timeout_minutes)
    checks = []
    if len(nodes) > 1 and min(map(len, nodes)) > 1:
        num_ranks = len(nodes[layout.node])
        checks.append(_check("bandwidth in a node", group, num_ranks, device, minimum))
    where = "bandwidth in a node" if len(nodes) == 1 else "bandwidth of all ranks"
    checks.append(_check(where, dist.group.WORLD, layout.world_size, device, minimum, plan))
    return checks


def _check(
    name: str,
    group: dist.ProcessGroup | None,
    num_ranks: int,
    device: torch.device,
    minimum: float,
    plan: MemoryPlan | None = None,
) -> Check:
    num_bytes = NUM_BYTES[device.type]
    whole = torch.ones(num_bytes // 4 // num_ranks * num_ranks, device=device)
    part = torch.ones(whole.numel() // num_ranks, device=device)
    # Bytes that cross a rank's link for `whole`: what NCCL's tests call bus bandwidth.
    reduce = (
        2
        * (num_ranks - 1)
        / num_ranks
        * num_bytes
        / _seconds(lambda: dist.all_reduce(whole, group=group), device)
    )
    gather = (
        (num_ranks - 1)
        / num_ranks
        * num_bytes
        / _seconds(lambda: dist.all_gather_into_tensor(whole, part, group), device)
    )
    rates = torch.tensor([reduce, gather], dtype=torch.float64, device=device)
    dist.all_reduce(rates, dist.ReduceOp.MIN)  # of all nodes the slowest
    reduce, gather = (rates / 1e9).tolist()
    sizes = f"{num_ranks} ranks, {num_bytes / 2**20:.0f} MiB"
    text = f"all_reduce {reduce:.2f} GB/s, all_gather {gather:.2f} GB/s ({sizes})"
    if plan is not None:
        text += f"; a step receives {size(plan.received_gib_per_step)}: "
        text += f"{plan.received_gib_per_step * 2**30 / 1e9 / gather:.2f} s if nothing overlaps"
    if min(reduce, gather) < minimum:
        return fail(
            name,
            f"{text}: less than --min-bandwidth {minimum:g}; set NCCL_DEBUG=INFO to see which "
            "network is used",
        )
    return ok(name, text)


def _seconds(collective: Callable[[], object], device: torch.device) -> float:
    """The median of NUM_REPEATS, after a warm-up."""
    times = []
    for _ in range(NUM_WARMUP + NUM_REPEATS):
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        collective()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return sorted(times[NUM_WARMUP:])[NUM_REPEATS // 2]
