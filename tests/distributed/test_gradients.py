"""Gradients of the real path: two ranks, two ZeRO-3 engines loaded under partitioning, against one process."""

import json

import pytest
from tiny import save_tiny_model

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def results(launch, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gradients")
    # Another hidden size, another architecture, more rows in the head: a teacher shares nothing but token ids.
    save_tiny_model(folder / "teacher", seed=0, kind="qwen2", hidden_size=48, vocab_size=170, tie_word_embeddings=False)
    save_tiny_model(folder / "tied", seed=1)
    save_tiny_model(folder / "untied", seed=2, tie_word_embeddings=False)
    output = folder / "results.json"
    done = launch("tests/distributed/gradients_worker.py", str(folder), str(output))
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(output.read_text())


@pytest.mark.parametrize("layout", ["equal", "unequal", "empty"])
@pytest.mark.parametrize("checkpointing", [0, 1])
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("head", ["tied", "untied"])
def test_every_parameter_has_the_gradient_of_one_process(results, head, accumulation, checkpointing, layout):
    case = results[f"{head}-accumulation{accumulation}-checkpointing{checkpointing}-{layout}"]
    loss, reference_loss = case["loss"]
    assert reference_loss > 1.0
    assert loss == pytest.approx(reference_loss, rel=1e-5)
    assert ("lm_head.weight" in case["gradients"]) == (head == "untied")
    for name, (error, norm) in case["gradients"].items():
        assert norm > 1e-3, f"{name}: the reference's gradient vanishes, the test would show nothing"
        assert error < 1e-5 * norm, f"{name}: relative error {error / norm:.2g}"
