"""A tiny random model with the arithmetic tokenizer, and a recipe that names it."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import Qwen3ForCausalLM

from kd.recipe import ROOT
from kd.tasks.arithmetic import ProblemSet, draw_rows
from kd.tasks.tiny_models import build_config, build_tokenizer

Script = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, so large that greedy responses differ from prompt to prompt and markers occur in samples."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    tokenizer = build_tokenizer()
    config = build_config("student_base", tokenizer)
    config.initializer_range = 0.2
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def problems_path(tmp_path: Path) -> Path:
    rows = draw_rows(ProblemSet("selection", 96, 1, 4), "0")
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def recipe_path(tmp_path: Path, model_dir: Path, problems_path: Path) -> Path:
    path = tmp_path / "trial.toml"
    path.write_text(
        f"""
        [teacher]
        model = "{model_dir}"
        [student]
        model = "{model_dir}"
        [data]
        path = "{problems_path}"
        think_open = "<think>"
        think_close = "</think>"
        [evaluation]
        path = "{problems_path}"
        judge = "exact"
        max_new_tokens = 12
        temperature = 0.0
        batch_size = 8
        """
    )
    return path


@pytest.fixture
def script(tmp_path: Path) -> Script:
    """Run a script of launch/ as a user would, in an empty directory."""

    def run(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(ROOT / "launch" / name), *map(str, arguments)],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    return run
