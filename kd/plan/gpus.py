"""GPUs that plans are made for: what they hold, and what they compute at most."""

from typing import NamedTuple

from kd.errors import UserError


class Gpu(NamedTuple):
    gib: float  # what the driver reports of a whole GPU
    tflops: float  # peak of dense bf16 products, by the data sheet
    device_name: str  # what CUDA calls it


GPUS = {
    "a100-40gb": Gpu(39.4, 312.0, "NVIDIA A100-SXM4-40GB"),
    "a100": Gpu(79.2, 312.0, "NVIDIA A100-SXM4-80GB"),
    "h100": Gpu(79.6, 989.0, "NVIDIA H100 80GB HBM3"),
    "h200": Gpu(140.4, 989.0, "NVIDIA H200"),
    "b200": Gpu(179.0, 2250.0, "NVIDIA B200"),
    "l40s": Gpu(45.0, 362.0, "NVIDIA L40S"),
}


def named_gpu(name: str) -> Gpu:
    """The GPU of a --gpu argument. Raises UserError for a name that is not listed."""
    if name not in GPUS:
        raise UserError(f"--gpu {name}: choose from {', '.join(GPUS)}")
    return GPUS[name]


def find_gpu(device_name: str) -> Gpu | None:
    """The GPU that CUDA calls so; None for an unlisted one or another power limit."""
    return next((gpu for gpu in GPUS.values() if gpu.device_name == device_name), None)
