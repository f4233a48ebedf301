"""Two optimizer steps give the weights of plain modules in every engine: on a GPU in bf16, and here
in small form on the CPU.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from steps_worker import CASES
from tiny import ROOT, tiny_config
from transformers import Qwen2ForCausalLM

WORKER = "tests/training/steps_worker.py"
PLACES = [
    pytest.param(("cpu", "float32"), marks=pytest.mark.dist, id="cpu-fp32"),
    pytest.param(("cpu", "bfloat16"), marks=pytest.mark.dist, id="cpu-bf16"),
    pytest.param(
        ("cuda", "bfloat16"),
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
        ],
        id="cuda-bf16",
    ),
]


@pytest.fixture(scope="module", params=PLACES)
def measured(
    request: pytest.FixtureRequest, launch: Any, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, dict[str, Any]]:
    """(dtype, what the worker found): on two ranks of the CPU, or one of a GPU."""
    device, dtype = request.param
    folder = tmp_path_factory.mktemp("two_steps")
    write_models(folder)
    write_ds_configs(folder, dtype)
    output = folder / "results.json"
    arguments = [str(folder), dtype, str(output)]
    if device == "cpu":
        done = launch(WORKER, *arguments)
    else:  # in a process of its own: CUDA does not survive a fork
        environment = {**os.environ, "DS_ACCELERATOR": "cuda", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, str(ROOT / WORKER), *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return dtype, json.loads(output.read_text())


def write_models(folder: Path) -> None:
    """Weights that bf16 holds: those of both precisions are the same."""
    for seed, (role, layers) in enumerate({"teacher": 3, "student": 2}.items()):
        torch.manual_seed(seed)
        config = tiny_config("qwen2", hidden_size=64, num_hidden_layers=layers)
        Qwen2ForCausalLM(config).bfloat16().save_pretrained(folder / role)


def write_ds_configs(folder: Path, dtype: str) -> None:
    """Those that ship, with small buckets, and under ZeRO-3 without parameters that stay whole."""
    for stage in (1, 2, 3):
        config = json.loads((ROOT / "ds_configs" / f"zero{stage}_bf16.json").read_text())
        config["zero_optimization"]["reduce_bucket_size"] = 5_000_000
        if stage == 3:
            config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        if dtype == "float32":
            del config["bf16"], config["data_types"]
        (folder / f"zero{stage}.json").write_text(json.dumps(config))


@pytest.mark.parametrize("case", CASES)
def test_losses_are_those_of_plain_modules(measured: tuple[str, dict[str, Any]], case: str) -> None:
    dtype, results = measured
    expected = results["reference"]["losses"]
    assert min(expected) > 0.5
    assert expected[1] != pytest.approx(expected[0], rel=0.001)  # the first step was taken
    tolerance = 1e-5 if dtype == "float32" else 0.01
    assert results[case]["losses"] == pytest.approx(expected, rel=tolerance)
    assert results[case]["losses"] == pytest.approx(results["gpu_zero2"]["losses"], rel=0.001)


@pytest.mark.parametrize("case", CASES)
def test_updates_err_by_no_more_than_plain_modules_of_that_precision(
    measured: tuple[str, dict[str, Any]], case: str
) -> None:
    dtype, results = measured
    for error in ("update", "worst"):
        bound = 1e-3 if dtype == "float32" else 2 * results["plain"][error]
        assert results[case][error] < bound, error
    assert 2 * results["plain"]["worst"] < 1  # the error of a parameter that no step changes
