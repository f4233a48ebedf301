"""What the three examples share: the shipped tiny models, and texts that they understand."""

from pathlib import Path

from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from kd.demo.arithmetic import ArithmeticSet, draw_rows

FOLDER = Path(__file__).parents[1] / "recipes" / "assets" / "tiny"


def load_pair() -> tuple[PreTrainedModel, PreTrainedModel, PreTrainedTokenizerBase]:
    """Student, teacher and their tokenizer. The teacher is frozen."""
    student = AutoModelForCausalLM.from_pretrained(FOLDER / "student_base")
    teacher = AutoModelForCausalLM.from_pretrained(FOLDER / "teacher")
    teacher.eval().requires_grad_(False)
    return student, teacher, AutoTokenizer.from_pretrained(FOLDER / "teacher")


def draw_texts(num_texts: int) -> list[str]:
    """Arithmetic problems with their thought and answer; a seed makes them the same each time."""
    rows = draw_rows(ArithmeticSet("training", num_texts), seed="examples")
    return [f"{row['prompt']}<think>{row['reasoning']}</think>{row['answer']}<eos>" for row in rows]


def collate(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> dict[str, Tensor]:
    """input_ids, attention_mask and labels (B, L). A label of -100 is not learned."""
    batch = dict(tokenizer(texts, padding=True, padding_side="right", return_tensors="pt"))
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    batch["labels"][:, 0] = -100  # nothing stands before the first token, so nothing predicts it
    return {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
