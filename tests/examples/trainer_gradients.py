"""One step of the example's Trainer, and the gradients before it."""

from functools import partial
from pathlib import Path
from typing import Any

from full_gradients import TEXTS, Gradients, tokenizer
from tiny_pair import collate
from trainer import DistillationTrainer
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments


class Capture(TrainerCallback):
    def __init__(self) -> None:
        self.gradients: Gradients = {}

    def on_pre_optimizer_step(self, *_: Any, model: PreTrainedModel, **__: Any) -> None:
        for name, parameter in model.named_parameters():
            self.gradients[name.removeprefix("module.")] = parameter.grad.clone()


def trainer_gradients(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    folder: Path,
    num_ranks: int,
    accumulation: int,
) -> tuple[float, Gradients]:
    """Loss and gradients of one step on TEXTS. Collective: every rank must call this."""
    arguments = TrainingArguments(
        str(folder),
        max_steps=1,
        per_device_train_batch_size=len(TEXTS) // (num_ranks * accumulation),
        gradient_accumulation_steps=accumulation,
        max_grad_norm=0.0,  # it would clip what is compared
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = DistillationTrainer(student, teacher, arguments, TEXTS, partial(collate, tokenizer()))
    capture = Capture()
    trainer.add_callback(capture)
    return trainer.train().training_loss, capture.gradients
