"""The two tiny models of the arithmetic task: configuration and tokenizer, without weights.

    python -m kd.demo.tiny_models --output recipes/assets/tiny

The tokenizer has one token per character, <think> and </think> beside them; the chat template is
the user's message alone. Both models share it.
"""

import argparse
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config

from kd.demo.arithmetic import ALPHABET

THINK_OPEN, THINK_CLOSE, PAD, EOS = "<think>", "</think>", "<pad>", "<eos>"
MAX_TOKENS = 256
CHAT_TEMPLATE = (
    '{% for message in messages if message["role"] == "user" %}{{ message["content"] }}{% endfor %}'
)
# Hidden size, layers, intermediate size
SIZES = {
    "teacher": (192, 3, 512),
    "student_base": (128, 2, 384),
}
NUM_HEADS = 4
# A step of the task reads tokens at fixed short distances. A small rope base tells such distances
# apart in most dimensions; with the usual 10000 and 0.02 models this small stay long on a plateau
# where they only copy.
ROPE_THETA = 100.0
INITIALIZER_RANGE = 0.06


def write_model_folders(output: Path) -> None:
    """Write output/teacher and output/student_base: what AutoTokenizer and AutoConfig read."""
    tokenizer = build_tokenizer()
    for name in SIZES:
        config = build_config(name, tokenizer)
        config.save_pretrained(output / name)
        tokenizer.save_pretrained(output / name)
        GenerationConfig(
            eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id, do_sample=False
        ).save_pretrained(output / name)


def build_tokenizer() -> PreTrainedTokenizerFast:
    tokens = [PAD, EOS, THINK_OPEN, THINK_CLOSE, *ALPHABET]
    backend = Tokenizer(WordLevel({token: index for index, token in enumerate(tokens)}))
    backend.pre_tokenizer = Split(Regex("."), "isolated")
    backend.decoder = Fuse()
    # Not special: decoding with skip_special_tokens must leave the markers in the text.
    backend.add_tokens(
        [AddedToken(marker, normalized=False) for marker in (THINK_OPEN, THINK_CLOSE)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=EOS,
        padding_side="left",
        model_max_length=MAX_TOKENS,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def build_config(name: str, tokenizer: PreTrainedTokenizerFast) -> Qwen3Config:
    """The Qwen3 configuration of "teacher" (1.3 M parameters) or "student_base" (0.4 M)."""
    hidden_size, num_layers, intermediate_size = SIZES[name]
    return Qwen3Config(
        architectures=["Qwen3ForCausalLM"],
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        intermediate_size=intermediate_size,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=NUM_HEADS,
        head_dim=hidden_size // NUM_HEADS,
        max_position_embeddings=MAX_TOKENS,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=INITIALIZER_RANGE,
        dtype="float32",
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Write configuration and tokenizer of the tiny models."
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="folder for teacher/ and student_base/"
    )
    write_model_folders(parser.parse_args().output)


if __name__ == "__main__":
    main()
