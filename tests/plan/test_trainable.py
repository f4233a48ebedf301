"""What is trained, by size: as models have it, and what a plan saves where less is trained."""

from collections import Counter
from typing import Any

import pytest
from tiny import tiny_config
from transformers import AutoModelForCausalLM, LlamaConfig

from kd.models.trained import set_trained
from kd.plan import MemoryPlan, memory_plan
from kd.plan.cost import pair_of
from kd.plan.shapes import shapes_of
from kd.plan.trainable import trainable_of
from kd.recipe import StudentSection, load_recipe

SIZES = {
    key: value
    for key, value in tiny_config().to_dict().items()
    if key.startswith(("num_", "hidden_size", "intermediate", "vocab"))
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "qwen2": tiny_config("qwen2", tie_word_embeddings=False),
    "qwen3": tiny_config("qwen3"),
}
KEYS: dict[str, dict[str, Any]] = {
    "all": {},
    "adapters": {"lora": {"rank": 4}},
    "some adapters": {"lora": {"rank": 3, "target_modules": ["k_proj", "down_proj"]}},
    "head": {"freeze_head": True},
    "head and embeddings": {"freeze_head": True, "freeze_embeddings": True},
}
LORA = "student.lora.rank=16"
HEAD = 151_936 * 1536  # of the student below


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("keys", KEYS.values(), ids=KEYS)
def test_sizes_are_those_of_the_model(name: str, keys: dict[str, Any]) -> None:
    model = AutoModelForCausalLM.from_config(CONFIGS[name])
    section = StudentSection.model_validate({"model": "recipes", **keys})
    trainable = trainable_of(section, shapes_of(model))
    set_trained(model, section, seed=0)
    assert trainable.shapes == shapes_of(model)
    trained = Counter(p.numel() for p in model.parameters() if p.requires_grad)
    assert {size: count for size, count in trainable.sizes if count} == trained
    assert trainable.trains_head == model.get_output_embeddings().weight.requires_grad


def plan_of(*overrides: str) -> MemoryPlan:
    return memory_plan(load_recipe("qwen7b_to_1p5b_trunc50", overrides), 1, 8)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_is_frozen_has_no_gradients_no_optimizer_states_and_no_place_in_checkpoints(
    stage: int,
) -> None:
    engine = f"deepspeed.student=zero{stage}_bf16.json"
    whole, adapters = plan_of(engine), plan_of(engine, LORA)
    for name in ("gradients", "optimizer"):
        of_adapters = getattr(adapters.gib_per_rank, name)
        assert 0 < of_adapters < getattr(whole.gib_per_rank, name) / 50, name
    assert adapters.gib_per_rank.student_weights >= whole.gib_per_rank.student_weights
    tied_head = 0 if stage == 3 else 2 * HEAD / 2**30  # DeepSpeed keeps it
    assert 0 < adapters.checkpoint_gib - tied_head < whole.checkpoint_gib / 50


@pytest.mark.parametrize(("stage", "ratio"), [(1, 0.0), (2, 0.0), (3, 2 / 3)])
def test_frozen_weights_are_gathered_and_nothing_is_reduced_for_them(
    stage: int, ratio: float
) -> None:
    settings = (f"deepspeed.student=zero{stage}_bf16.json", "teacher.shard=gpu")
    whole, adapters = plan_of(*settings), plan_of(*settings, LORA)
    found = adapters.received_gib_per_step / whole.received_gib_per_step
    assert found == pytest.approx(ratio, abs=0.03)


def test_a_frozen_head_takes_no_gradient_in_the_loss() -> None:
    whole, frozen = (plan_of(*more).gib_per_rank for more in ((), ("student.freeze_head=true",)))
    assert (whole.loss - frozen.loss) * 2**30 >= 4 * HEAD
    assert (whole.optimizer - frozen.optimizer) * 2**30 == pytest.approx(12 * HEAD / 8, rel=0.01)


def test_work_of_a_sequence_is_less_where_less_is_trained() -> None:
    recipe = load_recipe("qwen7b_to_1p5b_trunc50")
    whole, adapters = (pair_of(load_recipe(recipe.run.name, more)) for more in ((), (LORA,)))
    weights = whole.student.num_active_weights
    added = adapters.student.num_active_weights - weights
    spared = 2 * (weights + HEAD) - 4 * 2 * added  # checkpointed: what is added runs four times
    assert whole.work.linear - adapters.work.linear == pytest.approx(spared)
