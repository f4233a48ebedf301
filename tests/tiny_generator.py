"""A tiny random model with the arithmetic tokenizer, and a recipe that names it."""

import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import datasets
import forked
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from kd.demo.arithmetic import ArithmeticSet, draw_rows
from kd.demo.tiny_models import build_config, build_tokenizer
from kd.evaluate.tasks import TASKS
from kd.recipe import ROOT

Script = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, so large that greedy responses differ from prompt to prompt and markers occur
    in samples.
    """
    folder = tmp_path_factory.mktemp("tiny") / "model"
    tokenizer = build_tokenizer()
    config = build_config("student_base", tokenizer)
    config.initializer_range = 0.2
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a tokenizer of bytes, which takes any prompt."""
    folder = tmp_path_factory.mktemp("text") / "model"
    backend = Tokenizer(
        BPE({byte: index for index, byte in enumerate(sorted(ByteLevel.alphabet()))}, merges=[])
    )
    backend.pre_tokenizer, backend.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>"
    )
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = build_tokenizer().chat_template
    config = build_config("student_base", tokenizer)
    config.initializer_range = 0.2
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def problems_path(tmp_path: Path) -> Path:
    rows = draw_rows(ArithmeticSet("selection", 96, 1, 4), "0")
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
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
        command = [ROOT / "launch" / name, *arguments]
        return forked.run(command, cwd=tmp_path, env=environment, timeout=120)

    return run


# Rows in the form of each hub dataset.
ROWS: dict[str, list[dict[str, object]]] = {
    "aime24": [
        {"id": 60, "problem": "1+2", "answer": "204", "year": "2024"},
        {"problem": "2+2", "answer": "033"},
    ],
    "aime25": [
        {"id": "0", "problem": "Find the sum.", "answer": "70", "solution": "70", "year": "2025"}
    ],
    "amc23": [{"id": 0, "question": "How far?", "answer": 27.0, "url": "somewhere"}],
    "math500": [
        {
            "problem": "Convert.",
            "solution": "...",
            "answer": "\\left( 3, \\frac{\\pi}{2} \\right)",
            "level": 2,
        }
    ],
    "minerva_math": [{"question": "Find the diameter.", "answer": "1.6", "problem_type": "x"}],
    "olympiadbench": [{"question": "Find all.", "final_answer": ["$1$", "$2$"], "context": None}],
    "gsm8k": [{"question": "4*2", "answer": "4 * 2 = <<4*2=8>>8 clips\n#### 1,008"}],
}


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """stand_in(TASK, rows): the task reads a local folder with the configuration and the split of
    its hub dataset.
    """
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def write(name: str, rows: list[dict[str, object]] | None = None) -> None:
        task, folder = TASKS[name], tmp_path / "hub" / name
        folder.mkdir(parents=True)
        (folder / "rows.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows or ROWS[name])
        )
        files = f"[{{split: {task.split}, path: rows.jsonl}}]"
        header = f"configs:\n- config_name: {task.config or 'default'}\n  data_files: {files}\n"
        (folder / "README.md").write_text(f"---\n{header}---\n")
        monkeypatch.setitem(TASKS, name, replace(task, hub_id=str(folder)))

    return write
