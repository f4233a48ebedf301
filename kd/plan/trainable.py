"""What is trained of a student: all of it, all but lm_head or embeddings, or LoRA adapters.

Adapters are those of the matrices of llama, qwen2, qwen3 and their like; other architectures
have about as many.
"""

import dataclasses
from collections import Counter
from dataclasses import dataclass

from kd.plan.shapes import ModelShapes
from kd.recipe import LoraSection, StudentSection

Sizes = tuple[tuple[int, int], ...]  # how many parameters there are of each number of elements


@dataclass(frozen=True)
class Trainable:
    """Of a student whose shapes, its adapters among them, are `shapes`.

    sizes: of the parameters that are trained.
    num_frozen_weights: of shapes.num_active_weights, those that get no gradient.
    """

    shapes: ModelShapes
    sizes: Sizes
    num_frozen_weights: int
    trains_head: bool


def trainable_of(section: StudentSection, shapes: ModelShapes) -> Trainable:
    """shapes: of the model as its checkpoint has it."""
    if section.lora is not None:
        adapters = _adapter_sizes(section.lora, shapes)
        whole = dataclasses.replace(
            shapes,
            num_active_weights=shapes.num_active_weights + sum(adapters.elements()),
            parameter_sizes=_sizes(adapters + Counter(dict(shapes.parameter_sizes))),
        )
        return Trainable(whole, _sizes(adapters), shapes.num_active_weights, trains_head=False)
    heads = [section.trains_head] + [section.trains_embeddings] * (not shapes.tie_word_embeddings)
    num_frozen, head_size = heads.count(False), shapes.vocab_size * shapes.hidden_size
    sizes = tuple(
        (size, count - num_frozen if size == head_size else count)
        for size, count in shapes.parameter_sizes
    )
    return Trainable(shapes, sizes, 0, section.trains_head)


def adapted_widths(lora: LoraSection, shapes: ModelShapes) -> list[tuple[int, int]]:
    """(columns, rows) of the matrices of a decoder layer that have an adapter; one of a name that
    is not known is taken for the widest.
    """
    hidden, inner = shapes.hidden_size, shapes.intermediate_size
    queries, keys = shapes.num_heads * shapes.head_dim, shapes.num_key_value_heads * shapes.head_dim
    widths = {
        "q_proj": (hidden, queries),
        "k_proj": (hidden, keys),
        "v_proj": (hidden, keys),
        "o_proj": (queries, hidden),
        "gate_proj": (hidden, inner),
        "up_proj": (hidden, inner),
        "down_proj": (inner, hidden),
    }
    if lora.target_modules == "all-linear":
        return list(widths.values())
    names = {target.rpartition(".")[2] for target in lora.target_modules}
    return [widths.get(name, (hidden, inner)) for name in sorted(names)]


def _adapter_sizes(lora: LoraSection, shapes: ModelShapes) -> Counter[int]:
    """Of A, rank by columns, and of B, rows by rank."""
    sizes: Counter[int] = Counter()
    for widths in adapted_widths(lora, shapes):
        for width in widths:
            sizes[lora.rank * width] += shapes.num_layers
    return sizes


def _sizes(counted: Counter[int]) -> Sizes:
    return tuple(sorted(counted.items()))
