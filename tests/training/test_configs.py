"""The shipped DeepSpeed configurations on two ranks, against the same optimizer steps in one
process.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from configs_worker import ACCUMULATION, CASES, NUM_STEPS, POISONS, RATE, make_batch, make_recipe
from full_logits import full_loss
from list_experts import ListExpertsConfig, ListExpertsForCausalLM
from safetensors.torch import load_file
from tiny import save_tiny_model, tiny_config
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from kd.recipe import Recipe

pytestmark = pytest.mark.dist
ALL_CASES = pytest.mark.parametrize("case", CASES)


@pytest.fixture(scope="module")
def folder(launch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MODELS and OUTPUT of the worker, after its run."""
    folder = tmp_path_factory.mktemp("configs")
    save_tiny_model(folder / "tied", seed=1)
    save_tiny_model(folder / "untied", seed=2, tie_word_embeddings=False)
    save_tiny_model(
        folder / "dense_teacher", seed=0, kind="qwen2", vocab_size=170, tie_word_embeddings=False
    )
    sizes = tiny_config().to_dict() | {"num_experts_per_tok": 1, "moe_intermediate_size": 16}
    torch.manual_seed(3)
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, num_experts=8)).save_pretrained(folder / "experts")
    MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=8)).save_pretrained(
        folder / "experts_teacher"
    )
    ListExpertsForCausalLM(ListExpertsConfig(**tiny_config().to_dict())).save_pretrained(
        folder / "list_experts"
    )
    zero = {"contiguous_gradients": True, "reduce_bucket_size": 5000000}
    for stage in (1, 2):
        config = {"zero_optimization": {"stage": stage, **zero}}
        (folder / f"zero{stage}_fp32.json").write_text(json.dumps(config))
    done = launch("tests/training/configs_worker.py", str(folder), str(folder))
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


@ALL_CASES
def test_losses_and_gradient_norms_are_those_of_one_process(
    folder: Path, ranks: list[dict[str, Any]], case: str
):
    losses, grad_norms, _ = one_process(make_recipe(folder, case), NUM_STEPS)
    tolerance = 3e-2 if "bf16" in case else 2e-5
    assert losses[-1] < losses[0] - 0.1, "the reference does not learn, the test would show little"
    for result in (rank[case] for rank in ranks):
        assert result["losses"] == pytest.approx(losses, rel=tolerance)
        assert result["grad_norms"] == pytest.approx(grad_norms, rel=tolerance)
        assert not any(result["skipped"])


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("zero3")])
def test_gradients_are_those_of_one_process(folder: Path, case: str):
    _, _, expected = one_process(make_recipe(folder, case), 1)
    actual = load_file(folder / case / "gradients.safetensors")
    tolerance = 5e-2 if "bf16" in case else 1e-5
    assert actual.keys() == expected.keys()
    total = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    for name, gradient in expected.items():
        assert (actual[name] - gradient).norm() < tolerance * max(gradient.norm(), 0.1 * total), (
            name
        )


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("head", ["tied", "untied"])
def test_a_student_that_is_not_partitioned_learns_the_same(
    ranks: list[dict[str, Any]], head: str, stage: int
):
    whole, partitioned = (
        ranks[0][f"{name}-{head}"]["losses"] for name in (f"zero{stage}_bf16", "zero3_bf16")
    )
    assert whole == pytest.approx(partitioned, rel=1e-2)


@pytest.mark.parametrize("poison", POISONS)
@ALL_CASES
def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_both(
    ranks: list[dict[str, Any]], case: str, poison: str
):
    for rank in ranks:
        assert rank[case]["poisoned"][poison] == {"skipped": True, "unchanged": True}


@ALL_CASES
def test_the_teacher_does_not_change(ranks: list[dict[str, Any]], case: str):
    assert all(rank[case]["teacher unchanged"] for rank in ranks)


@ALL_CASES
def test_a_student_exported_untrained_is_the_one_that_was_loaded(folder: Path, case: str):
    dtype = torch.bfloat16 if "bf16" in case else torch.float32
    loaded = AutoModelForCausalLM.from_pretrained(
        make_recipe(folder, case).student.model, dtype=dtype
    ).state_dict()
    exported = AutoModelForCausalLM.from_pretrained(folder / case / "loaded").state_dict()
    assert_same_bits(exported, loaded)


@ALL_CASES
def test_a_trained_student_is_exported_whole_and_in_its_dtype(folder: Path, case: str):
    trained = load_file(folder / case / "state.safetensors")
    assert all(tensor.isfinite().all() for tensor in trained.values())
    exported = AutoModelForCausalLM.from_pretrained(folder / case / "trained")
    assert (exported.lm_head.weight is exported.get_input_embeddings().weight) == (
        "untied" not in case
    )
    assert_same_bits(exported.state_dict(), trained)


def assert_same_bits(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype
        assert torch.equal(actual[name], tensor), name


@pytest.mark.parametrize(
    ("case", "role"), [("experts", "student"), ("experts", "teacher"), ("list_experts", "student")]
)
def test_the_two_ranks_send_their_tokens_to_different_experts(folder: Path, case: str, role: str):
    section = getattr(make_recipe(folder, f"zero3_cpu-{case}"), role)
    model, chosen = AutoModelForCausalLM.from_pretrained(section.model), []
    for name, module in model.named_modules():
        if name.endswith("mlp.gate"):
            module.register_forward_hook(
                lambda module, inputs, output: chosen.append(chosen_experts(output))
            )
    for rank in range(2):
        model(make_batch(rank, 0).input_ids)
    assert len(chosen) == 4
    assert chosen[:2] != chosen[2:]


def chosen_experts(output: Any) -> list[int]:
    logits = output[0] if isinstance(output, tuple) else output
    return logits.flatten(0, -2).argmax(-1).unique().tolist()


def one_process(
    recipe: Recipe, num_steps: int
) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """Losses, gradient norms, and the first step's gradients: full logits, plain autograd,
    PyTorch's AdamW, fp32.
    """
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(section.model, dtype=torch.float32)
        for section in (recipe.student, recipe.teacher)
    )
    training = recipe.training
    optimizer = torch.optim.AdamW(
        student.parameters(), RATE, training.adam_betas, training.adam_eps, training.weight_decay
    )
    losses, norms, first = [], [], {}
    batches = [make_batch(rank, index) for rank in range(2) for index in range(ACCUMULATION)]
    for _ in range(num_steps):
        total = torch.stack([full_loss(recipe, student, teacher, batch) for batch in batches]).sum()
        loss = total / sum(batch.num_supervised_tokens for batch in batches)
        optimizer.zero_grad()
        loss.backward()
        # An expert that no token visits has none.
        first = first or {
            n: torch.zeros_like(p) if p.grad is None else p.grad.clone()
            for n, p in student.named_parameters()
        }
        norms.append(
            float(torch.nn.utils.clip_grad_norm_(student.parameters(), training.max_grad_norm))
        )
        optimizer.step()
        losses.append(loss.item())
    return losses, norms, first
