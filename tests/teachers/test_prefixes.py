"""A cache is one of prefixes: of models that scale positions by the longest one it is refused."""

from typing import Any

import pytest
import torch
from tiny import tiny_config
from transformers import AutoModelForCausalLM

from kd.errors import UserError
from kd.teachers.live import LiveTeacher, TeacherModule
from kd.teachers.prefixes import check_prefixes, thresholds

ORIGINAL = 24
FACTORS = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0]}
SCALED = {
    "longrope": {
        "rope_type": "longrope",
        "original_max_position_embeddings": ORIGINAL,
        "factor": 4.0,
        **FACTORS,
    },
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": ORIGINAL,
    },
    "linear": {"rope_type": "linear", "factor": 4.0},
}


def teacher_with(scaling: dict[str, Any]) -> LiveTeacher:
    torch.manual_seed(0)
    positions = ORIGINAL if scaling["rope_type"] == "dynamic" else 4 * ORIGINAL
    rope = {"rope_theta": 10000.0, **scaling}
    config = tiny_config(max_position_embeddings=positions, rope_parameters=rope)
    model = AutoModelForCausalLM.from_config(config)
    return LiveTeacher(model, TeacherModule(model))


def trace(num_tokens: int) -> torch.Tensor:
    return torch.randint(160, (num_tokens,), generator=torch.Generator().manual_seed(1))


# Half of the trace above, at and below the length at which scaling begins
@pytest.mark.parametrize("num_tokens", [ORIGINAL + 1, 2 * ORIGINAL, 3 * ORIGINAL])
@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_positions_that_the_longest_one_scales_are_refused_beyond_their_threshold(
    kind: str, num_tokens: int
):
    with pytest.raises(UserError, match=r"states of the first \d+ depend on later tokens"):
        check_prefixes(teacher_with(SCALED[kind]), trace(num_tokens))


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_they_serve_where_every_length_stays_below_it(kind: str):
    check_prefixes(teacher_with(SCALED[kind]), trace(ORIGINAL))


@pytest.mark.parametrize("kind", ["yarn", "linear"])
def test_positions_that_are_scaled_alike_at_every_length_serve(kind: str):
    check_prefixes(teacher_with(SCALED[kind]), trace(3 * ORIGINAL))


def test_thresholds_are_found_in_each_kind_of_layer():
    nested = {"full_attention": SCALED["longrope"], "sliding_attention": {"rope_type": "default"}}
    config = tiny_config()
    config.rope_parameters = nested
    assert thresholds(config) == {ORIGINAL}
    assert thresholds(tiny_config()) == set()
