"""Loading a model: which attention it gets, and checkpoints that are not whole."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from architectures import build
from safetensors.torch import load_file, save_file
from tiny import save_tiny_model

from kd.engine.ds_config import is_bf16
from kd.errors import UserError
from kd.models import loading
from kd.models.loading import (
    choose_attention,
    load_config,
    load_partitioned,
    load_whole,
    random_model,
    why_attention,
)
from kd.recipe import ModelSection

FP32: dict[str, object] = {}
BF16 = {"bf16": {"enabled": True}}
ALL_FLASH = ("flash_attention_2", "flash_attention_3", "flash_attention_4")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / "model", seed=0)


def section(folder: Path | str, **fields: object) -> ModelSection:
    return ModelSection(model=str(folder), **fields)


@pytest.mark.parametrize(
    ("model_type", "attention"), [("llama", "sdpa"), ("gemma2", "eager"), ("gpt_oss", "eager")]
)
def test_auto_is_the_best_attention_that_the_architecture_supports(
    model_type: str, attention: str
) -> None:
    config = build(model_type, tied=True, seed=0).config
    assert choose_attention(section("any"), config, BF16, role="student") == attention
    assert (
        choose_attention(section("any", attention="eager"), config, BF16, role="student") == "eager"
    )


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """gpu(9, "flash_attention_2"): this machine has a GPU of compute capability 9.0 and that
    package.
    """

    def install(major: int, *packages: str) -> None:
        monkeypatch.setattr(loading, "device_type", lambda: "cuda")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (major, 0))
        kernels = {
            name: (lambda name=name: name in packages, runs_on)
            for name, (_, runs_on) in loading._FLASH_ATTENTION.items()
        }
        monkeypatch.setattr(loading, "_FLASH_ATTENTION", kernels)

    return install


@pytest.mark.parametrize(
    ("model_type", "attention"),
    [
        ("llama", "flash_attention_3"),
        ("gemma2", "flash_attention_3"),
        ("gpt_oss", "eager"),
        ("mpt", "eager"),
    ],
)
def test_auto_is_flash_attention_where_gpu_package_and_architecture_have_it(
    gpu: Callable[..., None], model_type: str, attention: str
) -> None:
    config = build(model_type, tied=True, seed=0).config
    gpu(9, "flash_attention_2", "flash_attention_3")
    assert choose_attention(section("any"), config, BF16, role="student") == attention


@pytest.mark.parametrize(
    ("major", "attention"),
    [(7, "sdpa"), (8, "flash_attention_2"), (9, "flash_attention_4"), (10, "flash_attention_4")],
)
def test_a_gpu_gets_flash_attention_that_has_kernels_for_it(
    gpu: Callable[..., None], major: int, attention: str
) -> None:
    config = build("llama", tied=True, seed=0).config
    gpu(major, *ALL_FLASH)
    assert choose_attention(section("any"), config, BF16, role="student") == attention


def test_flash_attention_3_is_for_hopper_alone(gpu: Callable[..., None]) -> None:
    config = build("llama", tied=True, seed=0).config
    gpu(10, "flash_attention_2", "flash_attention_3")
    assert choose_attention(section("any"), config, BF16, role="student") == "flash_attention_2"


def test_an_fp32_model_gets_no_flash_attention_and_asking_for_it_says_why(
    gpu: Callable[..., None],
) -> None:
    config = build("llama", tied=True, seed=0).config
    gpu(9, *ALL_FLASH)
    assert choose_attention(section("any"), config, FP32, role="student") == "sdpa"
    with pytest.raises(
        UserError,
        match=r"for llama in torch\.float32, only sdpa, eager: .* bf16 in the file of deepsp",
    ):
        choose_attention(
            section("any", attention="flash_attention_2"), config, FP32, role="student"
        )


def test_a_run_on_the_cpu_of_a_machine_with_a_gpu_gets_no_flash_attention(
    gpu: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = build("llama", tied=True, seed=0).config
    gpu(9, *ALL_FLASH)
    monkeypatch.setattr(loading, "device_type", lambda: "cpu")  # DS_ACCELERATOR=cpu
    assert choose_attention(section("any"), config, BF16, role="student") == "sdpa"


@pytest.mark.parametrize(
    ("model_type", "attention", "choices"),
    [("llama", "flash_attention_2", "sdpa, eager"), ("gemma2", "sdpa", "eager")],
)
def test_attention_that_is_not_to_be_had_is_refused_with_what_is(
    model_type: str, attention: str, choices: str
) -> None:
    config = build(model_type, tied=True, seed=0).config
    expected = (
        rf'^teacher\.attention = "{attention}" is not available here for {model_type} in .*, '
        f"only {choices}: "
    )
    with pytest.raises(UserError, match=expected):
        choose_attention(section("any", attention=attention), config, BF16, role="teacher")


@pytest.mark.parametrize(
    ("model_type", "packages", "ds_config", "asked", "words"),
    [
        ("llama", ALL_FLASH, BF16, "auto", "the best that is installed"),
        ("llama", ALL_FLASH, BF16, "sdpa", "student.attention says so"),
        ("llama", ALL_FLASH, FP32, "auto", "flash attention needs bf16"),
        ("llama", (), BF16, "auto", "no flash attention for this GPU is installed"),
        ("mpt", ALL_FLASH, BF16, "auto", "mpt has no flash attention, and mpt has no sdpa"),
    ],
)
def test_the_log_says_why_a_model_attends_as_it_does(
    gpu: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    model_type: str,
    packages: tuple[str, ...],
    ds_config: dict[str, object],
    asked: str,
    words: str,
) -> None:
    model, named = build(model_type, tied=True, seed=0), section("any", attention=asked)
    gpu(9, *packages)
    chosen = choose_attention(named, model.config, ds_config, role="student")
    model.config._attn_implementation_internal = chosen
    assert why_attention(named, model, ds_config, role="student") == words
    monkeypatch.setattr(loading, "device_type", lambda: "cpu")
    if asked == "auto" and chosen == "sdpa":
        assert why_attention(named, model, ds_config, role="student") == (
            "flash attention needs a GPU"
        )


@pytest.mark.parametrize("ds_config", [FP32, BF16], ids=["fp32", "bf16"])
def test_a_model_has_the_dtype_and_the_weights_asked_for(
    folder: Path, ds_config: dict[str, object]
) -> None:
    model = load_partitioned(section(folder), ds_config, role="student")
    stored = load_file(folder / "model.safetensors")
    assert model.dtype == (torch.bfloat16 if is_bf16(ds_config) else torch.float32)
    assert model.config._attn_implementation == "sdpa"
    for name, tensor in stored.items():
        assert torch.equal(model.state_dict()[name], tensor.to(model.dtype)), name


def test_a_random_student_is_the_same_for_the_same_seed(folder: Path) -> None:
    first, again, other = (
        random_model(section(folder), FP32, role="student", seed=seed) for seed in (1, 1, 2)
    )
    embeddings = [model.get_input_embeddings().weight for model in (first, again, other)]
    assert torch.equal(embeddings[0], embeddings[1])
    assert not torch.equal(embeddings[0], embeddings[2])
    assert not torch.equal(
        embeddings[0], load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    )


@pytest.mark.parametrize(
    "lacking",
    ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "model.embed_tokens.weight"],
)
def test_a_checkpoint_that_lacks_a_weight_is_refused_with_its_name(
    folder: Path, lacking: str
) -> None:
    file = folder / "model.safetensors"
    save_file(
        {name: tensor for name, tensor in load_file(file).items() if name != lacking},
        file,
        {"format": "pt"},
    )
    with pytest.raises(
        UserError,
        match=rf"^teacher\.model = .*: the checkpoint lacks .*{lacking}.*model is complete",
    ):
        load_whole(section(folder), FP32, role="teacher")


@pytest.mark.parametrize("lacking", ["model.safetensors", "config.json"])
def test_a_folder_that_lacks_a_file_is_refused(folder: Path, lacking: str) -> None:
    (folder / lacking).unlink()
    with pytest.raises(UserError, match=r"^student\.model = "):
        load_whole(section(folder), FP32, role="student")


@pytest.mark.parametrize("name", ["no/such/folder/at/all", "nobody/nothing"])
def test_a_model_that_is_nowhere_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=rf"^teacher\.model = .{name}.: "):
        load_config(section(name), role="teacher")
    with pytest.raises(UserError, match=rf"^teacher\.model = .{name}.: "):
        load_whole(section(name), FP32, role="teacher")
