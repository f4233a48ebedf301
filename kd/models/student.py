"""The student, and its loss in one forward(), so that ZeRO-3 sees every use of every weight.

Legend: B sequences, L tokens, N supervised tokens, M measures of kd.losses.RowDiagnostics, H hidden
size.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kd.data.collate import Batch
from kd.engine.engine import Engine
from kd.engine.export import export_student
from kd.engine.generate import generating
from kd.losses import (
    DenseTargets,
    SampledTargets,
    Targets,
    TopKTargets,
    VectorTargets,
    distillation_loss,
    expected_logit_loss,
    sparse_distillation_loss,
)
from kd.models.head import head_of, hidden_states
from kd.models.probe import Probed, run_probe
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


class HeadLoss:
    """The loss, as StudentModule runs it in the place of the lm_head's own forward.

    ZeRO-3's hooks around the lm_head then gather it once for the whole micro-batch, tied to the
    embedding or not, and reduce the gradient that the loss returns for it. As a module of its own,
    a leaf to ZeRO-3, a tied head would be reduced before the embedding's part has arrived.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    def forward(
        self,
        hidden_BLH: Tensor,
        labels_BL: Tensor,
        row_index_N: Tensor,
        targets: Targets | None,
        settings: LossSection,
    ) -> BatchLoss:
        head = head_of(self._model)  # read here, inside the hooks: the weight is whole now
        rows = None
        logits_dtype = getattr(torch, settings.logits_dtype) if settings.logits_dtype else None
        # All calls name each argument, so that mypy sees a misspelt one.
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
                    logits_gib=settings.logits_gib,
                    logits_dtype=logits_dtype,
                    row_index=row_index_N,
                )
            case SampledTargets() | VectorTargets():
                result = expected_logit_loss(
                    hidden_BLH,
                    head.weight_VH,
                    targets,
                    labels_BL,
                    temperature=settings.temperature,
                    kd_weight=settings.kd_weight,
                    ce_weight=settings.ce_weight,
                    student_bias=head.bias_V,
                    student_softcap=head.softcap,
                    student_scale=head.scale,
                    chunk_size=settings.chunk_size,
                    logits_dtype=logits_dtype,
                    logits_gib=settings.logits_gib,
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
                    logits_gib=settings.logits_gib,
                    logits_dtype=logits_dtype,
                    row_index=row_index_N,
                    backend=settings.backend,
                    return_diagnostics=True,
                )
        rows_MN = None if rows is None else torch.stack(rows)
        return BatchLoss(result.loss, result.kd, result.ce, rows_MN)


class StudentModule(nn.Module):
    """What the student's engine wraps: backbone, then loss. The model itself stays as it was."""

    def __init__(
        self,
        model: PreTrainedModel,
        settings: LossSection,
        of_sampled: LossSection | None = None,
    ) -> None:
        """settings: the objective; of_sampled: over responses that a model wrote."""
        super().__init__()
        self.model = model
        self.head_loss = HeadLoss(model)
        self._settings, self._of_sampled = settings, of_sampled or settings

    def forward(
        self,
        model_inputs: dict[str, Any],
        labels_BL: Tensor | None,
        row_index_N: Tensor | None,
        targets: Targets | None,
        is_sampled: bool = False,
    ) -> BatchLoss | Probed:
        """Without labels, what kd.models.probe compares in the place of a loss."""
        if labels_BL is None:
            return run_probe(self.model, **model_inputs)
        # No attention mask: batches are padded on the right, and under causal attention no token
        # sees what follows.
        hidden_BLH = hidden_states(self.model, model_inputs)
        lm_head = self.model.get_output_embeddings()
        with _running_as(lm_head, self.head_loss.forward):
            settings = self._of_sampled if is_sampled else self._settings
            result: BatchLoss = lm_head(hidden_BLH, labels_BL, row_index_N, targets, settings)
        return result


@contextlib.contextmanager
def _running_as(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Inside, the module runs this function in the place of its forward, between the same hooks."""
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


class Student:
    """The model that learns, and its engine."""

    def __init__(
        self, model: PreTrainedModel, engine: Engine, *, keeps_packed_apart: bool = True
    ) -> None:
        """engine: around a StudentModule of the model."""
        self.model = model
        self.engine = engine
        self.keeps_packed_apart = keeps_packed_apart

    @property
    def trainable_parameters(self) -> list[nn.Parameter]:
        """Each holds this rank's shard only, where ZeRO-3 partitions it."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def probe(self, input_ids_BL: Tensor) -> Probed:
        """For verify_weights. Collective: every rank must call this."""
        return self.engine({"input_ids": input_ids_BL}, None, None, None)

    def loss(self, batch: Batch, targets: Targets | None) -> BatchLoss:
        """The loss of a batch on this rank.

        Through the engine: its module called directly would give gradients that are silently wrong
        under accumulation. Collective: every rank must call this.
        """
        inputs = batch.model_inputs, batch.labels, batch.row_index, targets
        return self.engine(*inputs, batch.is_sampled)

    def set_learning_rate(self, learning_rate: float) -> None:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate

    def export(self, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
        """Write the student as a Hugging Face folder. Collective: every rank must call this."""
        export_student(self.engine, self.model, tokenizer, folder)

    @contextlib.contextmanager
    def generating(self, *, whole: bool) -> Iterator[tuple[PreTrainedModel, bool]]:
        """The model, ready to generate from the weights of now, and whether ranks must do so in
        step, with as many calls each: where ZeRO-3 gathers each layer as it runs.

        whole: gather all of a partitioned model, once. Collective: every rank must enter it.
        """
        self.model.eval()
        try:
            with generating(self.model, self.engine, whole=whole) as ready:
                yield ready
        finally:
            self.model.train()
