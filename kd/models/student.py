"""The student and its loss in one forward(), so that ZeRO-3 sees every use of every weight.

Legend: B sequences, L tokens, N supervised tokens, M measures of kd.losses.RowDiagnostics, H hidden
    size,
V vocabulary rows; s student, t teacher.
"""

import functools

import torch
from torch import nn
from transformers import PreTrainedModel

from kd.losses import Head, distillation_loss
from kd.models.head import backbone, head_of
from kd.recipe import LossSection

Distilled = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]


class Distiller(nn.Module):
    """forward() returns (loss, kd, ce, rows_MN); loss carries gradient.

    The first three are sums over the supervised tokens of a batch, scalars. rows_MN are the
    RowDiagnostics of these tokens, in the order of row_index, or None without a teacher. It must be
    called through the engine: called directly, gradients are silently wrong under accumulation.
    """

    def __init__(self, model: PreTrainedModel, loss: LossSection) -> None:
        super().__init__()
        self.model = model
        # The loss runs as lm_head's own forward: ZeRO-3's hooks around that module then gather the
        # head once for the whole micro-batch, tied to the embedding or not, and reduce the gradient
        # that the loss returns for it.
        lm_head = model.get_output_embeddings()
        lm_head.forward = functools.partial(_head_loss, model, loss)

    def forward(
        self,
        input_ids_BL: torch.Tensor,
        labels_BL: torch.Tensor,
        row_index_N: torch.Tensor,
        teacher_hidden_BLH: torch.Tensor | None = None,
        teacher_head: Head | None = None,
    ) -> Distilled:
        # No attention mask: batches are padded on the right, and under causal attention no token
        # sees what follows.
        hidden_BLH = backbone(self.model)(input_ids=input_ids_BL, use_cache=False).last_hidden_state
        return self.model.get_output_embeddings()(
            hidden_BLH, labels_BL, row_index_N, teacher_hidden_BLH, teacher_head
        )


def _head_loss(
    model: PreTrainedModel,
    loss: LossSection,
    hidden_BLH: torch.Tensor,
    labels_BL: torch.Tensor,
    row_index_N: torch.Tensor,
    teacher_hidden_BLH: torch.Tensor | None,
    teacher_head: Head | None,
) -> Distilled:
    head = head_of(model)  # read here, inside the hooks: the weight is whole now
    result, rows = distillation_loss(
        hidden_BLH,
        head.weight_VH,
        teacher_hidden_BLH,
        teacher_head and teacher_head.weight_VH,
        labels_BL,
        divergence=loss.divergence,
        beta=loss.beta,
        alpha=loss.alpha,
        mix_weight=loss.mix_weight,
        temperature=loss.temperature,
        kd_weight=loss.kd_weight,
        ce_weight=loss.ce_weight,
        student_bias=head.bias_V,
        student_softcap=head.softcap,
        student_scale=head.scale,
        teacher_bias=teacher_head and teacher_head.bias_V,
        teacher_softcap=teacher_head and teacher_head.softcap,
        teacher_scale=teacher_head.scale if teacher_head else 1.0,
        chunk_size=loss.chunk_size,
        logits_dtype=getattr(torch, loss.logits_dtype) if loss.logits_dtype else None,
        row_index=row_index_N,
        backend=loss.backend,
        return_diagnostics=True,
    )
    return result.loss, result.kd, result.ce, None if rows is None else torch.stack(rows)
