"""The sizes of a model that its cost depends on, from its configuration: no weight is read.

Those of the hub models that recipes name are stored in recipes/shapes/, so that a plan needs no
network. When a model is loaded, `check_shapes` compares it with its file.
"""

import dataclasses
import functools
import json
from collections import Counter
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from kd.cache.store import read_manifest
from kd.engine.zero3 import NUM_EXPERTS, num_parameters, whole_shape
from kd.errors import UserError
from kd.hub import hub_errors
from kd.models.loading import load_config
from kd.recipe import RECIPES_DIR, ModelSection, Recipe, find_input

SHAPES_DIR = RECIPES_DIR / "shapes"
# In configurations: experts that see a token
NUM_SEEING = (
    "num_experts_per_tok",
    "moe_k",
    "moe_topk",
)


@dataclasses.dataclass(frozen=True)
class ModelShapes:
    """A decoder's sizes. parameter_sizes: how many parameters there are of each number of elements,
    tied ones once.
    """

    num_layers: int
    hidden_size: int
    intermediate_size: int  # of the experts that see a token together, where there are experts
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    has_qk_norm: bool
    vocab_size: int  # rows of the lm_head
    tie_word_embeddings: bool
    max_position_embeddings: int
    # Of the layers' matrices that one token meets: of experts those that see it
    num_active_weights: int
    parameter_sizes: tuple[tuple[int, int], ...]

    @property
    def num_parameters(self) -> int:
        return sum(size * count for size, count in self.parameter_sizes)


@functools.cache
def model_shapes(section: ModelSection, *, role: str) -> ModelShapes:
    """The shapes of a recipe's model: of a local folder, else as stored in recipes/shapes/, else of
    the hub's config.

    role ("teacher" or "student") names the section of the recipe in errors. Raises UserError when
    none is to be had.
    """
    stored = shapes_file(section.model)
    if find_input(section.model) is None and stored.is_file():
        return read_shapes(stored)
    config = load_config(section, role=role)
    with hub_errors(f"{role}.model", section.model):
        return config_shapes(config, trust_remote_code=section.trust_remote_code)


def teacher_shapes(recipe: Recipe) -> ModelShapes | None:
    """Of the teacher that a run holds: with a cache of hidden states only its head, with one of
    tokens nothing.

    One that is not filled yet is planned as hidden states, which take most. Raises UserError as
    model_shapes does.
    """
    section = recipe.teacher
    if section is None:
        return None
    whole = model_shapes(section, role="teacher")
    if section.cache is None:
        return whole
    is_filled = (Path(section.cache) / "manifest.json").is_file()
    if is_filled and read_manifest(section.cache).kind != "hidden":
        return None
    return dataclasses.replace(
        whole,
        num_layers=0,
        num_active_weights=0,
        parameter_sizes=((whole.vocab_size * whole.hidden_size, 1),),
    )


def sampler_shapes(recipe: Recipe) -> ModelShapes:
    """Of the model that writes the recipe's rollouts."""
    assert recipe.rollout is not None
    assert recipe.teacher is not None
    if recipe.rollout.source == "teacher":
        return model_shapes(recipe.teacher, role="teacher")
    return model_shapes(recipe.student, role="student")


def check_shapes(section: ModelSection, model: PreTrainedModel, *, role: str) -> None:
    """Raise UserError when a loaded model is not what recipes/shapes/ says."""
    path = shapes_file(section.model)
    if find_input(section.model) is not None or not path.is_file():
        return  # planned from the model's own configuration
    stored, loaded = dataclasses.asdict(read_shapes(path)), dataclasses.asdict(shapes_of(model))
    # Positions cost nothing until tokens take them: a checkpoint may be edited to allow more.
    differing = [
        name
        for name in stored
        if stored[name] != loaded[name] and name != "max_position_embeddings"
    ]
    if differing:
        listing = "; ".join(
            f"{name} is {loaded[name]}, stored as {stored[name]}" for name in differing
        )
        raise UserError(
            f"{role}.model = {section.model!r} differs from {path}, by which memory was planned: "
            f"{listing}. Remove that file, or set the model's revision"
        )


def config_shapes(config: PretrainedConfig, *, trust_remote_code: bool = False) -> ModelShapes:
    """The shapes of the model that a configuration describes, without its weights."""
    with torch.device("meta"):
        return shapes_of(
            AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        )


def shapes_of(model: PreTrainedModel) -> ModelShapes:
    """The shapes of a model: on any device, partitioned by ZeRO-3 or not.

    Raises UserError for an architecture whose configuration has no attention heads or no limit of
    positions.
    """
    try:
        return _shapes_of(model)
    except AttributeError as error:
        raise UserError(f"cannot plan the cost of {type(model).__name__}: {error}") from None


def _shapes_of(model: PreTrainedModel) -> ModelShapes:
    config, head = model.config.get_text_config(), model.get_output_embeddings()
    num_heads = config.num_attention_heads
    tokens_width = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None)
    if getattr(config, "moe_intermediate_size", None):
        tokens_width = config.moe_intermediate_size * config.num_experts_per_tok
    sizes = Counter(num_parameters([parameter]) for parameter in model.parameters())
    return ModelShapes(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        intermediate_size=tokens_width or 4 * config.hidden_size,
        num_heads=num_heads,
        num_key_value_heads=getattr(config, "num_key_value_heads", None) or num_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // num_heads,
        has_qk_norm=any("q_norm" in name for name, _ in model.named_parameters()),
        vocab_size=num_parameters([head.weight]) // config.hidden_size,
        tie_word_embeddings=head.weight is model.get_input_embeddings().weight,
        max_position_embeddings=config.max_position_embeddings,
        num_active_weights=_num_active_weights(model),
        parameter_sizes=tuple(sorted(sizes.items())),
    )


def _num_active_weights(model: PreTrainedModel) -> int:
    """Elements of all matrices but embeddings and lm_head. Experts are one 3-D parameter, or
    modules of 2-D ones.
    """
    config, head = model.config.get_text_config(), model.get_output_embeddings()
    num_experts = next((n for name in NUM_EXPERTS if (n := getattr(config, name, None))), 1)
    num_seeing = next((n for name in NUM_SEEING if (n := getattr(config, name, None))), num_experts)
    num_shared = num_expert = 0
    for name, module in model.named_modules():
        is_expert = "experts" in name.split(".")
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if (
                isinstance(module, nn.Embedding)
                or module is head
                or parameter_name.endswith("bias")
            ):
                continue
            num_dims = len(whole_shape(parameter))
            if is_expert and num_dims > 1:
                num_expert += num_parameters([parameter])
            elif num_dims == 2:
                num_shared += num_parameters([parameter])
    return num_shared + num_expert * num_seeing // num_experts


def shapes_file(model: str) -> Path:
    """Where the shapes of a model are stored: Qwen--Qwen3-8B.json for Qwen/Qwen3-8B."""
    return SHAPES_DIR / f"{model.replace('/', '--')}.json"


def read_shapes(path: Path) -> ModelShapes:
    fields = json.loads(path.read_text(encoding="utf-8"))
    return ModelShapes(
        **fields
        | {"parameter_sizes": tuple((size, count) for size, count in fields["parameter_sizes"])}
    )
