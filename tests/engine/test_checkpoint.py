"""A checkpoint of two ranks gives back what was saved, also to an engine that has trained on."""

import json

import pytest
from tiny import save_tiny_model

pytestmark = pytest.mark.dist


def test_a_checkpoint_gives_back_weights_optimizer_and_state(launch, tmp_path):
    save_tiny_model(tmp_path / "tied", seed=1)
    output = tmp_path / "results.json"
    done = launch("tests/engine/checkpoint_worker.py", str(tmp_path), str(output))
    assert done.returncode == 0, done.stderr[-4000:]
    results = json.loads(output.read_text())
    assert all(results.values()), results
