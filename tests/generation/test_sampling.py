"""Batched generation with transformers on a tiny random model."""

from pathlib import Path

import pytest
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from kd.generation.sampling import Sampling, generate_batch

PROMPTS = ["1+2", "9*9-8+6", "4", "3*7+1-2*9+5", "0-1", "8*3"]
GREEDY = Sampling(max_new_tokens=16)
SAMPLED = Sampling(max_new_tokens=16, temperature=1.0, top_p=0.95)


@pytest.fixture(scope="module")
def model(model_dir: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(model_dir).eval()


@pytest.fixture(scope="module")
def tokenizer(model_dir: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(model_dir)


def test_a_padded_batch_answers_as_each_prompt_alone_in_the_order_of_the_prompts(
    model, tokenizer
) -> None:
    batched = generate_batch(model, tokenizer, PROMPTS, GREEDY, batch_index=0)
    alone = [
        generate_batch(model, tokenizer, [prompt], GREEDY, batch_index=0)[0] for prompt in PROMPTS
    ]
    assert batched == alone
    assert len({response.text for response in batched}) > 3


def test_greedy_generation_is_the_argmax_of_the_model_step_by_step(model, tokenizer) -> None:
    ids = tokenizer(PROMPTS[1], return_tensors="pt", add_special_tokens=False)["input_ids"]
    expected = []
    while len(expected) < GREEDY.max_new_tokens and tokenizer.eos_token_id not in expected:
        next_id = model(input_ids=ids).logits[:, -1:].argmax(-1)
        ids = next_id.new_tensor([[*ids[0], next_id]])
        expected.append(int(next_id))
    response = generate_batch(model, tokenizer, [PROMPTS[1]], GREEDY, batch_index=0)[0]
    assert response.text == tokenizer.decode(expected).removesuffix("<eos>")
    assert response.num_tokens == len(expected)


def test_samples_depend_on_the_seed_and_the_batch_and_on_nothing_drawn_before(
    model, tokenizer
) -> None:
    def sample(seed: int, batch_index: int) -> list[str]:
        sampling = Sampling(**{**vars(SAMPLED), "seed": seed})
        return [r.text for r in generate_batch(model, tokenizer, PROMPTS, sampling, batch_index)]

    first = sample(0, 3)
    assert len({tuple(first), tuple(sample(0, 4)), tuple(sample(1, 3)), tuple(sample(1, 2))}) == 4
    assert sample(0, 3) == first


def test_a_response_stops_before_its_end_token_and_counts_it(model, tokenizer) -> None:
    responses = generate_batch(model, tokenizer, PROMPTS * 8, SAMPLED, batch_index=0)
    ended = [response for response in responses if response.ended]
    assert 0 < len(ended) < len(responses)
    for response in responses:
        assert "<eos>" not in response.text
        num_text_tokens = len(tokenizer(response.text, add_special_tokens=False)["input_ids"])
        assert response.num_tokens == num_text_tokens + response.ended
        assert response.ended or response.num_tokens == SAMPLED.max_new_tokens


def test_settings_that_a_model_ships_do_not_change_the_samples(model, tokenizer) -> None:
    plain = generate_batch(model, tokenizer, PROMPTS, SAMPLED, batch_index=0)
    shipped = model.generation_config
    try:
        model.generation_config = type(shipped)(
            **{**shipped.to_diff_dict(), "top_k": 1, "repetition_penalty": 5.0, "min_p": 0.9}
        )
        assert generate_batch(model, tokenizer, PROMPTS, SAMPLED, batch_index=0) == plain
    finally:
        model.generation_config = shipped


def test_end_tokens_of_the_generation_config_end_a_response_too(model, tokenizer) -> None:
    shipped = model.generation_config.eos_token_id
    before = generate_batch(model, tokenizer, PROMPTS, GREEDY, batch_index=0)[0]
    stop = before.text[-1]
    try:
        model.generation_config.eos_token_id = [shipped, tokenizer.convert_tokens_to_ids(stop)]
        after = generate_batch(model, tokenizer, PROMPTS, GREEDY, batch_index=0)[0]
    finally:
        model.generation_config.eos_token_id = shipped
    assert after.ended
    assert after.text == before.text.partition(stop)[0]
