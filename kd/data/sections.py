"""Prompt, chain of thought and answer as token spans that are known by construction.

The three texts are joined and tokenised once, so that the ids are those of the whole text; the
borders, known in characters, become token counts through the tokenizer's offsets. Only the prompt
goes through the chat template: templates of reasoning models delete the chain of thought of an
assistant turn.

Marker-like strings in the user's own text ("<|im_end|>", "</think>" inside a problem) are tokenised
like all other text, as inference engines do with the same prompt; they cannot move a border. A
reasoning or an answer that holds the thought's markers or the end token is a BadRow, since it would
teach the student to open a second thought or to stop halfway.
"""

from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerFast

from kd.data.prompt import open_prompt
from kd.data.sources import Trace
from kd.data.turns import BadRow
from kd.recipe import DataSection


@dataclass(frozen=True)
class SectionedTokens:
    """Token ids of one trace; num_prompt + num_cot + num_answer = len(input_ids)."""

    input_ids: list[int]
    num_prompt: int
    num_cot: int
    num_answer: int


def render(
    tokenizer: PreTrainedTokenizerFast, trace: Trace, data: DataSection
) -> tuple[str, str, str]:
    """Texts of prompt, thought with its markers, and answer with tokenizer.eos_token.

    Where the template opens the thought, that marker belongs to the prompt. Raises BadRow, or
    UserError without a chat template.
    """
    reasoning, answer = trace.reasoning.strip(), trace.answer.strip()
    for name, text in (("reasoning", reasoning), ("answer", answer)):
        if not text:
            raise BadRow(f"empty {name}")
        for marker in (data.think_open.strip(), data.think_close.strip(), tokenizer.eos_token):
            if marker and marker in text:
                raise BadRow(f"{marker} inside the {name}")
    prompt, opening = open_prompt(tokenizer, trace.messages, data, trace.tools)
    cot = opening + reasoning + data.think_close
    return prompt, cot, data.answer_open + answer + data.answer_close + tokenizer.eos_token


def tokenise(tokenizer: PreTrainedTokenizerFast, texts: tuple[str, str, str]) -> SectionedTokens:
    """Tokenise prompt + chain of thought + answer as one text; special tokens are in the texts,
    none is added.

    A token that straddles a border belongs to the section that it starts in. Raises BadRow for a
    text with a character that the tokenizer has no token for.
    """
    try:
        encoding = tokenizer("".join(texts), add_special_tokens=False, return_offsets_mapping=True)
    except Exception as error:  # the class that tokenizers raises for a character without a token
        raise BadRow(f"the tokenizer cannot encode it ({error})") from None
    starts = np.array([start for start, _ in encoding["offset_mapping"]])
    borders = np.cumsum([len(text) for text in texts])
    num_prompt, num_until_answer, num_all = (int((starts < border).sum()) for border in borders)
    return SectionedTokens(
        encoding["input_ids"], num_prompt, num_until_answer - num_prompt, num_all - num_until_answer
    )
