"""What one rank holds in a step: what each model holds (zero.py) and its layers keep for backward
(activations.py), put together for the moments of kd.training.loop.train_step. Upper bounds: what a
plan says will fit should fit.
"""

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

import torch

from kd.cache.kinds import CHUNK
from kd.losses.chunk_plan import plan_chunks
from kd.plan.activations import layer_activations, saved_activations
from kd.plan.zero_memory import ZeroEngine
from kd.recipe import LossSection, Recipe, RolloutSection

GIB = 2**30


@dataclass(frozen=True)
class RankMemory:
    """GiB that a rank holds on its GPU: five parts always, three when most is taken."""

    teacher_shard: float
    student_weights: float
    gradients: float
    optimizer: float
    communication: float  # buckets in which gradients are reduced
    gathered: float  # weights that are whole for a while, and a shared teacher's lm_head always
    activations: float  # saved for backward, recomputed in it, and the teacher's hidden states
    loss: float  # chunks of logits, and the gradients of hidden states and head

    @property
    def total(self) -> float:
        return float(sum(dataclasses.astuple(self)))


def rank_memory(
    recipe: Recipe, student: ZeroEngine, teacher: ZeroEngine | None, num_tokens: int
) -> tuple[RankMemory, str, float]:
    """What a rank holds when a step takes most, the moment when it does, and GiB that are gathered
    at most, perhaps at another one. num_tokens: of a micro-batch.
    """
    moments = _moments(recipe, student, teacher, num_tokens)
    moment = max(moments, key=lambda moment: sum(moment[1:]))
    parts = (
        teacher.weight_bytes if teacher else 0,
        student.weight_bytes,
        student.gradient_bytes + moment.gradients,
        student.optimizer_bytes,
        student.bucket_bytes,
        moment.gathered,
        moment.activations,
        moment.loss,
    )
    gather_peak_gib = max(moment.gathered for moment in moments) / GIB
    return RankMemory(*(part / GIB for part in parts)), moment.name, gather_peak_gib


def filler_gib(teacher: ZeroEngine, num_tokens: int, kind: str) -> float:
    """What a rank holds that fills a teacher's cache of this kind; num_tokens: of a micro-batch."""
    shapes = teacher.shapes
    states = teacher.width * shapes.hidden_size * num_tokens
    states += layer_activations(shapes, num_tokens, teacher.width)
    head = teacher.head_elements * teacher.width if teacher.is_shared else 0
    # Of all but hidden states: the head in fp32, and rows of logits with what is made of them
    logits = 0 if kind == "hidden" else 4 * teacher.head_elements + 16 * CHUNK * shapes.vocab_size
    return (teacher.weight_bytes + teacher.live_bytes + head + states + logits) / GIB


class _Moment(NamedTuple):
    """Bytes that are held for a part of a step only."""

    name: str
    gathered: int
    activations: int
    loss: int
    gradients: int


def _moments(
    recipe: Recipe, student: ZeroEngine, teacher: ZeroEngine | None, num_tokens: int
) -> list[_Moment]:
    shapes, width, checkpointing = (
        student.shapes,
        student.width,
        recipe.student.checkpointing,
    )
    lora, hidden = recipe.student.lora, width * shapes.hidden_size * num_tokens
    saved = saved_activations(shapes, num_tokens, width, checkpointing=checkpointing, lora=lora)
    saved += hidden
    recomputed = layer_activations(shapes, num_tokens, width, lora) if checkpointing else 0
    # The head's gradient: the loss's own in fp32; in backward one of the weight's dtype too, and a
    # copy to reduce.
    head = student.head_elements if student.trains_head else 0
    moments = [
        _Moment(
            "backward", student.live_bytes, saved + recomputed, hidden + (4 + 2 * width) * head, 0
        ),
        _Moment("the optimizer's step", 0, 0, 0, student.step_bytes),
    ]
    gathered, teacher_hidden = student.live_bytes, 0
    if teacher is not None:
        teacher_hidden = teacher.width * teacher.shapes.hidden_size * num_tokens
        states = teacher_hidden + layer_activations(teacher.shapes, num_tokens, teacher.width)
        if teacher.shapes.num_layers:  # else its states are read
            moments.append(_Moment("the teacher's forward", teacher.live_bytes, states, 0, 0))
    chunks = _chunk_bytes(recipe.loss, student, teacher, num_tokens)
    moments.append(
        _Moment("the loss", gathered, saved + teacher_hidden, chunks + hidden + 4 * head, 0)
    )
    if recipe.rollout is not None:
        sampler = student if recipe.rollout.source == "student" else teacher
        assert sampler is not None
        moments.append(_sampling(recipe, recipe.rollout, sampler, num_tokens))
    # Of a shared teacher each rank keeps the lm_head whole, all the time
    kept = teacher.head_elements * teacher.width if teacher and teacher.is_shared else 0
    return [moment._replace(gathered=moment.gathered + kept) for moment in moments]


def _sampling(
    recipe: Recipe, rollout: RolloutSection, sampler: ZeroEngine, num_tokens: int
) -> _Moment:
    """Weights, whole or those of a layer, keys and values of a micro-batch, and logits of its next
    tokens with their draws, in fp32.
    """
    shapes = sampler.shapes
    gathered = sampler.model_bytes if rollout.gather == "whole" else sampler.live_bytes
    kept = 2 * shapes.num_layers * shapes.num_key_value_heads * shapes.head_dim * sampler.width
    budget = recipe.training.max_tokens_per_micro_batch
    num_sequences = num_tokens // rollout.max_new_tokens + 1
    num_sequences = num_sequences if budget else recipe.training.micro_batch_size
    logits = 4 * 4 * shapes.vocab_size * num_sequences
    return _Moment("sampling", gathered if sampler.is_shared else 0, kept * num_tokens, logits, 0)


def _chunk_bytes(
    loss: LossSection, student: ZeroEngine, teacher: ZeroEngine | None, num_tokens: int
) -> int:
    """Logits of both models that exist at a time, of at most num_tokens rows each."""
    dtype: torch.dtype = getattr(torch, loss.logits_dtype or "float32")
    vocab_size = min(engine.shapes.vocab_size for engine in (student, teacher) if engine)
    chunks = plan_chunks(
        vocab_size,
        dtype,
        has_teacher=teacher is not None,
        chunk_size=loss.chunk_size,
        logits_gib=loss.logits_gib,
    )
    return sum(min(num_rows, num_tokens) for num_rows in chunks) * vocab_size * dtype.itemsize
