"""benchmarks/teacher_cache.py on the embedded pair: exact kinds are exact, and bytes are stated."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import ROOT, write_tiny_recipe

pytestmark = pytest.mark.benchmark


def test_every_kind_has_a_row_and_exact_ones_are_exact(tmp_path: Path) -> None:
    recipe = write_tiny_recipe(tmp_path)
    script = [sys.executable, str(ROOT / "benchmarks" / "teacher_cache.py"), "--rows", "2"]
    command = [*script, "--recipe", str(recipe), "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = {
        row["kind"]: row
        for row in json.loads((tmp_path / "teacher_cache.json").read_text())["rows"]
    }
    for kind in ("hidden fp32", "vector fp32"):
        assert rows[kind]["kd"] == pytest.approx(rows[kind]["kd_of_teacher"], rel=1e-5)
        assert rows[kind]["gradient_error"] < 1e-4
    errors = [rows[f"hidden {dtype}"]["gradient_error"] for dtype in ("fp32", "bf16", "int8")]
    assert errors == sorted(errors)
    mean = rows["sampled 12, mean of 200"]
    assert abs(mean["kd"] - mean["kd_of_teacher"]) < 4 * mean["standard_error"]
    assert (tmp_path / "teacher_cache.md").read_text().count("\n") == 2 + len(rows)
