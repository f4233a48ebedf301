"""What sampling costs by the plan, beside what torch counts, and how a plan of rollouts hangs
together.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_config, write_tiny_recipe
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from kd.data.dataset import load_data
from kd.data.loader import Loader
from kd.data.tokenizers import load_tokenizers
from kd.errors import UserError
from kd.generation.sampling import Sampling
from kd.generation.tokens import generate_tokens
from kd.plan import memory_plan
from kd.plan.flops import forward_flops, sampling_flops
from kd.plan.gpus import Site, named_gpu
from kd.plan.lengths import batch_shape, epoch_lengths, state_traces, step_lengths
from kd.plan.placement import compare
from kd.plan.shapes import shapes_of
from kd.recipe import load_recipe


def test_sampling_takes_at_most_what_is_planned_and_not_much_less():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(max_position_embeddings=256)).eval()
    prompt, new = 24, 40
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        (ids,) = generate_tokens(
            model,
            [list(range(1, prompt + 1))],
            [0],
            Sampling(max_new_tokens=new, temperature=1.0),
            end_ids=[159],
            pad_id=0,
        )
    shapes = shapes_of(model)
    planned = sampling_flops(shapes, np.array([prompt]), np.array([len(ids)]))
    counted = counter.get_total_flops()
    # A token attends to those before it, and the formula counts all: much in a narrow model
    assert 0.6 * planned < counted <= planned
    assert forward_flops(shapes, np.array([prompt + len(ids)])) < planned


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_recipe(tmp_path_factory.mktemp("rollout_cost"))


def loader_of(recipe: Path, *settings: str) -> Loader:
    loaded = load_recipe(str(recipe), settings)
    tokenizer = load_tokenizers(loaded)
    examples = load_data(loaded, tokenizer).train
    return Loader(examples, batch_shape(loaded), loaded.run.seed, tokenizer.pad_token_id)


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_lengths_of_a_step_are_the_datas_and_those_that_responses_may_have(
    recipe: Path, num_ranks: int
):
    sampling = ("rollout.fraction=0.5", "rollout.max_new_tokens=20", "rollout.samples_per_prompt=2")
    loader = loader_of(recipe, *sampling)
    lengths = step_lengths(loader, 1, num_ranks)
    chosen = loader.rollouts(1)
    assert lengths.prompt_R.tolist() == loader.examples.num_tokens_N3[chosen, 0].tolist()
    assert lengths.response_R.tolist() == [20] * 4
    kept = [i for rank in loader.plan_step(1, 1).micro_batches for m in rank for i in m]
    of_data = loader.examples.num_input_tokens[kept].tolist()
    together = of_data + (lengths.prompt_R + lengths.response_R).tolist()
    assert sorted(lengths.read_N.tolist()) == sorted(together)
    found = np.array([5, 9, 20, 1])
    as_they_were = step_lengths(loader, 1, num_ranks, (lengths.prompt_R, found))
    together = of_data + (lengths.prompt_R + found).tolist()
    assert sorted(as_they_were.read_N.tolist()) == sorted(together)
    epoch = epoch_lengths(loader, num_ranks)
    assert len(epoch.response_R) == 4 * loader.steps_per_epoch


def test_a_plan_counts_sampling_apart_and_says_how_long_it_takes():
    changes = ["rollout.fraction=0.5", "rollout.max_new_tokens=512"]
    recipe = load_recipe("qwen3_8b_to_4b_trunc50", changes)
    site = Site(named_gpu("h100"), 1, 8)
    traces = state_traces(recipe, mean=4000, longest=16000, num_rows=1000)
    fastest = compare(recipe, traces, site)[0].plan
    flops, time = fastest.flops_per_step, fastest.step_time(site)
    assert 0 < flops.sampling < flops.model
    assert 0 < time.sampling < time.seconds
    by_layers = recipe.with_values({"rollout.gather": "layers"})
    slower = compare(by_layers, traces, site)[0].plan.step_time(site)
    assert slower.sampling >= time.sampling
    whole = memory_plan(recipe.with_values({"rollout.gather": "whole"}), 1, 8)
    assert whole.gather_peak_gib >= memory_plan(by_layers, 1, 8).gather_peak_gib


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["rollout.fraction=0.01"], "is 0 sequences"),
        (
            ["rollout.fraction=0.5", "rollout.samples_per_prompt=3"],
            "samples_per_prompt = 3 does not divide",
        ),
        (
            ['data.loss_sections=["prompt"]', "rollout.fraction=1.0"],
            r"data\.loss_sections has neither",
        ),
        (
            ["teacher.cache=cache", "rollout.fraction=1.0"],
            'teacher.cache = "cache": a cache does not cover',
        ),
        (["rollout.server=http://x:1"], "the student's change"),
        (["rollout.temperature=0"], "rollout.temperature"),
    ],
)
def test_rollouts_that_cannot_be_are_refused_before_anything_is_loaded(
    settings: list[str], message: str
):
    with pytest.raises(UserError, match=message):
        load_recipe("tiny_trunc50", settings)
