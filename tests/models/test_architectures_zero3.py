"""Every architecture of the table as student and as teacher on two ranks under ZeRO-3, through the
code that builds and trains both.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from architectures import ARCHITECTURES

pytestmark = pytest.mark.dist

REFUSED = "xlstm"  # transformers' own start of its weights reads the shape of a partitioned one


def test_two_ranks_learn_from_every_architecture_what_one_process_would(
    launch: Callable[..., Any], tmp_path: Path
) -> None:
    output = tmp_path / "losses.json"
    done = launch("tests/models/architectures_worker.py", str(tmp_path), str(output))
    assert done.returncode == 0, done.stdout + done.stderr
    losses = json.loads(output.read_text())
    assert "xlstm cannot be loaded under ZeRO-3" in losses.pop(REFUSED)
    assert losses.keys() == ARCHITECTURES.keys() - {REFUSED}
    for name, (loss, expected) in losses.items():
        assert loss == pytest.approx(expected, rel=1e-5), name
