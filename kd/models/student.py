"""The student, and its loss in one forward(), so that ZeRO-3 sees every use of every weight.

Legend: B sequences, L tokens, N supervised tokens, M measures of kd.losses.RowDiagnostics, H hidden
size.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kd.data.collate import Batch
from kd.engine.engine import Engine
from kd.engine.export import export_student
from kd.engine.zero3 import gathered, is_partitioned, set_leaf_modules
from kd.losses import (
    DenseTargets,
    Targets,
    TopKTargets,
    distillation_loss,
    sparse_distillation_loss,
)
from kd.models.head import backbone, head_of
from kd.recipe import LossSection


class BatchLoss(NamedTuple):
    """Sums over the supervised tokens of a batch, scalars; only `loss` carries gradient.

    rows_MN are the RowDiagnostics of these tokens, in the order of row_index; None where there are
    no dense targets.
    """

    loss: Tensor
    kd: Tensor
    ce: Tensor
    rows_MN: Tensor | None


class HeadLoss(nn.Module):
    """The loss, as a module that owns the student's lm_head.

    It is a leaf to ZeRO-3, whose hooks around it gather the head once for the whole micro-batch,
    tied to the embedding or not, and reduce the gradient that the loss returns for it.
    """

    def __init__(self, model: PreTrainedModel, settings: LossSection) -> None:
        super().__init__()
        self.lm_head = model.get_output_embeddings()
        self._model = (model,)  # in a tuple it is no child: this module gathers the head only
        self._settings = settings

    def forward(
        self, hidden_BLH: Tensor, labels_BL: Tensor, row_index_N: Tensor, targets: Targets | None
    ) -> BatchLoss:
        head = head_of(self._model[0])  # read here, inside the hooks: the weight is whole now
        settings, rows = self._settings, None
        logits_dtype = getattr(torch, settings.logits_dtype) if settings.logits_dtype else None
        # Both calls name each argument, so that mypy sees a misspelt one.
        match targets:
            case TopKTargets():
                result = sparse_distillation_loss(
                    hidden_BLH,
                    head.weight_VH,
                    targets.ids_BLK,
                    targets.logprobs_BLK,
                    labels_BL,
                    tail=targets.tail,
                    divergence=settings.divergence,
                    beta=settings.beta,
                    alpha=settings.alpha,
                    mix_weight=settings.mix_weight,
                    temperature=settings.temperature,
                    kd_weight=settings.kd_weight,
                    ce_weight=settings.ce_weight,
                    student_bias=head.bias_V,
                    student_softcap=head.softcap,
                    student_scale=head.scale,
                    chunk_size=settings.chunk_size,
                    logits_dtype=logits_dtype,
                    row_index=row_index_N,
                )
            case DenseTargets() | None:
                teacher = targets.head if targets else None
                result, rows = distillation_loss(
                    hidden_BLH,
                    head.weight_VH,
                    targets.hidden_BLH if targets else None,
                    teacher.weight_VH if teacher else None,
                    labels_BL,
                    divergence=settings.divergence,
                    beta=settings.beta,
                    alpha=settings.alpha,
                    mix_weight=settings.mix_weight,
                    temperature=settings.temperature,
                    kd_weight=settings.kd_weight,
                    ce_weight=settings.ce_weight,
                    student_bias=head.bias_V,
                    student_softcap=head.softcap,
                    student_scale=head.scale,
                    teacher_bias=teacher.bias_V if teacher else None,
                    teacher_softcap=teacher.softcap if teacher else None,
                    teacher_scale=teacher.scale if teacher else 1.0,
                    chunk_size=settings.chunk_size,
                    logits_dtype=logits_dtype,
                    row_index=row_index_N,
                    backend=settings.backend,
                    return_diagnostics=True,
                )
        rows_MN = None if rows is None else torch.stack(rows)
        return BatchLoss(result.loss, result.kd, result.ce, rows_MN)


class StudentModule(nn.Module):
    """What the student's engine wraps: backbone, then loss. The model itself stays as it is."""

    def __init__(self, model: PreTrainedModel, settings: LossSection) -> None:
        super().__init__()
        self.model = model
        self.head_loss = HeadLoss(model, settings)
        set_leaf_modules(self, [HeadLoss])
        # Checkpoints name each weight once, as the model does.
        self.register_state_dict_post_hook(_leave_out_head_loss)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_put_in_head_loss)  # type: ignore[no-untyped-call]

    def forward(
        self,
        model_inputs: dict[str, Tensor],
        labels_BL: Tensor,
        row_index_N: Tensor,
        targets: Targets | None,
    ) -> BatchLoss:
        # No attention mask: batches are padded on the right, and under causal attention no token
        # sees what follows.
        hidden_BLH = backbone(self.model)(**model_inputs, use_cache=False).last_hidden_state
        return self.head_loss(hidden_BLH, labels_BL, row_index_N, targets)


class Student:
    """The model that learns, and its engine."""

    def __init__(self, model: PreTrainedModel, engine: Engine) -> None:
        """engine: around a StudentModule of the model."""
        self.model = model
        self.engine = engine

    @property
    def trainable_parameters(self) -> list[nn.Parameter]:
        """Each holds this rank's shard only, where ZeRO-3 partitions it."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def loss(self, batch: Batch, targets: Targets | None) -> BatchLoss:
        """The loss of a batch on this rank.

        Through the engine: its module called directly would give gradients that are silently wrong
        under accumulation. Collective: every rank must call this.
        """
        return self.engine(batch.model_inputs, batch.labels, batch.row_index, targets)

    def set_learning_rate(self, learning_rate: float) -> None:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate

    def export(self, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
        """Write the student as a Hugging Face folder. Collective: every rank must call this."""
        export_student(self.engine, self.model, tokenizer, folder)

    @torch.no_grad()
    def generate(self, input_ids_BL: Tensor, **options: Any) -> Tensor:
        """What model.generate() returns, token ids (B, L + new), from the weights of now.

        Collective: every rank must call this. Prompts, options and the number of new tokens may
        differ: where ZeRO-3 gathers each module as it runs, ranks go on until the last has ended.
        """
        training, parameters = self.model.training, list(self.model.parameters())
        self.model.eval()
        options = {"synced_gpus": is_partitioned(parameters), **options}
        try:
            with gathered(*parameters):
                return self.model.generate(input_ids=input_ids_BL, **options)  # type: ignore[operator]
        finally:
            self.model.train(training)


def _leave_out_head_loss(
    module: nn.Module, state: dict[str, Any], prefix: str, local_metadata: Any
) -> None:
    for name in [name for name in state if name.startswith(f"{prefix}head_loss.")]:
        del state[name]


def _put_in_head_loss(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    assert isinstance(module, StudentModule)
    lm_head = module.head_loss.lm_head
    name = next(name for name, child in module.named_modules() if child is lm_head)
    for key in lm_head.state_dict():
        state[f"{prefix}head_loss.lm_head.{key}"] = state[f"{prefix}{name}.{key}"]
