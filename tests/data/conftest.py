"""Real tokenizers (tests/fetch_assets.sh) for the text of sections, and a tiny one for everything
else.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from data_samples import build_tokenizer, good_rows, write_jsonl
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from kd.recipe import ROOT, Recipe


def _asset(name: str) -> PreTrainedTokenizerFast:
    folder = ROOT / ".assets" / name
    if not folder.is_dir():
        stop = pytest.fail if os.environ.get("CI") else pytest.skip
        stop(f"{name} is missing: run tests/fetch_assets.sh")
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="session")
def qwen3() -> PreTrainedTokenizerFast:
    """The real Qwen3 tokenizer and template: <think> is one token. Shared: change a copy."""
    return _asset("qwen3_tokenizer")


@pytest.fixture(scope="session")
def deepseek() -> PreTrainedTokenizerFast:
    """The real DeepSeek-V3 tokenizer and template: <think> is three tokens. Shared: change a
    copy.
    """
    return _asset("deepseek_v3_tokenizer")


@pytest.fixture(scope="session")
def tiny() -> PreTrainedTokenizerFast:
    """`build_tokenizer()`. Shared: change a copy."""
    return build_tokenizer()


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., Recipe]:
    """recipe(data={...}, truncation={...}, ...) of 20 good local rows, with a cache of its own."""

    def build(**sections: dict[str, Any]) -> Recipe:
        path = tmp_path / "rows.jsonl"
        if not path.exists():
            write_jsonl(path, good_rows(20))
        data = {"path": str(path), "cache_dir": str(tmp_path / "cache")} | sections.pop("data", {})
        defaults = {
            "student": {"model": str(tmp_path / "student")},
            "teacher": {"model": str(tmp_path / "teacher")},
        }
        return Recipe.model_validate({**defaults, **sections, "data": data})

    return build
