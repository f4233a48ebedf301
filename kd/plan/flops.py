"""FLOPs of an optimizer step: its products of matrices, 2 * m * n * k of each, and nothing else.

As torch.utils.flop_counter counts, and PaLM's MFU (arXiv 2204.02311, appendix B): of attention the
whole L x L scores, though causal kernels skip up to half of them; what gradient checkpointing
computes once more is counted separately, and is no part of MFU. Attention is that of llama,
qwen2, qwen3 and their like: a window or a recurrence in its place costs less.
"""

from dataclasses import dataclass

import numpy as np

from kd.data.step_plan import Work
from kd.data.truncate import IntArray
from kd.plan.shapes import ModelShapes, model_shapes, teacher_shapes
from kd.plan.trainable import trainable_of
from kd.recipe import Recipe


@dataclass(frozen=True)
class StepFlops:
    """Of one optimizer step over all ranks."""

    teacher: float  # forward
    student: float  # forward and backward
    loss: float  # the products with both lm_heads, and of the student's gradients
    recomputed: float  # the student's forward once more, under gradient checkpointing
    sampling: float = 0.0  # forward of the model that writes responses, a token at a time

    @property
    def model(self) -> float:
        """What MFU is made of: without what is recomputed, and what samples."""
        return self.teacher + self.student + self.loss


@dataclass(frozen=True)
class PairShapes:
    """What the FLOPs of a run depend on besides its lengths.

    num_frozen_weights: of student.num_active_weights, those that get no gradient.
    """

    student: ModelShapes
    teacher: ModelShapes | None
    checkpointing: bool
    num_frozen_weights: int = 0
    trains_head: bool = True

    def step_flops(self, padded_N: IntArray, supervised_N: IntArray, num_steps: int) -> StepFlops:
        """The mean over steps of N sequences in all: lengths in micro-batches, and labels.

        Backward is twice forward: the gradient of each factor of a product is a product of the same
        size, which falls away for a factor that is frozen. Without ZeRO-3, torch would leave out
        the last product of a layer that it recomputes (set_checkpoint_early_stop).
        """
        student = forward_flops(self.student, padded_N) / num_steps
        spared = 2 * self.num_frozen_weights * float(padded_N.sum()) / num_steps
        num_supervised = float(supervised_N.sum())
        return StepFlops(
            teacher=forward_flops(self.teacher, padded_N) / num_steps if self.teacher else 0.0,
            student=3 * student - spared,
            loss=self._loss_flops(num_supervised) / num_steps,
            recomputed=student if self.checkpointing else 0.0,
        )

    @property
    def work(self) -> Work:
        """Of one sequence, all of it supervised: forward of both models, backward, and the loss."""
        passes = [(self.student, 4 if self.checkpointing else 3)]
        passes += [(self.teacher, 1)] if self.teacher else []
        linear: float = sum(times * 2 * shapes.num_active_weights for shapes, times in passes)
        quadratic = sum(times * _attention_flops(shapes) for shapes, times in passes)
        linear += self._loss_flops(1.0) - 2 * self.num_frozen_weights
        return Work(linear, quadratic)

    def _loss_flops(self, num_supervised: float) -> float:
        return loss_flops(self.student, self.teacher, num_supervised, trains_head=self.trains_head)


def pair_of(recipe: Recipe) -> PairShapes:
    """The shapes of the recipe's models. Raises UserError when they are not to be had."""
    student = trainable_of(recipe.student, model_shapes(recipe.student, role="student"))
    return PairShapes(
        student.shapes,
        teacher_shapes(recipe),
        recipe.student.checkpointing,
        student.num_frozen_weights,
        student.trains_head,
    )


def sampling_flops(shapes: ModelShapes, prompt_R: IntArray, response_R: IntArray) -> float:
    """Of R responses to prompts of so many tokens, keys and values kept: forward_flops() of both
    together, and logits of each token of a response.
    """
    logits = 2 * shapes.vocab_size * shapes.hidden_size * float(response_R.sum())
    return forward_flops(shapes, prompt_R + response_R) + logits


def forward_flops(shapes: ModelShapes, padded_N: IntArray) -> float:
    """Of a backbone, without its lm_head, for sequences of these lengths, padding included:

    2 * weights * L, of the matrices that a token meets, and of attention's two products, for heads
    that are together `width` wide, 2 * 2 * width * L * L in each layer.
    """
    lengths_N = padded_N.astype(np.float64)  # squares of an epoch do not fit in int64
    return float(
        2 * shapes.num_active_weights * lengths_N.sum()
        + _attention_flops(shapes) * np.square(lengths_N).sum()
    )


def _attention_flops(shapes: ModelShapes) -> int:
    """Times L * L."""
    return 4 * shapes.num_layers * shapes.num_heads * shapes.head_dim


def loss_flops(
    student: ModelShapes,
    teacher: ModelShapes | None,
    num_supervised: float,
    *,
    trains_head: bool = True,
) -> float:
    """Of `kd.losses.chunked` over supervised rows only, 2 * N * V * (3 * Hs + Ht): logits of both
    models, and the gradients of the student's hidden states and head, over the shared vocabulary.
    A frozen head has none, and there are 2 * Hs.
    """
    num_products = 3 if trains_head else 2
    vocab_size = min(shapes.vocab_size for shapes in (student, teacher) if shapes)
    return (
        2
        * num_supervised
        * vocab_size
        * (num_products * student.hidden_size + (teacher.hidden_size if teacher else 0))
    )
