"""The distillation loss in transformers' Trainer: `python examples/trainer.py`.

For one process or DDP (`torchrun --nproc_per_node 2 examples/trainer.py`), where the lm_head is
whole on each rank. fsdp2.py shows what to do where it is not.
"""

from collections.abc import Callable
from functools import partial

import torch
from tiny_pair import collate, draw_texts, load_pair
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.modeling_outputs import CausalLMOutputWithPast

from kd import distillation_loss


class DistillationTrainer(Trainer):
    """A Trainer whose texts are learned from a teacher; the teacher is frozen."""

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        arguments: TrainingArguments,
        texts: list[str],
        collator: Callable[[list[str]], dict[str, Tensor]],
    ) -> None:
        super().__init__(student, arguments, data_collator=collator, train_dataset=texts)
        self.teacher = teacher.to(arguments.device)
        # Whatever the student's architecture: count the labels of all micro-batches of a step, pass
        # them as num_items_in_batch, and do not divide the loss by the number of micro-batches.
        self.model_accepts_loss_kwargs = True

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, CausalLMOutputWithPast]:
        """The micro-batch's part of the mean over all labels of an optimizer step."""
        tokens = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            teacher_hidden = self.teacher.model(**tokens, use_cache=False).last_hidden_state
        # The model itself is called, since DDP may wrap it; of its logits one position is made.
        outputs = model(**tokens, use_cache=False, output_hidden_states=True, logits_to_keep=1)
        # A head that has a bias, a softcap or a scale needs it here as well:
        # kd.models.head.head_of(model) knows them.
        loss, _, _, num_tokens = distillation_loss(
            outputs.hidden_states[-1][:, :-1],
            self.accelerator.unwrap_model(model).lm_head.weight,
            teacher_hidden[:, :-1],
            self.teacher.lm_head.weight,
            inputs["labels"][:, 1:],
        )
        if num_items_in_batch is None:
            loss = loss / num_tokens
        else:
            # A sum over this micro-batch / labels of all micro-batches and ranks. DDP divides the
            # sum over ranks by their number, which is undone here.
            loss = loss * self.accelerator.num_processes / num_items_in_batch
        return (loss, outputs) if return_outputs else loss


def main() -> None:
    student, teacher, tokenizer = load_pair()
    arguments = TrainingArguments(
        "build/examples",
        max_steps=6,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        learning_rate=4e-4,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,  # a text has no columns
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
    collator = partial(collate, tokenizer)
    DistillationTrainer(student, teacher, arguments, draw_texts(96), collator).train()


if __name__ == "__main__":
    main()
