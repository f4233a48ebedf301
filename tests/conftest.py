"""Shared by all tests: tiny random models, and the real launcher with two ranks."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

ROOT = Path(__file__).resolve().parents[1]

# torch's and gloo's threads are counted per process: tests run two ranks on as few as two cores.
CPU_ENVIRONMENT = {
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
os.environ.update(CPU_ENVIRONMENT)

Launch = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def launch() -> Launch:
    """Run a script under the deepspeed launcher: launch("launch/train.py", "--recipe", ..., num_ranks=2)."""

    def run(script: str, *arguments: str, num_ranks: int = 2, timeout: float = 300, **environment: str):
        deepspeed = Path(sys.executable).with_name("deepspeed")
        command = [str(deepspeed), "--num_gpus", str(num_ranks), "--no_local_rank", "--master_port", _free_port()]
        return subprocess.run(
            [*command, str(ROOT / script), *arguments],
            cwd=ROOT,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    return run


def _free_port() -> str:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def tiny_config(kind: str = "qwen3", **changes: object) -> Qwen3Config | Qwen2Config:
    """A causal language model of some ten thousand parameters."""
    sizes = {
        "vocab_size": 160,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "initializer_range": 0.3,  # far from uniform: a loss of random models must not be near zero
    } | changes
    if kind == "qwen2":
        return Qwen2Config(**sizes)
    return Qwen3Config(**sizes, head_dim=8)


def save_tiny_model(folder: Path, *, seed: int, kind: str = "qwen3", **changes: object) -> Path:
    torch.manual_seed(seed)
    model_class = Qwen2ForCausalLM if kind == "qwen2" else Qwen3ForCausalLM
    model_class(tiny_config(kind, **changes)).save_pretrained(folder)
    return folder
