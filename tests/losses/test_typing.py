"""The door of the loss is typed: a misspelt argument fails before anything runs."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# A call and the code of mypy's error in its line; "" for none.
CALLS = {
    'loss(h, w, h, w, i, divergence="jsd", beta=0.3, row_index=i).kd': "",
    'loss(h, w, h, w, i, divergence="jsd", return_diagnostics=True)[0].kd': "",
    'loss(h, w, h, w, i, divergense="jsd")': "[call-overload]",
    'loss(h, w, h, w, i, divergense="jsd", return_diagnostics=True)': "[call-overload]",
    'loss(h, w, h, w, i, divergence="jds")': "[call-overload]",
    'loss(h, w, h, w, i, chunk_size="4")': "[call-overload]",
    "loss(h, w, h, w, i, return_diagnostics=True).kd": "[attr-defined]",
    'sparse(h, w, i, h, i, tail="ignore").kd': "",
    'sparse(h, w, i, h, i, tial="ignore")': "[call-arg]",
}
HEADER = """from torch import Tensor
from kd.losses import distillation_loss as loss, sparse_distillation_loss as sparse
def calls(h: Tensor, w: Tensor, i: Tensor) -> None:
"""


@pytest.mark.process
def test_mypy_sees_a_misspelt_argument_here_and_in_training_and_passes_a_right_one(tmp_path):
    calls, training = tmp_path / "calls.py", tmp_path / "training.py"
    calls.write_text(HEADER + "".join(f"    {call}\n" for call in CALLS))
    student = (ROOT / "kd" / "models" / "student.py").read_text(encoding="utf-8")
    assert " divergence=" in student
    training.write_text(student.replace(" divergence=", " divergense="))
    command = [sys.executable, "-m", "mypy", "--config-file", "setup.cfg", "--no-pretty"]
    report = subprocess.run(
        [*command, calls, training], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout
    errors = [line for line in report.splitlines() if ": error: " in line]
    for number, (call, code) in enumerate(CALLS.items(), HEADER.count("\n") + 1):
        found = {error.split()[-1] for error in errors if f"calls.py:{number}: " in error}
        assert found == ({code} if code else set()), (call, report)
    in_training = [error for error in errors if "training.py" in error]
    assert 'Unexpected keyword argument "divergense"' in in_training[0], report
