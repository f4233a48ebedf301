"""The one tokenizer of a run: the student's, checked against the teacher's, its template and
special tokens set.
"""

import json
import logging
from itertools import zip_longest
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from kd.data.prompt import apply_template, render_prompt, variables_of
from kd.data.turns import BadRow, Message
from kd.errors import UserError
from kd.files import read_text
from kd.hub import find_file, hub_errors, resolve
from kd.recipe import DataSection, ModelSection, Recipe

log = logging.getLogger(__name__)

MAX_TEMPLATE_BYTES = 2**20

# Digits, blanks, LaTeX, code and scripts, where tokenizers over one vocabulary split differently.
PROBE = (
    "The 3rd of 12,345,678 items costs $0.50;   don't   WON'T\tstop.\r\n\n\n\\begin{align} "
    "\\frac{x_1^2}{\\sqrt{2\\pi}} &\\leq 10^{-3} \\end{align}\ndef f(xs):\n "
    "   return [x**2 for x in xs if x != 0]  # done\n\ncaf\u00e9 cafe\u0301 \u03b1\u03b2 "
    "\u0416\u0443\u043a \u05d0\u05d1 \u0639\u0631\u0628 \u0939\u093f\u0928 "
    "\u4f60\u597d\uff0c\u3053\u3093 \ud55c\uad6d \u0661\u0662\u0663 \u2264 \u00bd \U0001f600 "
)


def load_tokenizers(recipe: Recipe) -> PreTrainedTokenizerFast:
    """The tokenizer for training, generation and evaluation alike; eos_token ends answers,
    pad_token differs from it.

    Chat template: the file data.chat_template, else the teacher's, else the student's. Raises
    UserError when the tokenizers of teacher and student differ, and when template or end token are
    missing or unusable.
    """
    tokenizer = load_tokenizer("student.model", recipe.student)
    template_of = f"student.model = {recipe.student.model!r}"
    if recipe.teacher is not None:
        teacher = load_tokenizer("teacher.model", recipe.teacher)
        check_same_tokenizer(teacher, tokenizer)
        if teacher.chat_template is not None:
            tokenizer.chat_template = teacher.chat_template
            template_of = f"teacher.model = {recipe.teacher.model!r}"
    if recipe.data.chat_template is not None:
        template_of = f"data.chat_template = {recipe.data.chat_template!r}"
        path = find_file("data.chat_template", recipe.data.chat_template)
        tokenizer.chat_template = _read_template(template_of, path)
    tokenizer.eos_token = _end_token(tokenizer, recipe.data.end_token)
    tokenizer.pad_token = _pad_token(tokenizer)
    _check_template(tokenizer, recipe.data, template_of)
    return tokenizer


def load_tokenizer(field: str, model: ModelSection) -> PreTrainedTokenizerFast:
    """The tokenizer of recipe field `field`. Raises UserError when there is no fast one."""
    name = resolve(field, model.model)
    template = Path(name) / "chat_template.jinja"
    if template.is_file():  # the library's own error would not say which file is not UTF-8
        _read_template(f"{field} = {model.model!r}", template)
    with hub_errors(field, model.model):
        tokenizer = AutoTokenizer.from_pretrained(
            name,
            revision=model.revision,
            trust_remote_code=model.trust_remote_code,
        )
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(
            f"{field} = {model.model!r}: {type(tokenizer).__name__} gives no character offsets: "
            "use a model with a fast tokenizer (tokenizer.json)"
        )
    return tokenizer


def check_same_tokenizer(
    teacher: PreTrainedTokenizerFast, student: PreTrainedTokenizerFast
) -> None:
    """Raise UserError unless both have the same ids for the same tokens and texts.

    Tokens are compared, and not sizes: models may pad their vocabularies differently over one
    tokenizer. How texts are read is compared on PROBE and the added tokens, unless both are built
    alike: files that say the same in other words pass, and so do other templates, paddings and
    flags that change no id.
    """
    teacher_tokens, student_tokens = (
        {i: token for token, i in t.get_vocab().items()} for t in (teacher, student)
    )
    for token_id in sorted(teacher_tokens.keys() | student_tokens.keys()):
        ours, theirs = student_tokens.get(token_id), teacher_tokens.get(token_id)
        if ours != theirs:
            raise UserError(
                f"teacher and student have different tokenizers: id {token_id} is {theirs!r} for "
                f"the teacher ({teacher.name_or_path}) and {ours!r} for the student "
                f"({student.name_or_path}). Distillation compares them id by id: choose models of "
                "one family"
            )
    if _how_it_reads(teacher) != _how_it_reads(student):
        _check_same_reading(teacher, student)


def _how_it_reads(tokenizer: PreTrainedTokenizerFast) -> list[Any]:
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    return [backend[key] for key in ("added_tokens", "normalizer", "pre_tokenizer", "model")]


def _check_same_reading(teacher: PreTrainedTokenizerFast, student: PreTrainedTokenizerFast) -> None:
    probe = PROBE + "".join(sorted(teacher.get_added_vocab() | student.get_added_vocab()))
    theirs, ours = (
        tokenizer(probe, add_special_tokens=False)["input_ids"] for tokenizer in (teacher, student)
    )
    if theirs != ours:
        position = next(
            i for i, (their, our) in enumerate(zip_longest(theirs, ours)) if their != our
        )
        behind = slice(position, position + 4)
        raise UserError(
            "teacher and student have the same vocabulary but split text differently: after "
            f"{teacher.decode(theirs[:position])[-20:]!r}, at token {position} of a test text, "
            f"the teacher ({teacher.name_or_path}) reads "
            f"{teacher.convert_ids_to_tokens(theirs[behind])} and the student "
            f"({student.name_or_path}) {student.convert_ids_to_tokens(ours[behind])}: save the "
            "same tokenizer with both models"
        )


def _read_template(template_of: str, path: Path) -> str:
    try:
        return read_text(path, max_bytes=MAX_TEMPLATE_BYTES)
    except UserError as error:
        raise UserError(f"{template_of}: {error}") from None


def _check_template(
    tokenizer: PreTrainedTokenizerFast, data: DataSection, template_of: str
) -> None:
    """Raise UserError for what every row would meet. template_of: where the template comes from."""
    question = {"role": "user", "content": "1 + 1"}
    try:
        render_prompt(tokenizer, [question], data)
        variables = variables_of(tokenizer)
    except BadRow as error:
        remedy = "" if data.chat_template else "; set data.chat_template to another template"
        raise UserError(f"{template_of}: {error}{remedy}") from None
    for name in data.template_kwargs:
        if name not in variables:
            raise UserError(
                f"data.template_kwargs.{name}: the chat template ({template_of}) does not read "
                f"it; it reads {', '.join(sorted(variables)) or 'none'}"
            )
    end = _end_of_turn(tokenizer, question, data)
    if end not in (None, tokenizer.eos_token):
        log.warning(
            "the chat template ends a turn with %s, but answers are trained to end with %s: set "
            "data.end_token = %r if the teacher ends its turns like the template",
            end,
            tokenizer.eos_token,
            end,
        )


def _end_of_turn(
    tokenizer: PreTrainedTokenizerFast, question: Message, data: DataSection
) -> str | None:
    """The first added token that the template writes after an assistant's text; None if it writes
    none, or cannot render such a turn.
    """
    answer = "It is 2."
    turns = [question, {"role": "assistant", "content": answer}]
    try:
        text = apply_template(tokenizer, turns, data, add_generation_prompt=False)
    except BadRow:
        return None
    _, is_printed, end = text.rpartition(answer)
    tokens = tokenizer.tokenize(end, add_special_tokens=False) if is_printed else []
    added = tokenizer.get_added_vocab()
    return next((token for token in tokens if token in added), None)


def _end_token(tokenizer: PreTrainedTokenizerFast, end_token: str | None) -> str:
    if end_token is None and tokenizer.eos_token is None:
        raise UserError(
            f"{tokenizer.name_or_path} has no eos token: set data.end_token to the token that "
            "ends a turn"
        )
    token = end_token or tokenizer.eos_token
    vocabulary = tokenizer.get_vocab()
    if token not in vocabulary or tokenizer(token, add_special_tokens=False)["input_ids"] != [
        vocabulary[token]
    ]:
        raise UserError(
            f"data.end_token = {token!r} is not one token of {tokenizer.name_or_path}: name a "
            f"token of its vocabulary, such as {tokenizer.eos_token!r}"
        )
    return token


def _pad_token(tokenizer: PreTrainedTokenizerFast) -> str:
    """A token other than eos: its own padding, else another special one, else the first.

    Any id will do, since labels are set before padding; but a pad that equals eos invites code,
    here or downstream, that masks every end of sequence with it. No token is added: ids beyond the
    vocabulary have no embedding.
    """
    vocab: dict[str, int] = tokenizer.get_vocab()
    usual = [
        tokenizer.pad_token,
        "<|endoftext|>",
        "<pad>",
        "[PAD]",
        tokenizer.unk_token,
        tokenizer.bos_token,
    ]
    first_two = sorted(vocab, key=vocab.__getitem__)[:2]
    candidates: list[str] = [token for token in usual if token in vocab] + first_two
    return next(token for token in candidates if token != tokenizer.eos_token)
