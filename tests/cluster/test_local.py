"""The command by which a study, a preflight or a benchmark starts its ranks here."""

from pathlib import Path

import pytest
import torch

from kd.cluster.local import local_launch
from kd.recipe import load_recipe

SCRIPT = Path("train.py")


def test_gpus_are_those_that_are_visible_and_the_port_is_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("DS_ACCELERATOR")
    command, environment = local_launch(load_recipe("tiny"), SCRIPT)
    assert "--num_gpus" not in command  # with which the launcher forgets CUDA_VISIBLE_DEVICES
    assert int(command[command.index("--master_port") + 1]) > 0
    assert "DS_ACCELERATOR" not in environment


@pytest.mark.parametrize(("micro_batch_size", "num_ranks"), [(16, "2"), (32, "1")])
def test_without_a_gpu_there_are_no_more_ranks_on_the_cpu_than_micro_batches(
    micro_batch_size, num_ranks
):
    command, environment = local_launch(
        load_recipe("tiny", [f"training.micro_batch_size={micro_batch_size}"]), SCRIPT
    )
    assert command[command.index("--num_gpus") + 1] == num_ranks
    assert environment["DS_ACCELERATOR"] == "cpu"
