"""Which backend is taken, and what vLLM is asked: a module that only writes down its arguments
stands in for it.
"""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from kd.errors import UserError
from kd.generation import backends
from kd.generation.backends import (
    Backend,
    Generate,
    Request,
    choose_backend,
    make_subject,
)
from kd.generation.sampling import Response, Sampling
from kd.recipe import ModelSection

VLLM = Backend("vllm", "0.33.0")
SAMPLING = Sampling(max_new_tokens=5, temperature=0.6, top_p=0.95, seed=7)
REQUESTS = [Request("a/0", "1+1"), Request("a/1", "1+1"), Request("b/0", "9*9-8")]


@pytest.fixture(scope="module")
def tokenizer(model_dir: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(model_dir)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """What LLM and LLM.generate were given; the first response ends, the second is cut off."""
    asked: dict[str, Any] = {"loads": 0}
    ids = tokenizer("<think>2</think>2", add_special_tokens=False)["input_ids"]
    outputs = [
        SimpleNamespace(token_ids=[*ids, tokenizer.eos_token_id], finish_reason="stop"),
        SimpleNamespace(token_ids=tuple(ids), finish_reason="length"),
    ]

    class LLM:
        def __init__(self, **arguments: Any) -> None:
            asked.update(arguments, loads=asked["loads"] + 1)

        def generate(
            self, prompts: list[Any], sampling_params: list[Any], use_tqdm: bool
        ) -> list[Any]:
            asked.update(prompts=prompts, params=sampling_params)
            return [SimpleNamespace(outputs=[outputs[index % 2]]) for index in range(len(prompts))]

    module = ModuleType("vllm")
    vars(module).update(LLM=LLM, SamplingParams=dict, TokensPrompt=dict, __version__="0.33.0+cpu")
    monkeypatch.setitem(sys.modules, "vllm", module)
    return asked


def on_vllm(
    model_dir: Path, tokenizer: PreTrainedTokenizerFast, sampling: Sampling = SAMPLING
) -> Generate:
    section = ModelSection(model=str(model_dir))
    return make_subject("label", section, tokenizer, sampling, VLLM).load()


def test_vllm_gets_the_rendered_prompts_as_tokens_and_one_request_per_sample(
    asked: dict[str, Any], model_dir: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    responses = on_vllm(model_dir, tokenizer)(REQUESTS, 0)
    assert (asked["model"], asked["revision"], asked["trust_remote_code"]) == (
        str(model_dir),
        None,
        False,
    )
    assert (asked["tensor_parallel_size"], asked["seed"]) == (1, 7)
    assert [prompt["prompt_token_ids"] for prompt in asked["prompts"]] == [
        tokenizer(request.prompt, add_special_tokens=False)["input_ids"] for request in REQUESTS
    ]
    assert len({params.pop("seed") for params in asked["params"]}) == 3
    assert (
        asked["params"]
        == [
            {
                "n": 1,
                "temperature": 0.6,
                "top_p": 0.95,
                "max_tokens": 5,
                "stop_token_ids": [tokenizer.eos_token_id],
                "skip_special_tokens": False,
            }
        ]
        * 3
    )
    text = "<think>2</think>2"
    num_tokens = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    assert responses[:2] == [
        Response(text, num_tokens + 1, ended=True),
        Response(text, num_tokens, ended=False),
    ]


def test_seeds_on_vllm_depend_on_the_sample_and_the_seed_and_not_on_the_batch(
    asked: dict[str, Any], model_dir: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    def seeds(
        requests: list[Request], batch_index: int, sampling: Sampling = SAMPLING
    ) -> list[int]:
        on_vllm(model_dir, tokenizer, sampling)(requests, batch_index)
        return [params["seed"] for params in asked["params"]]

    assert seeds(REQUESTS[::-1], 5) == seeds(REQUESTS, 0)[::-1]
    assert not set(seeds(REQUESTS, 0)) & set(
        seeds(REQUESTS, 0, Sampling(**{**vars(SAMPLING), "seed": 8}))
    )


def test_a_model_is_loaded_once_and_only_when_it_is_needed(
    asked: dict[str, Any], model_dir: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    subject = make_subject("label", ModelSection(model=str(model_dir)), tokenizer, SAMPLING, VLLM)
    assert asked["loads"] == 0
    assert subject.load() is subject.load()
    assert asked["loads"] == 1


@pytest.mark.parametrize(
    ("value", "installed", "gpu", "expected"),
    [
        ("auto", True, True, "vllm"),
        ("auto", True, False, "transformers"),
        ("auto", False, True, "transformers"),
        ("transformers", True, True, "transformers"),
        ("vllm", True, False, "vllm"),
    ],
)
def test_auto_is_vllm_where_it_is_installed_and_sees_a_gpu(
    value: str,
    installed: bool,
    gpu: bool,
    expected: str,
    asked: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        backends.importlib.util, "find_spec", lambda name: object() if installed else None
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert choose_backend(value).name == expected


def test_vllm_that_is_not_installed_is_an_error_that_names_the_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r'--backend vllm: vLLM is not installed: run pip install -e ".\[vllm\]"'
    ):
        choose_backend("vllm")


def test_the_version_is_the_modules_own_whatever_its_distribution_is_called(
    asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: object())
    assert str(choose_backend("vllm")) == "vllm 0.33.0+cpu"
    assert str(choose_backend("vllm", tensor_parallel=4)) == "vllm 0.33.0+cpu, on 4 GPUs"
    assert str(choose_backend("transformers")).startswith("transformers 5.")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("transformers", None, 2), "--tensor-parallel 2: only vLLM divides a model"),
        (("transformers", None, 0), "--tensor-parallel 0: write at least 1"),
        (("vllm", "http://127.0.0.1:1", 1), "leave out --backend vllm"),
        (("auto", "http://127.0.0.1:1", 2), "leave out --tensor-parallel"),
        (("auto", "http://127.0.0.1:1", 1), "--server http://127.0.0.1:1: no answer to /version"),
        (("auto", "127.0.0.1:8000", 1), "--server 127.0.0.1:8000: not a URL"),
    ],
)
def test_arguments_that_do_not_go_together_are_the_users_error(
    arguments: tuple[str, str | None, int], message: str
) -> None:
    with pytest.raises(UserError) as caught:
        choose_backend(*arguments)
    assert message in str(caught.value)
