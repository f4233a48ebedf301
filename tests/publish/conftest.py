"""A hub on this machine, a finished run, and launch/export.py in this process."""

import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import close_session
from publish.hub_server import TOKEN, Hub, Repository, hub_server
from report.run_folders import STUDENT, write_run
from tiny import ROOT, save_tiny_model

Export = Callable[..., None]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """It holds the base model of the run, whose card states a licence."""
    constants = "huggingface_hub.constants"
    with hub_server() as served:
        card = b"---\nlicense: mit\n---\n"
        served.repositories[STUDENT] = Repository(branches={"main": {"README.md": card}})
        monkeypatch.setattr(f"{constants}.ENDPOINT", served.endpoint)
        url = f"{served.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(f"{constants}.HUGGINGFACE_CO_URL_TEMPLATE", url)
        monkeypatch.setattr(f"{constants}.HF_HUB_OFFLINE", False)
        monkeypatch.setattr(f"{constants}.HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(f"{constants}.HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(f"{constants}.HF_TOKEN_PATH", str(tmp_path / "no_token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        close_session()
        yield served
        close_session()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Evaluated, with adapters beside the weights of export/best."""
    folder = write_run(tmp_path / "runs" / "student", keep_fraction=0.5, num_correct=80)
    best = folder / "export" / "best"
    save_tiny_model(best, seed=3)
    (best / "tokenizer.json").write_text('{"version": "1.0"}')
    (best / "adapter").mkdir()
    (best / "adapter" / "adapter_config.json").write_text('{"r": 4}')
    (best / "adapter" / "adapter_model.safetensors").write_bytes(bytes(range(256)) * 9)
    return folder


@pytest.fixture
def export(monkeypatch: pytest.MonkeyPatch) -> Export:
    def call(*arguments: str | Path) -> None:
        monkeypatch.setattr(sys, "argv", ["export.py", *map(str, arguments)])
        runpy.run_path(str(ROOT / "launch" / "export.py"))["main"]()

    return call
