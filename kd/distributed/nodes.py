"""Which ranks share a node, and a process group for each node."""

import datetime
import os
import socket
from collections.abc import Hashable, Iterable
from typing import Any

import torch.distributed as dist

# What deepspeed, torchrun and srun number nodes with. A host's name alone would join two agents on
# one host; such a variable alone, when it is left over from a batch script, would join hosts.
NODE_VARIABLES = ("CROSS_RANK", "GROUP_RANK", "SLURM_NODEID")


def ranks_of_nodes() -> list[list[int]]:
    """The ranks of each node, both in ascending order. Every rank must call it."""
    keys: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(
        keys, (socket.gethostname(), *(os.environ.get(name) for name in NODE_VARIABLES))
    )
    return divide(keys)


def divide(keys: Iterable[Hashable]) -> list[list[int]]:
    """Ranks with equal keys together; keys are in the order of ranks."""
    nodes: dict[Hashable, list[int]] = {}
    for rank, key in enumerate(keys):
        nodes.setdefault(key, []).append(rank)
    return list(nodes.values())


def size_to_plan(nodes: list[list[int]]) -> tuple[int, int]:
    """Nodes, and ranks on each, as plans take them: nodes of unequal size count as one."""
    num_nodes = len(nodes) if len({len(ranks) for ranks in nodes}) == 1 else 1
    return num_nodes, sum(map(len, nodes)) // num_nodes


def group_of_node(nodes: list[list[int]], timeout_minutes: float) -> dist.ProcessGroup:
    """The process group of this rank's node; each call makes groups anew. Every rank must call
    it.
    """
    group, _ = dist.new_subgroups_by_enumeration(
        nodes, timeout=datetime.timedelta(minutes=timeout_minutes)
    )
    return group
