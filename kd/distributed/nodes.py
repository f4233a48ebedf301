"""Which ranks share a node, and a process group for each node."""

import datetime
import os
import socket
from collections.abc import Hashable, Iterable

import torch.distributed as dist

# What deepspeed, torchrun and srun number nodes with. A host's name alone would join two agents on
# one host; such a variable alone, when it is left over from a batch script, would join hosts.
NODE_VARIABLES = ("CROSS_RANK", "GROUP_RANK", "SLURM_NODEID")

Nodes = tuple[tuple[int, ...], ...]  # the ranks of each node


def node_key() -> tuple[str | None, ...]:
    """Equal for the ranks of one node, and for no others."""
    return (socket.gethostname(), *(os.environ.get(name) for name in NODE_VARIABLES))


def divide(keys: Iterable[Hashable]) -> Nodes:
    """Ranks with equal keys together, both in ascending order; keys are in the order of ranks."""
    nodes: dict[Hashable, list[int]] = {}
    for rank, key in enumerate(keys):
        nodes.setdefault(key, []).append(rank)
    return tuple(tuple(ranks) for ranks in nodes.values())


def size_to_plan(nodes: Nodes) -> tuple[int, int]:
    """Nodes, and ranks on each, as plans take them: nodes of unequal size count as one."""
    num_nodes = len(nodes) if len({len(ranks) for ranks in nodes}) == 1 else 1
    return num_nodes, sum(map(len, nodes)) // num_nodes


def group_of_node(nodes: Nodes, timeout_minutes: float) -> dist.ProcessGroup:
    """The process group of this rank's node; each call makes groups anew.

    Collective: every rank must call this.
    """
    group, _ = dist.new_subgroups_by_enumeration(
        [list(ranks) for ranks in nodes], timeout=datetime.timedelta(minutes=timeout_minutes)
    )
    return group
