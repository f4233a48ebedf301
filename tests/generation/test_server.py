"""What is asked of a server, and what its user is told: a small one on loopback, and no model."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from kd.errors import UserError
from kd.generation.backends import Backend, Request, choose_backend, make_subject
from kd.generation.sampling import Response, Sampling
from kd.generation.server import connect
from kd.recipe import ModelSection

Answers = dict[str, Any]  # by path: (status, body), or a function of what was posted
MODELS = {"data": [{"id": "owner/model", "root": "/somewhere/model", "max_model_len": 64}]}


@pytest.fixture
def serve() -> Iterator[Callable[[Answers], str]]:
    """serve(answers): the address of a server that gives these."""
    servers = []

    def start(answers: Answers) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.do_POST()

            def do_POST(self) -> None:
                posted = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                found = answers.get(self.path, (404, "nothing here"))
                if callable(found):
                    found = found(json.loads(posted), self.headers)
                status, body = found if isinstance(found, tuple) else (200, found)
                content = (body if isinstance(body, str) else json.dumps(body)).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_model_is_found_by_the_name_or_the_folder_that_is_served(
    serve: Callable[[Answers], str], tmp_path: Path
) -> None:
    models = {"data": [{"id": "other"}, {"id": "teacher", "root": str(tmp_path)}]}
    url = serve({"/v1/models": models, "/version": {"version": "0.32.0"}})
    for name, served in (("other", "other"), ("teacher", "teacher"), (str(tmp_path), "teacher")):
        server = connect(f"{url}/v1/", "--model", ModelSection(model=name))
        assert (server.url, server.model, server.version) == (url, served, "0.32.0")


def test_another_model_than_the_one_named_is_refused_with_both_names(
    serve: Callable[[Answers], str],
) -> None:
    url = serve({"/v1/models": MODELS, "/version": {"version": "0.32.0"}})
    with pytest.raises(UserError) as caught:
        connect(url, "teacher.model", ModelSection(model="owner/teacher"))
    said = str(caught.value)
    assert f"--server {url} serves owner/model, not teacher.model = 'owner/teacher'" in said
    assert "--served-model-name owner/teacher" in said


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((503, "busy"), "/version is refused with status 503: busy"),
        ("no JSON", "its answer to /version is not that of vLLM"),
        ({"v": 1}, "its answer to /version is not that of vLLM"),
    ],
)
def test_what_is_no_server_of_vllm_is_named(
    serve: Callable[[Answers], str], answer: Any, message: str
) -> None:
    url = serve({"/version": answer})
    with pytest.raises(UserError) as caught:
        choose_backend("auto", url)
    assert f"--server {url}: {message}" in str(caught.value)


def test_requests_hold_token_ids_and_seeds_and_leave_nothing_to_the_models_own_settings(
    serve: Callable[[Answers], str], model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "a key")
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    posted: list[dict[str, Any]] = []
    ids = tokenizer("2+2", add_special_tokens=False)["input_ids"]

    def complete(body: dict[str, Any], headers: Any) -> Any:
        assert headers["Authorization"] == "Bearer a key"
        posted.append(body)
        choice: dict[str, Any] = {"text": "unused", "token_ids": [*ids, tokenizer.eos_token_id]}
        choice["finish_reason"] = "stop"
        if len(body["prompt"]) > 3:  # a server that does not tell token ids
            choice = {"text": "2+2", "finish_reason": "length"}
        return {"choices": [choice], "usage": {"completion_tokens": 4}}

    answers = {"/v1/models": {"data": [{"id": str(model_dir)}]}, "/version": {"version": "0.32.0"}}
    url = serve({**answers, "/v1/completions": complete})
    sampling = Sampling(max_new_tokens=5, temperature=0.6, top_p=0.95, seed=7)
    backend = choose_backend("auto", url)
    assert (str(backend), backend.name) == ("vllm 0.32.0, a server", "server")
    section = ModelSection(model=str(model_dir))
    generate = make_subject("m", section, tokenizer, sampling, backend).load()
    requests = [Request("a/0", "1+1"), Request("a/1", "1+1"), Request("b/0", "9*9-8")]
    responses = generate(requests, 0)
    assert responses == [
        Response("2+2", 4, ended=True),
        Response("2+2", 4, ended=True),
        Response("2+2", 4, ended=False),
    ]
    assert len({body["seed"] for body in posted}) == 3
    assert sorted(len(body["prompt"]) for body in posted) == [3, 3, 5]
    body = {key: value for key, value in posted[0].items() if key not in ("seed", "prompt")}
    assert body == {
        "model": str(model_dir),
        "temperature": 0.6,
        "top_p": 0.95,
        "max_tokens": 5,
        "stop_token_ids": [tokenizer.eos_token_id],
        "skip_special_tokens": False,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "return_token_ids": True,
    }


def test_a_server_that_refuses_a_request_is_quoted(
    serve: Callable[[Answers], str], model_dir: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    refusal = (400, {"error": {"message": "maximum context length is 64"}})
    answers = {"/v1/models": {"data": [{"id": str(model_dir)}]}, "/version": {"version": "0.32.0"}}
    url = serve({**answers, "/v1/completions": refusal})
    backend = Backend("server", "0.32.0", url)
    section = ModelSection(model=str(model_dir))
    generate = make_subject("m", section, tokenizer, Sampling(5), backend).load()
    with pytest.raises(UserError) as caught:
        generate([Request("a/0", "1+1")], 0)
    assert "/v1/completions is refused with status 400: " in str(caught.value)
    assert "maximum context length is 64" in str(caught.value)
