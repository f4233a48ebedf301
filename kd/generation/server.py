"""A server of vLLM, by the completions API of OpenAI and token ids: what it serves, and what it
answers.

    python -m vllm.entrypoints.openai.api_server --model MODEL     # or: vllm serve MODEL

Responses to one seed are alike as far as the server's kernels do not depend on what else it does.
A server that wants a key is given that of OPENAI_API_KEY.
"""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from kd.errors import UserError
from kd.generation.sampling import Sampling
from kd.recipe import ModelSection, find_input

T = TypeVar("T")
R = TypeVar("R")

NUM_CONNECTIONS = 64
CONNECT_SECONDS = 10.0
ANSWER_SECONDS = 3600.0  # a long response comes in one piece
BEGIN = "start it with `vllm serve MODEL`, or correct the address; finished batches are kept"


@dataclass(frozen=True)
class Server:
    """url: without /v1. model: the name under which it serves the model. version: of vLLM.
    setting: what named the address, for errors.
    """

    url: str
    model: str
    version: str
    setting: str = "--server"

    def complete(self, prompt: list[int], **parameters: Any) -> dict[str, Any]:
        """The one choice of a completion of token ids. Raises UserError for any other answer."""
        body = {"model": self.model, "prompt": prompt, **parameters}
        answer = _ask(self.url, "/v1/completions", body, setting=self.setting)
        try:
            (choice,) = answer["choices"]
            return {"num_tokens": answer["usage"]["completion_tokens"], **choice}
        except (KeyError, TypeError, ValueError):
            raise _not_understood(self.url, "/v1/completions", self.setting) from None

    def sample(self, prompt: list[int], **parameters: Any) -> dict[str, Any]:
        """As complete(), with token ids where its version gives them; what it would else take from
        the model's generation config is off. parameters: of sampling_parameters().
        """
        off = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
        return self.complete(prompt, **parameters, **off, return_token_ids=True)


def sampling_parameters(sampling: Sampling, seed: int, end_ids: Sequence[int]) -> dict[str, Any]:
    """What vLLM and its server call alike; both add the end tokens of the generation config."""
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_tokens": sampling.max_new_tokens,
        "seed": seed,
        "stop_token_ids": list(end_ids),
        "skip_special_tokens": False,
    }


def server_version(url: str, setting: str = "--server") -> str:
    """Raises UserError for a server that is away, or that is not vLLM's."""
    version = _ask(url, "/version", setting=setting)
    if not isinstance(version, dict) or not isinstance(version.get("version"), str):
        raise _not_understood(url, "/version", setting)
    return str(version["version"])


def connect(url: str, field: str, section: ModelSection, setting: str = "--server") -> Server:
    """The server, once it says that it serves this model, by its name or its folder.

    field: of the model. setting: of the address. Raises UserError that names what it serves
    instead.
    """
    models = _ask(url, "/v1/models", setting=setting)
    try:
        served = {card["id"]: card.get("root") or card["id"] for card in models["data"]}
    except (KeyError, TypeError, AttributeError):
        raise _not_understood(url, "/v1/models", setting) from None
    wanted = {section.model, _folder(section.model)}
    for name, root in served.items():
        if wanted & {name, root, _folder(root)}:
            return Server(_base(url), name, server_version(url, setting), setting)
    raise UserError(
        f"{setting} {url} serves {', '.join(served) or 'nothing'}, not {field} = "
        f"{section.model!r}: start it with that model, or with --served-model-name "
        f"{section.model} if its folder has another name there"
    )


def in_parallel(function: Callable[[T], R], values: Iterable[T]) -> list[R]:
    """In their order, so many at a time that the server can batch them."""
    with ThreadPoolExecutor(NUM_CONNECTIONS) as pool:
        return list(pool.map(function, values))


def _ask(url: str, path: str, body: dict[str, Any] | None = None, *, setting: str) -> Any:
    """The JSON that the server answers; with a body by POST. Raises UserError."""
    parts = urlsplit(_base(url))
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"{setting} {url}: not a URL: write http://HOST:PORT")
    kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("OPENAI_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    try:
        connection = kind(parts.netloc, timeout=CONNECT_SECONDS)
        connection.connect()
        connection.sock.settimeout(ANSWER_SECONDS)
        content = None if body is None else json.dumps(body)
        connection.request("GET" if body is None else "POST", parts.path + path, content, headers)
        answer = connection.getresponse()
        status, received = answer.status, answer.read()
        connection.close()
    except (OSError, HTTPException, ValueError) as error:  # ValueError: a port that is no number
        raise UserError(f"{setting} {url}: no answer to {path} ({error!r}): {BEGIN}") from None
    if status != 200:
        said = received.decode(errors="replace")[:500]
        raise UserError(
            f"{setting} {url}: {path} is refused with status {status}: {said}: change the options "
            "of the server or of this command"
        )
    try:
        return json.loads(received)
    except ValueError:
        raise _not_understood(url, path, setting) from None


def _not_understood(url: str, path: str, setting: str) -> UserError:
    return UserError(
        f"{setting} {url}: its answer to {path} is not that of vLLM: name a vLLM server"
    )


def _base(url: str) -> str:
    return url.rstrip("/").removesuffix("/v1")


def _folder(name: str) -> str:
    """The absolute path of a folder that is here, else the name."""
    found = find_input(name)
    return str(Path(found).resolve()) if found else name
