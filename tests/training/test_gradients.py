"""What two ranks with two ZeRO-3 engines, loaded under partitioning, make of a global batch,
against one process.
"""

import json
from itertools import product

import pytest
from tiny import ROOT, save_tiny_model

from kd.data.truncate import SECTIONS

pytestmark = pytest.mark.dist
ALL_CASES = pytest.mark.parametrize(
    "case",
    [
        f"{head}-accumulation{accumulation}-checkpointing{checkpointing}-{layout}"
        for head, accumulation, checkpointing, layout in product(
            ["tied", "untied"], [1, 4], [0, 1], ["equal", "unequal", "empty"]
        )
    ],
)


@pytest.fixture(scope="module")
def results(launch, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gradients")
    # Another hidden size, another architecture, more rows in the head: a teacher shares nothing but
    # token ids.
    save_tiny_model(
        folder / "teacher",
        seed=0,
        kind="qwen2",
        hidden_size=48,
        vocab_size=170,
        tie_word_embeddings=False,
    )
    save_tiny_model(folder / "tied", seed=1)
    save_tiny_model(folder / "untied", seed=2, tie_word_embeddings=False)
    # As in a real model, the embedding does not fit into a bucket of reduction; other weights do.
    ds_config = json.loads((ROOT / "ds_configs" / "zero3_cpu.json").read_text())
    ds_config["zero_optimization"]["reduce_bucket_size"] = 4000
    (folder / "small_buckets.json").write_text(json.dumps(ds_config))
    output = folder / "results.json"
    done = launch("tests/training/gradients_worker.py", str(folder), str(output))
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(output.read_text())


@ALL_CASES
def test_every_parameter_has_the_gradient_of_one_process(results, case):
    loss, reference_loss = results[case]["loss"]
    assert reference_loss > 1.0
    assert loss == pytest.approx(reference_loss, rel=1e-5)
    assert ("lm_head.weight" in results[case]["gradients"]) == case.startswith("untied")
    for name, (error, norm) in results[case]["gradients"].items():
        assert norm > 1e-3, (
            f"{name}: the reference's gradient vanishes, the test would show nothing"
        )
        assert error < 1e-5 * norm, f"{name}: relative error {error / norm:.2g}"


@ALL_CASES
def test_the_diagnostics_are_those_of_one_process(results, case):
    actual, expected = results[case]["diagnostics"]
    parts = {
        f"section {SECTIONS.index(name)}": part for name, part in actual.pop("by_section").items()
    }
    parts |= {
        f"position {i}": part
        for i, part in enumerate(actual.pop("by_position"))
        if part is not None
    }
    parts["all"] = actual
    assert parts.keys() == expected.keys()
    assert len(parts) > 5
    for part, means in expected.items():
        assert parts[part] == pytest.approx(means, rel=1e-4), part


@pytest.mark.parametrize(
    "case",
    [
        f"{head}-accumulation{accumulation}-checkpointing{checkpointing}"
        for head, accumulation, checkpointing in product(["tied", "untied"], [1, 4], [0, 1])
    ],
)
def test_between_steps_the_partitioned_student_generates_as_the_whole_model_does(results, case):
    gathered_whole, by_layers, expected = results[case]["generated"]
    assert len(expected[0]) > 8
    assert gathered_whole == expected
    assert by_layers == expected
    for name, (error, norm) in results[f"{case}-after"]["gradients"].items():
        assert error < 1e-5 * norm, f"{name}: relative error {error / norm:.2g}"
