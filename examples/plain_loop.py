"""The distillation loss in a plain PyTorch loop: `python examples/plain_loop.py`."""

import torch
from tiny_pair import collate, draw_texts, load_pair
from torch import Tensor
from transformers import PreTrainedModel

from kd import distillation_loss

NUM_STEPS, BATCH_SIZE = 12, 16


def batch_loss(
    student: PreTrainedModel, teacher: PreTrainedModel, batch: dict[str, Tensor]
) -> Tensor:
    """The mean over the batch's labels that are not -100."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        teacher_hidden = teacher.model(**inputs, use_cache=False).last_hidden_state
    # .model is the student without its lm_head: no logits are made here
    student_hidden = student.model(**inputs, use_cache=False).last_hidden_state
    # The state at a position predicts the next token. A head that has a bias, a softcap or a scale
    # needs it here as well: kd.models.head.head_of(model) knows them.
    return distillation_loss(
        student_hidden[:, :-1],
        student.lm_head.weight,
        teacher_hidden[:, :-1],
        teacher.lm_head.weight,
        batch["labels"][:, 1:],
        reduction="mean",
    ).loss


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    student, teacher, tokenizer = load_pair()
    student.to(device).train()
    teacher.to(device)
    optimizer = torch.optim.AdamW(student.parameters(), lr=4e-4)
    texts = draw_texts(NUM_STEPS * BATCH_SIZE)
    for step in range(NUM_STEPS):
        batch = collate(tokenizer, texts[step * BATCH_SIZE : (step + 1) * BATCH_SIZE])
        loss = batch_loss(student, teacher, {name: ids.to(device) for name, ids in batch.items()})
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1}: loss {loss.item():.4f}")


if __name__ == "__main__":
    main()
