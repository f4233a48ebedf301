"""Which device a rank uses, and a GPU that is there and cannot be used."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kd.distributed import device
from kd.distributed.device import device_of_rank, device_type, keep_gpus_of_rank, use_device
from kd.errors import UserError


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """Without a GPU, its driver, or a word of a scheduler."""
    accelerator = SimpleNamespace(device_name=lambda: "cpu")
    monkeypatch.setattr(device, "get_accelerator", lambda: accelerator)
    monkeypatch.setattr(device, "DRIVER", tmp_path / "nvidiactl")
    for name in ("DS_ACCELERATOR", *device.GPU_VARIABLES):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_without_a_gpu_ranks_use_the_cpu(machine: pytest.MonkeyPatch) -> None:
    assert device_of_rank(1) == torch.device("cpu")


@pytest.mark.parametrize("sign", ["driver", *device.GPU_VARIABLES])
def test_a_gpu_that_torch_cannot_use_is_an_error_and_not_a_run_on_the_cpu(
    machine: pytest.MonkeyPatch, tmp_path: Path, sign: str
) -> None:
    if sign == "driver":
        (tmp_path / "nvidiactl").touch()
    else:
        machine.setenv(sign, "0")
    with pytest.raises(UserError, match="there should be a GPU .* set DS_ACCELERATOR=cpu"):
        device_type()
    machine.setenv("DS_ACCELERATOR", "cpu")
    assert device_type() == "cpu"


@pytest.mark.parametrize(
    ("num_visible", "local_rank", "index"), [(8, 3, 3), (1, 3, 0), (1, 0, 0), (2, 1, 1)]
)
def test_one_visible_gpu_is_the_tasks_own_whatever_its_local_rank(
    machine: pytest.MonkeyPatch, num_visible: int, local_rank: int, index: int
) -> None:
    machine.setattr(device, "get_accelerator", lambda: SimpleNamespace(device_name=lambda: "cuda"))
    machine.setattr(torch.cuda, "device_count", lambda: num_visible)
    assert device_of_rank(local_rank) == torch.device("cuda", index)
    if num_visible > 1:
        with pytest.raises(UserError, match=f"LOCAL_RANK = {num_visible}, but {num_visible} GPUs"):
            device_of_rank(num_visible)


def test_a_gpu_that_is_used_sums_products_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    matmul = SimpleNamespace(allow_bf16_reduced_precision_reduction=True)
    monkeypatch.setattr(torch.backends.cuda, "matmul", matmul)
    used: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", used.append)
    use_device(torch.device("cpu"))
    assert matmul.allow_bf16_reduced_precision_reduction
    use_device(torch.device("cuda", 1))
    assert used == [torch.device("cuda", 1)]
    assert not matmul.allow_bf16_reduced_precision_reduction


@pytest.mark.parametrize(
    ("visible", "num_gpus", "kept"),
    [
        ("0,1,2,3", 1, "2"),
        ("0,1,2,3,4,5,6,7", 2, "4,5"),
        ("GPU-a,GPU-b,GPU-c", 1, "GPU-c"),
        ("5", 1, "5"),  # the scheduler shows each task its own
        ("4,6", 2, "4,6"),
        ("", 1, ""),
    ],
)
def test_a_rank_keeps_its_own_gpus_of_those_that_it_sees(
    visible: str, num_gpus: int, kept: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    keep_gpus_of_rank(2, num_gpus)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == kept


def test_a_rank_without_gpus_of_its_own_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    with pytest.raises(
        UserError, match="LOCAL_RANK = 1 with 2 GPUs per rank, but only 3 GPUs are visible"
    ):
        keep_gpus_of_rank(1, 2)
