"""A server on this machine that stands in for the Hugging Face hub: the part of its API by which
huggingface_hub makes a repository or a branch, uploads LFS files and commits. What it answers is
what the client reads; the hub itself may do more, and was not asked.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_of_a_test"
OWNER = "me"


@dataclass
class Repository:
    """branches: name -> path -> content, as the last commit left them."""

    private: bool = False
    branches: dict[str, dict[str, bytes]] = field(
        default_factory=lambda: {"main": {".gitattributes": b"*.safetensors filter=lfs\n"}}
    )
    num_commits: int = 0


@dataclass
class Hub:
    """failures: "METHOD /beginning/of/a/path" -> the status that is answered in its place."""

    endpoint: str
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)  # of LFS, by SHA-256
    requests: list[str] = field(default_factory=list)
    failures: dict[str, int] = field(default_factory=dict)


class Refused(Exception):
    """(status, the hub's words, and the repository's address where it is there)"""


@contextmanager
def hub_server() -> Iterator[Hub]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.hub = Hub(f"http://127.0.0.1:{server.server_port}")  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server.hub  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def create(hub: Hub, body: Any) -> dict[str, Any]:
    name = f"{body['organization']}/{body['name']}"
    if body["organization"] != OWNER:
        raise Refused(403, f"You don't have the rights to create a model under {name}")
    if name in hub.repositories:
        raise Refused(409, "You already created this model repo", f"{hub.endpoint}/{name}")
    hub.repositories[name] = Repository(body.get("visibility") == "private")
    return {"url": f"{hub.endpoint}/{name}"}


def branch(hub: Hub, body: Any, name: str, revision: str) -> dict[str, Any]:
    branches = writable(hub, name).branches
    if unquote(revision) in branches:
        raise Refused(409, "Reference already exists")
    branches[unquote(revision)] = dict(branches["main"])
    return {}


def info(hub: Hub, body: Any, name: str, revision: str | None = None) -> dict[str, Any]:
    files = readable(hub, name).branches[unquote(revision or "main")]
    siblings = [{"rfilename": path} for path in files]
    return {"id": name, "private": readable(hub, name).private, "siblings": siblings}


def validate(hub: Hub, body: Any) -> dict[str, Any]:
    metadata = yaml.safe_load(body["content"].split("---\n")[1])
    if not re.fullmatch(r"[a-z0-9.-]+", metadata["license"]):
        raise Refused(400, '"license" must be one of the list')
    return {"warnings": [], "errors": []}


def preupload(hub: Hub, body: Any, name: str, revision: str) -> dict[str, Any]:
    writable(hub, name)
    modes = {
        file["path"]: "lfs" if file["path"].endswith(".safetensors") else "regular"
        for file in body["files"]
    }
    files = [{"path": p, "uploadMode": mode, "shouldIgnore": False} for p, mode in modes.items()]
    return {"files": files}


def batch(hub: Hub, body: Any, name: str) -> dict[str, Any]:
    writable(hub, name)
    steps = {"upload": "lfs", "verify": "verify"}
    objects = [
        item
        | {"actions": {s: {"href": f"{hub.endpoint}/{p}/{item['oid']}"} for s, p in steps.items()}}
        for item in body["objects"]
    ]
    return {"transfer": "basic", "objects": objects}


def upload(hub: Hub, body: bytes, oid: str) -> dict[str, Any]:
    if hashlib.sha256(body).hexdigest() != oid:
        raise Refused(400, "the content has another SHA-256")
    hub.objects[oid] = body
    return {}


def verify(hub: Hub, body: Any, oid: str) -> dict[str, Any]:
    if len(hub.objects[oid]) != body["size"]:
        raise Refused(400, "the content has another size")
    return {}


def commit(hub: Hub, body: bytes, name: str, revision: str) -> dict[str, Any]:
    repository = writable(hub, name)
    files = dict(repository.branches[unquote(revision)])
    for line in body.splitlines():
        operation = json.loads(line)
        key, value = operation["key"], operation["value"]
        if key == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif key == "lfsFile":
            files[value["path"]] = hub.objects[value["oid"]]
        elif key == "deletedFile":
            del files[value["path"]]
    repository.branches[unquote(revision)] = files
    repository.num_commits += 1
    oid = f"{repository.num_commits:040}"
    return {"commitUrl": f"{hub.endpoint}/{name}/commit/{oid}", "commitOid": oid}


def resolve(hub: Hub, body: Any, name: str, revision: str, path: str) -> bytes:
    files = readable(hub, name).branches.get(revision, {})
    if path not in files:
        raise Refused(404, "Entry not found")
    return files[path]


def readable(hub: Hub, name: str) -> Repository:
    if name not in hub.repositories:
        raise Refused(404, "Repository not found")
    return hub.repositories[name]


def writable(hub: Hub, name: str) -> Repository:
    if not name.startswith(f"{OWNER}/"):
        raise Refused(403, f"no write access to {name}")
    return readable(hub, name)


NAME = r"([\w.-]+/[\w.-]+)"
MODEL = rf"/api/models/{NAME}"
ROUTES = {
    "POST /api/repos/create": create,
    "POST /api/validate-yaml": validate,
    rf"POST {MODEL}/branch/([^/]+)": branch,
    rf"POST {MODEL}/preupload/([^/]+)": preupload,
    rf"POST {MODEL}/commit/([^/]+)": commit,
    rf"GET {MODEL}": info,
    rf"GET {MODEL}/revision/([^/]+)": info,
    rf"POST /{NAME}\.git/info/lfs/objects/batch": batch,
    r"PUT /lfs/(\w+)": upload,
    r"POST /verify/(\w+)": verify,
    rf"(?:GET|HEAD) /{NAME}/resolve/([^/]+)/(.+)": resolve,
}
OF_BYTES = (upload, commit)
WITHOUT_TOKEN = (upload, resolve, info)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        hub: Hub = self.server.hub  # type: ignore[attr-defined]
        request = f"{self.command} {urlsplit(self.path).path}"
        hub.requests.append(request)
        body = self._body()
        try:
            for failing, status in hub.failures.items():
                if request.startswith(failing):
                    raise Refused(status, "made to fail")
            answer = self._answer(hub, request, body)
        except Refused as refused:
            status, words, *url = refused.args
            headers = {"X-Error-Message": words} | (
                {"X-Error-Code": "RepoNotFound"} if words.startswith("Repository") else {}
            )
            self._send(status, json.dumps({"error": words, "url": "".join(url)}).encode(), headers)
            return
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        tag = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": "0" * 40}
        self._send(200, content, tag)

    do_POST = do_PUT = do_HEAD = do_GET

    def _answer(self, hub: Hub, request: str, body: bytes) -> Any:
        for pattern, answer in ROUTES.items():
            if match := re.fullmatch(pattern, request):
                is_known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
                if answer not in WITHOUT_TOKEN and not is_known:
                    raise Refused(401, "Invalid credentials in Authorization header")
                content = body if answer in OF_BYTES else json.loads(body or b"null")
                return answer(hub, content, *match.groups())  # type: ignore[operator]
        raise Refused(501, f"the stand-in has no {request}")

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """The tests print what they need."""
