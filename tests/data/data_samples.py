"""Rows in the shape of every source, and a tokenizer of one token per character."""

import json
import string
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

USER = {"role": "user", "content": "1+1?"}
STRATOS_VALUE = (
    "<|begin_of_thought|>\n\nOne and one.\n\n<|end_of_thought|>\n\n"
    "<|begin_of_solution|>\n\nIt is 2.\n\n<|end_of_solution|>"
)
R1_VALUE = "<think>\nOne and one.\n</think>\n\nIt is 2."


def stratos_row(value: str = STRATOS_VALUE) -> dict:
    turns = [{"from": "user", "value": "1+1?"}, {"from": "assistant", "value": value}]
    return {"system": "Think long.", "conversations": turns}


ROWS = {
    "local prompt": (
        "local",
        {"prompt": "1+1?", "reasoning": "One and one.", "answer": "It is 2."},
    ),
    "local messages with columns": (
        "local",
        {"messages": [USER], "reasoning": "One and one.", "answer": "It is 2."},
    ),
    "local messages with markers": (
        "local",
        {"messages": [USER, {"role": "assistant", "content": R1_VALUE}]},
    ),
    "local messages with an answer turn and columns": (
        "local",
        {
            "messages": [USER, {"role": "assistant", "content": "It is 2."}],
            "reasoning": "One and one.",
            "answer": "It is 2.",
        },
    ),
    "bespoke_stratos": ("bespoke_stratos", stratos_row()),
    "openthoughts": ("openthoughts", stratos_row()),
    "sky_t1": ("sky_t1", stratos_row()),
    "synthetic_1": (
        "synthetic_1",
        {"task_type": "verifiable_math", "prompt": "1+1?", "llm_response": R1_VALUE},
    ),
    "synthetic_1 lists": (
        "synthetic_1",
        {"task_type": "verifiable_math", "prompt": ["1+1?"], "llm_response": [R1_VALUE]},
    ),
    "nemotron_math": ("nemotron_math", {"input": [USER], "output": R1_VALUE}),
}


CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


SPECIAL = (
    "<pad>",
    "<eos>",
    "<unk>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<think>",
    "</think>",
)


def build_tokenizer(special: tuple[str, ...] = SPECIAL, **settings: Any) -> PreTrainedTokenizerFast:
    """One token per character, plus the special ones."""
    vocab = {token: i for i, token in enumerate((*special, *string.printable))}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.add_special_tokens(list(special))
    settings = {"eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"} | settings
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **settings)
    tokenizer.chat_template = CHATML
    return tokenizer


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def good_rows(count: int) -> list[dict[str, Any]]:
    return [
        {"prompt": f"{i}+1?", "reasoning": f"{i}+1 " * (i % 5 + 1), "answer": f"{i + 1}"}
        for i in range(count)
    ]
