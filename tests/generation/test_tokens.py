"""Draws by a seed of their own: of the model's distribution, and the same in any batch."""

import numpy as np
import pytest
import torch
from tiny import tiny_config
from transformers import AutoModelForCausalLM, PreTrainedModel

from kd.generation.sampling import Sampling
from kd.generation.tokens import SeededDraws, generate_tokens

DEVICE = torch.device("cpu")
SAMPLING = Sampling(max_new_tokens=12, temperature=1.3, top_p=0.95)
OPTIONS = {"sampling": SAMPLING, "end_ids": [5], "pad_id": 0}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config()).eval()


def draws_of(logits_V: torch.Tensor, num: int, **options: float) -> np.ndarray:
    """How often each token is drawn, in 100 sequences at a time."""
    counts = np.zeros(len(logits_V))
    for start in range(0, num, 100):
        seeds, sampling = range(start, start + 100), Sampling(max_new_tokens=1, **options)
        processor = SeededDraws(seeds, sampling, DEVICE)
        scores = processor(torch.zeros(100, 1, dtype=torch.long), logits_V.expand(100, -1))
        counts += np.bincount(scores.argmax(-1), minlength=len(logits_V))
    return counts


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_tokens_are_drawn_as_often_as_they_are_likely(temperature: float):
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -8.0])
    counts = draws_of(logits, 20_000, temperature=temperature, top_p=1.0)
    expected = 20_000 * torch.softmax(logits / temperature, -1).numpy()
    chi_square = float((((counts - expected) ** 2) / expected)[:4].sum())
    assert chi_square < 20.5  # of 4 degrees of freedom, one in 2,500
    wrong = 20_000 * torch.softmax(logits / (1.2 * temperature), -1).numpy()
    assert float((((counts - wrong) ** 2) / wrong)[:4].sum()) > 20.5


def test_the_nucleus_bounds_what_is_drawn():
    logits = torch.tensor([0.6, 0.3, 0.07, 0.03]).log()
    counts = draws_of(logits, 3000, temperature=1.0, top_p=0.85)
    assert counts[2:].sum() == 0
    assert counts[0] / 3000 == pytest.approx(2 / 3, abs=0.03)


def test_a_response_is_the_same_alone_and_beside_others_and_ends_with_its_end(model):
    prompts = [[7, 8, 9], [10, 11, 12, 13, 14], [15], [7, 8, 9]]
    seeds = [1, 2, 3, 4]
    together = generate_tokens(model, prompts, seeds, **OPTIONS)
    alone = [
        generate_tokens(model, [prompt], [seed], **OPTIONS)[0]
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]
    assert together == alone
    assert together[0] != together[3], "one prompt, two seeds"
    many = generate_tokens(model, [[7]] * 200, range(200), **OPTIONS)
    ended = [ids for ids in many if ids[-1] == 5]
    assert ended
    assert all(5 not in ids[:-1] for ids in many)
    assert {len(ids) for ids in many if ids[-1] != 5} == {12}


def test_nothing_is_drawn_from_torchs_own_generator_and_the_model_keeps_its_settings(model):
    settings, state = model.generation_config, torch.get_rng_state()
    generate_tokens(model, [[7, 8]], [1], **OPTIONS)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.generation_config is settings
