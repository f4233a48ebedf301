"""GPUs that plans are made for: what they hold, and how fast they compute and move bytes.

Rates are those of the data sheets, and plans take the shares of them below, which large products
and collectives are commonly reported to reach on an H100. None was measured here.
"""

from typing import NamedTuple

import torch

from kd.constants import DISK_GB_S, NETWORK_GBPS
from kd.distributed.nodes import Nodes, size_to_plan
from kd.errors import UserError

PRODUCTS = 0.6  # of a model's own products in bf16; one large product reaches 0.8
MEMORY = 0.9
LINKS = 0.75  # an all-gather over NVLink
NETWORK = 0.6  # and over several network adapters


class Gpu(NamedTuple):
    gib: float  # what the driver reports of a whole GPU
    tflops: float  # peak of dense bf16 products
    memory_tb_s: float
    link_gb_s: float  # to the other GPUs of a node, one way
    device_name: str  # what CUDA calls it

    @property
    def product_rate(self) -> float:
        """FLOP/s."""
        return PRODUCTS * self.tflops * 1e12

    @property
    def memory_rate(self) -> float:
        """Bytes/s."""
        return MEMORY * self.memory_tb_s * 1e12

    @property
    def link_rate(self) -> float:
        """Bytes/s that a GPU receives in a collective within a node."""
        return LINKS * self.link_gb_s * 1e9


GPUS = {
    "a100-40gb": Gpu(39.4, 312.0, 1.56, 300.0, "NVIDIA A100-SXM4-40GB"),
    "a100": Gpu(79.2, 312.0, 2.04, 300.0, "NVIDIA A100-SXM4-80GB"),
    "h100": Gpu(79.6, 989.0, 3.35, 450.0, "NVIDIA H100 80GB HBM3"),
    "h200": Gpu(140.4, 989.0, 4.8, 450.0, "NVIDIA H200"),
    "b200": Gpu(179.0, 2250.0, 8.0, 900.0, "NVIDIA B200"),
    "l40s": Gpu(45.0, 362.0, 0.86, 32.0, "NVIDIA L40S"),
}


class Site(NamedTuple):
    """What a run's speed depends on besides its recipe."""

    gpu: Gpu
    num_nodes: int = 1
    gpus_per_node: int = 1
    network_gbps: float = NETWORK_GBPS
    disk_gb_s: float = DISK_GB_S

    @property
    def num_gpus(self) -> int:
        return self.num_nodes * self.gpus_per_node

    def collective_rate(self, num_ranks: int) -> float:
        """Bytes/s that a GPU receives from num_ranks, which fill a node before the next."""
        network = NETWORK * self.network_gbps / 8 * 1e9
        within = num_ranks <= self.gpus_per_node
        return self.gpu.link_rate if within else min(self.gpu.link_rate, network)


def find_site(device: torch.device, nodes: Nodes) -> Site | None:
    """Where this rank runs, with the network and disk that a plan takes for granted; None on a CPU
    and on a GPU that is not listed.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    gpu = find_gpu(name)
    return gpu and Site(gpu, *size_to_plan(nodes))


def named_gpu(name: str) -> Gpu:
    """The GPU of a --gpu argument. Raises UserError for a name that is not listed."""
    if name not in GPUS:
        raise UserError(f"--gpu {name}: choose from {', '.join(GPUS)}")
    return GPUS[name]


def find_gpu(device_name: str) -> Gpu | None:
    """The GPU that CUDA calls so; None for an unlisted one or another power limit."""
    return next((gpu for gpu in GPUS.values() if gpu.device_name == device_name), None)
