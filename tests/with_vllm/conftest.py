"""vLLM itself, on the CPU and the shipped models: `make vllm` runs these in .venv-vllm.

The folder is not called vllm: tests/ is on the path, and an import would find it.
"""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tiny import ROOT, free_port

from kd.demo.arithmetic import ArithmeticSet, draw_rows

TEACHER = "recipes/assets/tiny/teacher"
NUM_PROBLEMS = 50
START_SECONDS = 300
# One GiB of keys and values, and no thread bound to a core that others use too
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "CUDA_VISIBLE_DEVICES": "",
}

Script = Callable[..., subprocess.CompletedProcess[str]]

if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def problems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the embedded task, and with their answers."""
    rows = draw_rows(ArithmeticSet("report", NUM_PROBLEMS), "report")
    path = tmp_path_factory.mktemp("problems") / "problems.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def python() -> Script:
    """Run a script of launch/ to its end, as a user does; it has to end well unless `fails`."""

    def run(
        name: str, *arguments: object, cwd: Path = ROOT, fails: bool = False
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, ROOT / "launch" / name, *map(str, arguments)],
            cwd=cwd,
            env={**os.environ, **ENVIRONMENT},
            capture_output=True,
            text=True,
            timeout=500,
            check=False,
        )
        assert (done.returncode != 0) == fails, done.stdout[-3000:] + done.stderr[-6000:]
        return done

    return run


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server of the shipped teacher, which it knows by its name in the recipe.

    It serves a copy: vLLM 0.32 renders a text of its own when it starts, which the tokenizer of the
    task, words without an unknown one, cannot read. And it is not started by `vllm serve`, which
    asks for the version of a distribution called vllm, and that of the CPU is called vllm-cpu.
    """
    folder = tmp_path_factory.mktemp("served")
    shutil.copytree(ROOT / TEACHER, folder / "model")
    tokenizer = json.loads((folder / "model" / "tokenizer.json").read_text())
    tokenizer["model"]["unk_token"] = "<pad>"
    (folder / "model" / "tokenizer.json").write_text(json.dumps(tokenizer))
    port, log = free_port(), folder / "server.log"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager"]
    command += ["--model", str(folder / "model"), "--served-model-name", TEACHER]
    command += ["--host", "127.0.0.1", "--port", port, "--dtype", "float32"]
    with log.open("w") as file:
        process = subprocess.Popen(
            [*command, "--max-logprobs", "16"],
            cwd=folder,
            env={**os.environ, **ENVIRONMENT},
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while not is_ready(f"http://127.0.0.1:{port}"):
            assert process.poll() is None, log.read_text()[-6000:]
            assert time.monotonic() < deadline, log.read_text()[-6000:]
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5):
            return True
    except OSError:
        return False
