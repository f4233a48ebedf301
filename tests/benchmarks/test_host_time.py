"""benchmarks/host_time.py on two small layouts: plain modules are the measure, and the host of this
project waits once in a step.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import ROOT

pytestmark = pytest.mark.benchmark


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    output: Path = tmp_path_factory.mktemp("host_time")
    script = [sys.executable, str(ROOT / "benchmarks" / "host_time.py"), "--output", str(output)]
    small = ["--rounds", "1", "--layers", "2", "--layouts", "gpu_zero2,zero3_zero3"]
    done = subprocess.run(
        [*script, *small], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    content = json.loads((output / "host_time.json").read_text())
    assert (output / "host_time.md").read_text().count("\n") == 2 + len(content["rows"])
    return {row["layout"]: row for row in content["rows"]}


def test_each_layout_has_a_row_relative_to_plain_modules(rows: dict[str, dict[str, Any]]) -> None:
    assert rows.keys() == {"plain", "gpu_zero2", "zero3_zero3"}
    assert rows["plain"]["ratio_to_plain"] == 1.0
    for row in rows.values():
        assert row["ms_per_micro_batch"] > 0
        assert len(row["rounds_ms"]) == 1


@pytest.mark.parametrize("layout", ["gpu_zero2", "zero3_zero3"])
def test_this_project_and_transformers_wait_once_in_a_step_and_never_in_a_micro_batch(
    rows: dict[str, dict[str, Any]], layout: str
) -> None:
    waits = rows[layout]["waits"]
    own = [waits[package] for package in ("kd", "transformers")]
    assert [part["per_micro_batch"] for part in own] == [0.0, 0.0], own
    assert sum(part["per_step"] for part in own) == 1.0, own
    assert waits["deepspeed"]["sites"], "DeepSpeed's own are listed by call site"
