"""The loss and the diagnostics that two ranks are compared with: one process, full logits, plain
autograd.
"""

from collections import defaultdict
from typing import Any

import torch

from kd import distillation_loss
from kd.data.collate import Batch
from kd.recipe import Recipe


def full_loss(recipe: Recipe, student: Any, teacher: Any, batch: Batch) -> torch.Tensor:
    """Sum over the supervised tokens of a batch; gradients reach the student alone."""
    with torch.no_grad():
        teacher_hidden = teacher.model(batch.input_ids).last_hidden_state
    return distillation_loss(
        student.model(batch.input_ids).last_hidden_state,
        student.lm_head.weight,
        teacher_hidden,
        teacher.lm_head.weight,
        batch.labels,
        temperature=recipe.loss.temperature,
        kd_weight=recipe.loss.kd_weight,
        ce_weight=recipe.loss.ce_weight,
        backend="reference",
    ).loss


@torch.no_grad()
def full_diagnostics(
    recipe: Recipe, student: Any, teacher: Any, batches: list[Batch]
) -> dict[str, Any]:
    """{part: {measure: mean}} over the supervised tokens of a global batch, in a loop over
    tokens.
    """
    tokens, shared = defaultdict(list), min(model.config.vocab_size for model in (student, teacher))
    for batch in batches:
        log_q_NV, log_p_NV = (
            (
                model(batch.input_ids).logits.flatten(0, 1)[batch.row_index, :shared]
                / recipe.loss.temperature
            ).log_softmax(-1)
            for model in (student, teacher)
        )
        for log_q, log_p, cell in zip(log_q_NV, log_p_NV, batch.region_index.tolist(), strict=True):
            token = {
                "forward_kl": float(log_p.exp() @ (log_p - log_q)),
                "reverse_kl": float(log_q.exp() @ (log_q - log_p)),
                "student_entropy": -float(log_q.exp() @ log_q),
                "teacher_entropy": -float(log_p.exp() @ log_p),
                "top1_agreement": float(log_q.argmax() == log_p.argmax()),
            }
            for part in ("all", f"section {cell // 8}", f"position {cell % 8}"):
                tokens[part].append(token)
    return {
        part: {name: sum(token[name] for token in of) / len(of) for name in of[0]}
        | {"num_tokens": len(of)}
        for part, of in tokens.items()
    }
