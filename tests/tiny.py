"""What tests run on: tiny random models, a tiny recipe on them, and the command line of the real
launcher.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

# Read when torch and transformers are imported, here and in the processes that tests start. Threads
# are counted per process, and tests run two ranks on as few as two cores.
os.environ |= {
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported: it interprets its kernels

from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from kd.distributed.layout import Layout

ROOT = Path(__file__).resolve().parents[1]
T = TypeVar("T")


def launcher_command(script: str, *arguments: str, num_ranks: int = 2) -> list[str]:
    """The deepspeed launcher as a user calls it, on a port of its own."""
    deepspeed = Path(sys.executable).with_name("deepspeed")
    command = [
        str(deepspeed),
        "--num_gpus",
        str(num_ranks),
        "--no_local_rank",
        "--master_port",
        free_port(),
    ]
    return [*command, str(ROOT / script), *arguments]


def free_port() -> str:
    (port,) = free_ports(1)
    return str(port)


def free_ports(number: int) -> list[int]:
    """Distinct ones, of this machine."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(number)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def layout_of(rank: int, world_size: int) -> Layout:
    """Of ranks on the CPU of one node, without a process group."""
    nodes = (tuple(range(world_size)),)
    return Layout(rank, world_size, rank, world_size, nodes, torch.device("cpu"))


def wait_until(condition: Callable[[], T], what: str, seconds: float = 10.0) -> T:
    """Poll until the condition holds and return its value; an AssertionError says what did not come
    about.
    """
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(0.05)
    return value


@contextmanager
def disk_of_its_own(folder: Path, size: str) -> Iterator[Path]:
    """A file system of that size (600k), a tmpfs, which only root may mount."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


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


def write_tiny_recipe(folder: Path, *, num_rows: int = 80) -> Path:
    """A recipe on random models with the embedded task's tokenizer and traces; returns its TOML
    file.
    """
    from kd.demo.arithmetic import ArithmeticSet, draw_rows

    for seed, (role, layers) in enumerate({"teacher": 2, "student": 1}.items()):
        assets = (
            ROOT
            / "recipes"
            / "assets"
            / "tiny"
            / ("teacher" if role == "teacher" else "student_base")
        )
        shutil.copytree(assets, folder / role, ignore=shutil.ignore_patterns("*.safetensors"))
        vocab_size = json.loads((assets / "config.json").read_text())["vocab_size"]
        save_tiny_model(folder / role, seed=seed, vocab_size=vocab_size, num_hidden_layers=layers)
    rows = draw_rows(ArithmeticSet("training", num_rows), seed="test")
    (folder / "traces.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = folder / "tiny_test.toml"
    recipe.write_text(f"""\
[run]
output_dir = "{folder}/runs"

[teacher]
model = "{folder}/teacher"

[student]
model = "{folder}/student"

[data]
path = "{folder}/traces.jsonl"
num_validation = 10
think_open = "<think>"
think_close = "</think>"
cache_dir = "{folder}/tokenised"

[truncation]
keep_fraction = 0.5

[training]
max_steps = 40
global_batch_size = 8
micro_batch_size = 2
learning_rate = 1e-2
checkpoint_every = 10

[deepspeed]
student = "zero3_cpu.json"
teacher = "zero3_cpu.json"
""")
    return recipe


def write_scored_recipe(folder: Path) -> Path:
    """write_tiny_recipe(), with one problem to be scored on."""
    problems = folder / "problems.jsonl"
    problems.write_text('{"prompt": "1+2", "answer": "3"}\n')
    recipe = write_tiny_recipe(folder)
    evaluation = f'[evaluation]\npath = "{problems}"\njudge = "exact"\nmax_new_tokens = 4\n'
    recipe.write_text(f"{recipe.read_text()}\n{evaluation}temperature = 0.0\n")
    return recipe
