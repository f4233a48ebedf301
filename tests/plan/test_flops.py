"""FLOPs by formula, against torch's own counter over transformers' models, the loss, and whole
optimizer steps.
"""

import json
from dataclasses import astuple
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pytest
import torch
from flops_worker import NUM_STEPS, SETTINGS
from tiny import tiny_config, write_tiny_recipe
from torch.utils.checkpoint import set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen3MoeConfig,
)

from kd.losses import distillation_loss
from kd.models.trained import set_trained
from kd.plan.flops import PairShapes, StepFlops, forward_flops, loss_flops
from kd.plan.shapes import ModelShapes, config_shapes, shapes_of
from kd.plan.trainable import trainable_of
from kd.recipe import StudentSection

SIZES = {
    key: value
    for key, value in tiny_config().to_dict().items()
    if key.startswith(("num_", "hidden_size", "intermediate", "vocab"))
    or key == "max_position_embeddings"
}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "qwen2": tiny_config("qwen2"),
    "qwen3": tiny_config("qwen3"),
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=160),
    "mixtral": MixtralConfig(**SIZES | EXPERTS),
    "qwen3_moe": Qwen3MoeConfig(**SIZES | EXPERTS, moe_intermediate_size=24, head_dim=8),
}
LENGTH = 96
# What is counted here is equal; other versions may make products of rotary embeddings and the like.
RELATIVE = 0.005


def counted(function: Any) -> float:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def eager(config: PretrainedConfig) -> Any:
    """The counter has no formula for fused experts, nor for fused attention on a CPU."""
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").train()
    model.set_experts_implementation("eager")
    return model


def pair_of_two() -> tuple[ModelShapes, ModelShapes]:
    """Teacher and student, of two widths and vocabularies."""
    return config_shapes(tiny_config(hidden_size=64, vocab_size=192)), config_shapes(
        tiny_config("qwen2")
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_a_forward_pass_has_the_flops_that_torch_counts(name: str):
    model, input_ids = eager(CONFIGS[name]), torch.arange(2 * LENGTH).view(2, -1) % 160
    expected = counted(lambda: model.base_model(input_ids=input_ids, use_cache=False))
    assert forward_flops(shapes_of(model), np.array([LENGTH, LENGTH])) == pytest.approx(
        expected, rel=RELATIVE
    )


TRAINED: dict[str, dict[str, Any]] = {
    "all": {},
    "adapters": {"lora": {"rank": 4}},
    "some adapters": {"lora": {"rank": 4, "target_modules": ["q_proj", "down_proj"]}},
    "frozen embeddings": {"freeze_embeddings": True, "freeze_head": True},
}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["whole", "checkpointed"])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
@pytest.mark.parametrize("keys", TRAINED.values(), ids=TRAINED)
def test_a_backward_pass_has_the_flops_that_torch_counts(
    name: str, checkpointing: bool, keys: dict[str, Any]
):
    model, input_ids = eager(CONFIGS[name]), torch.arange(LENGTH).view(1, -1)
    section = StudentSection.model_validate({"model": "recipes", **keys})
    student = trainable_of(section, shapes_of(model))
    set_trained(model, section, seed=0)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    # As it is under ZeRO-3, whose linear layers save their inputs last
    with set_checkpoint_early_stop(False):
        hidden = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
    lengths_N = np.array([LENGTH])
    flops = PairShapes(
        student.shapes, None, checkpointing, student.num_frozen_weights, student.trains_head
    ).step_flops(lengths_N, np.array([0]), num_steps=1)
    backward = flops.student - forward_flops(student.shapes, lengths_N) + flops.recomputed
    assert backward == pytest.approx(counted(hidden.sum().backward), rel=RELATIVE)
    assert (flops.recomputed > 0) == checkpointing


@pytest.mark.parametrize("trains_head", [True, False], ids=["trained", "frozen head"])
@pytest.mark.parametrize("has_teacher", [True, False], ids=["kd", "ce"])
def test_the_loss_has_the_flops_that_torch_counts_on_supervised_rows_alone(
    has_teacher: bool, trains_head: bool
):
    teacher, student = pair_of_two()
    hidden, labels = (
        torch.randn(2, LENGTH, student.hidden_size),
        torch.arange(2 * LENGTH).view(2, -1) % 160,
    )
    labels[:, ::3] = -100
    head = torch.randn(student.vocab_size, student.hidden_size, requires_grad=trains_head)
    of_teacher = (
        torch.randn(2, LENGTH, teacher.hidden_size),
        torch.randn(teacher.vocab_size, teacher.hidden_size),
    )

    def loss() -> None:
        inputs = hidden.requires_grad_(), head, *(of_teacher if has_teacher else (None, None))
        distillation_loss(
            *inputs, labels, kd_weight=0.5 if has_teacher else 0.0, chunk_size=50
        ).loss.backward()

    num_supervised = int((labels >= 0).sum())
    planned = loss_flops(
        student, teacher if has_teacher else None, num_supervised, trains_head=trains_head
    )
    assert planned == pytest.approx(counted(loss), rel=RELATIVE)


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[float]]]:
    folder = tmp_path_factory.mktemp("flops")
    recipe, output = write_tiny_recipe(folder), folder / "flops.json"
    worker = Path(__file__).with_name("flops_worker.py")
    done = forked.run([worker, recipe, output])
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(output.read_text())


@pytest.mark.process
@pytest.mark.parametrize(("index", "setting"), list(enumerate(SETTINGS)))
def test_optimizer_steps_have_the_flops_that_torch_counts(steps: Any, index: int, setting: Any):
    result = steps[index]
    assert len(result["counted"]) == NUM_STEPS
    assert result["planned"] == pytest.approx(result["counted"], rel=RELATIVE)


def test_flops_of_several_batches_are_their_mean():
    pair = PairShapes(*reversed(pair_of_two()), checkpointing=True)
    lengths_N = np.array([10, 10, 90, 90])
    batches = [
        pair.step_flops(lengths_N[part], lengths_N[part] - 1, 1)
        for part in (slice(0, 2), slice(2, 4))
    ]
    mean = StepFlops(*np.mean([astuple(batch) for batch in batches], axis=0))
    assert astuple(pair.step_flops(lengths_N, lengths_N - 1, 2)) == pytest.approx(astuple(mean))


def test_half_of_the_tokens_are_less_than_half_of_the_flops():
    teacher, student = pair_of_two()
    half, whole = (
        PairShapes(student, teacher, False).step_flops(np.array([n]), np.array([n]), 1)
        for n in (48, 96)
    )
    assert half.model < whole.model / 2
    assert half.loss == whole.loss / 2
