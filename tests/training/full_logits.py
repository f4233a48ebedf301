"""The loss and the diagnostics that two ranks are compared with: one process, full logits, plain
autograd.

Written down again from the definitions, on purpose: a mistake in kd.losses must not be in both.
"""

from collections import defaultdict
from typing import Any

import torch
import torch.nn.functional as F

from kd.data.collate import Batch
from kd.recipe import Recipe


def full_loss(recipe: Recipe, student: Any, teacher: Any, batch: Batch) -> torch.Tensor:
    """Sum over the supervised tokens of a batch; gradients reach the student alone.

    kd_weight * T^2 * divergence + ce_weight * cross-entropy, over the vocabulary that both share;
    cross-entropy takes the student's logits at T = 1.
    """
    loss, shared = recipe.loss, min(model.config.vocab_size for model in (student, teacher))
    labels_N = batch.labels.flatten()
    is_supervised_N = labels_N != -100
    with torch.no_grad():
        teacher_logits_NV = _logits(teacher, batch)[is_supervised_N, :shared]
    student_logits_NV = _logits(student, batch)[is_supervised_N, :shared]
    log_p_NV = (teacher_logits_NV / loss.temperature).log_softmax(-1)
    log_q_NV = (student_logits_NV / loss.temperature).log_softmax(-1)
    kl = {
        "forward_kl": (log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(),
        "reverse_kl": (log_q_NV.exp() * (log_q_NV - log_p_NV)).sum(),
    }[loss.divergence]
    ce = F.cross_entropy(student_logits_NV, labels_N[is_supervised_N], reduction="sum")
    return loss.kd_weight * loss.temperature**2 * kl + loss.ce_weight * ce


def _logits(model: Any, batch: Batch) -> torch.Tensor:
    hidden_BLH = model.model(batch.input_ids).last_hidden_state
    logits_BLV = F.linear(hidden_BLH, model.lm_head.weight)
    return logits_BLV.float().flatten(0, 1)  # of models in bf16, softmax is not


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
        | {"num_supervised_tokens": len(of)}
        for part, of in tokens.items()
    }
