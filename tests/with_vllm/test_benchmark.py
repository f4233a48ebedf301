"""benchmarks/generation.py, in small."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ENVIRONMENT, ROOT

pytestmark = pytest.mark.vllm


def test_both_backends_are_measured_on_the_same_responses(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "generation.py", "--problems", "8"]
        + ["--rounds", "1", "--output", tmp_path],
        cwd=tmp_path,
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    content = json.loads((tmp_path / "generation.json").read_text())
    assert [row["num_equal"] for row in content["rows"]] == [8, 8]
    (of_transformers,), (of_vllm,) = (row["seconds"] for row in content["rows"])
    assert content["vllm_over_transformers"] == pytest.approx(of_transformers / of_vllm)
    assert (tmp_path / "generation.md").read_text().count("\n") == 6
