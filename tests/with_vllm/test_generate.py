"""launch/generate.py with vLLM: the traces of transformers, through a kill and from two ranks."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import ENVIRONMENT, ROOT

pytestmark = pytest.mark.vllm
NUM_BATCHES = 10


@pytest.fixture(scope="module")
def common(problems: Path) -> list[str]:
    words = ["--recipe", "tiny_trunc50", "--problems", str(problems), "--batch-size", "5"]
    return [*words, "--keep", "correct"]


@pytest.fixture(scope="module")
def expected(
    python: Callable[..., Any], common: list[str], tmp_path_factory: pytest.TempPathFactory
) -> bytes:
    output = tmp_path_factory.mktemp("expected") / "traces.jsonl"
    done = python("generate.py", *common, "--output", output)
    assert "traces.jsonl: 50 kept" in done.stdout
    return output.read_bytes()


def test_a_killed_vllm_continues_to_the_traces_of_transformers(
    python: Callable[..., Any], common: list[str], expected: bytes, tmp_path: Path
) -> None:
    """And its engine ends with it."""
    output = tmp_path / "traces.jsonl"
    journal = tmp_path / "traces.jsonl.progress"
    options = [*common, "--backend", "vllm", "--output", str(output)]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, ROOT / "launch" / "generate.py", *options],
            cwd=ROOT,
            env={**os.environ, **ENVIRONMENT},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    deadline = time.monotonic() + 300
    while not (journal.exists() and journal.read_bytes().count(b"\n") >= 3):
        assert process.poll() is None, (tmp_path / "log").read_text()[-6000:]
        assert time.monotonic() < deadline, (tmp_path / "log").read_text()[-6000:]
        time.sleep(0.01)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = journal.read_bytes().count(b"\n") - 1
    assert 2 <= done < NUM_BATCHES
    assert not output.exists()
    again = python("generate.py", *options)
    assert output.read_bytes() == expected
    assert f"batch {done + 1}/{NUM_BATCHES}: " in again.stdout
    assert f"batch {done}/{NUM_BATCHES}: " not in again.stdout
    _, alive = psutil.wait_procs(children, timeout=30)
    assert alive == []


def test_two_ranks_ask_a_server_and_leave_one_file(
    common: list[str], expected: bytes, server: str, tmp_path: Path
) -> None:
    output = tmp_path / "traces.jsonl"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(ROOT / "launch" / "generate.py"), *common]
    done = subprocess.run(
        [*command, "--server", server, "--output", str(output)],
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert output.read_bytes() == expected
    lines = output.with_name("traces.jsonl.progress").read_text().splitlines()
    assert len(lines) == 1 + NUM_BATCHES
    assert json.loads(lines[0])["backend"] == "server"
    names = {path.name for path in tmp_path.iterdir()}
    assert {name for name in names if not name.endswith(".lock")} == {
        "traces.jsonl",
        "traces.jsonl.progress",
    }


def test_several_samples_differ_and_are_alike_for_a_seed(
    python: Callable[..., Any], common: list[str], server: str, tmp_path: Path
) -> None:
    """Alike but for a few: a server promises no more, since its kernels may round otherwise. vLLM
    takes no temperature above 2.
    """
    options = [*common, "--server", server, "--temperature", "2.0", "--limit", "20"]
    options += ["--top-p", "1.0", "--num-samples", "4", "--keep", "closed"]
    found = {}
    for name, seed, batch_size in (("one", 0, 20), ("again", 0, 16), ("other", 1, 20)):
        output = tmp_path / f"{name}.jsonl"
        words = ["--seed", seed, "--batch-size", batch_size, "--output", output]
        python("generate.py", *options, *words)
        rows = [json.loads(line) for line in output.read_text().splitlines()]
        found[name] = {row["id"]: row["reasoning"] for row in rows}
    assert len(found["one"]) > 20
    problems = {name.rpartition("/")[0] for name in found["one"]}
    assert len(set(found["one"].values())) > len(problems)
    shares = {
        name: sum(found["one"].get(key) == text for key, text in found[name].items())
        / len(found[name])
        for name in ("again", "other")
    }
    assert shares["again"] > 0.9
    assert shares["other"] < 0.1
