"""Where a process is among the ranks of a run."""

from dataclasses import dataclass

import torch

from kd.distributed.nodes import Nodes


@dataclass(frozen=True)
class Layout:
    """Made once, by init_distributed, and passed on: nothing outside kd.distributed and kd.engine
    asks torch for ranks.

    Data-parallel ranks see different sequences. Today each rank is one; with sequence parallelism
    several ranks would share a data_parallel_rank.
    """

    rank: int
    world_size: int
    data_parallel_rank: int
    data_parallel_size: int
    nodes: Nodes
    device: torch.device

    @property
    def node(self) -> int:
        """The number of this rank's node."""
        return next(number for number, ranks in enumerate(self.nodes) if self.rank in ranks)

    @property
    def is_first_on_node(self) -> bool:
        """Whether this rank does what one rank of each node does first, such as to tokenise."""
        return self.nodes[self.node][0] == self.rank
