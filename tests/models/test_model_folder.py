"""What is wrong with a model's folder is one message before anything is loaded."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import write_tiny_recipe

from kd.data.dataset import load_data
from kd.data.tokenizers import load_tokenizers
from kd.errors import UserError
from kd.models import model_folder
from kd.models.model_folder import check_data_ids, check_models
from kd.recipe import Recipe, load_recipe
from kd.runs.check import check_recipe

WEIGHTS, LFS = "model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
LAYER = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    model_folder._num_embedded.cache_clear()
    return load_recipe(str(write_tiny_recipe(tmp_path, num_rows=20)))


@pytest.fixture(params=["student", "teacher"])
def role(request: pytest.FixtureRequest) -> str:
    return request.param


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_weights(folder: Path, **changes: Any) -> None:
    """None removes a weight."""
    weights = load_file(folder / WEIGHTS) | changes
    save_file(
        {k: v for k, v in weights.items() if v is not None}, folder / WEIGHTS, {"format": "pt"}
    )


def as_pickle(folder: Path, **more: Any) -> None:
    torch.save(load_file(folder / WEIGHTS) | more, folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def as_shards(folder: Path, *names: str) -> None:
    """An index of these shards, of which the first has all weights."""
    weights = load_file(folder / WEIGHTS)
    save_file(weights, folder / names[0], {"format": "pt"})
    (folder / WEIGHTS).unlink()
    files = {name: names[i % len(names)] for i, name in enumerate(weights)}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


def cut(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


class Foreign:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("foreign code ran",)


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "an LFS pointer": (lambda f: (f / WEIGHTS).write_bytes(LFS), "Git LFS pointer"),
    "half a file": (lambda f: cut(f / WEIGHTS), "model.safetensors is damaged"),
    "no header": (lambda f: (f / WEIGHTS).write_bytes(b"{}"), "model.safetensors is damaged"),
    "an empty file": (lambda f: (f / WEIGHTS).write_bytes(b""), "model.safetensors is damaged"),
    "a folder": (
        lambda f: ((f / WEIGHTS).unlink(), (f / WEIGHTS).mkdir()),
        "not a regular file",
    ),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "no weights"),
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "an empty config": (
        lambda f: (f / "config.json").write_text("{}"),
        "no config.json of a model",
    ),
    "half a config": (lambda f: cut(f / "config.json"), "config.json: not valid JSON"),
    "an unknown type": (
        lambda f: change_json(f / "config.json", model_type="nobody_knows"),
        "nobody_knows",
    ),
    "a config of text": (
        lambda f: change_json(f / "config.json", hidden_size="wide"),
        r"config\.json",
    ),
    "another width": (
        lambda f: change_json(f / "config.json", intermediate_size=64),
        r"mlp\.\w+\.weight is \(.*48.*\) in the checkpoint but \(.*64.*\) by config\.json",
    ),
    "fewer layers than weights": (
        lambda f: change_json(f / "config.json", num_hidden_layers=0, layer_types=[]),
        r"config\.json describes a model without model\.layers\.0\..* and \d+ more",
    ),
    "a bias that no layer has": (
        lambda f: change_weights(f, **{f"{LAYER}.bias": torch.zeros(32)}),
        rf"without {LAYER}\.bias",
    ),
    "a missing weight": (
        lambda f: change_weights(f, **{f"{LAYER}.weight": None}),
        rf"the checkpoint lacks {LAYER}\.weight",
    ),
    "another lm_head": (
        lambda f: change_weights(
            f,
            **{"lm_head.weight": load_file(f / WEIGHTS)["model.embed_tokens.weight"] + 1.0},
        ),
        r"tie_word_embeddings = true, but lm_head\.weight in the checkpoint differs",
    ),
    "integers": (
        lambda f: change_weights(f, **{f"{LAYER}.weight": torch.zeros(32, 32, dtype=torch.int8)}),
        rf"{LAYER}\.weight is I8: ZeRO cannot",
    ),
    "8-bit floats": (
        lambda f: change_weights(
            f, **{f"{LAYER}.weight": torch.zeros(32, 32).to(torch.float8_e4m3fn)}
        ),
        rf"{LAYER}\.weight is F8_E4M3: ZeRO cannot",
    ),
    "a quantised model": (
        lambda f: change_json(f / "config.json", quantization_config={"quant_method": "gptq"}),
        r"quantised \(quantization_config, gptq\)",
    ),
    "an adapter": (
        lambda f: (f / "adapter_config.json").write_text("{}"),
        r"adapter_config\.json: .* merge it",
    ),
    "a foreign pickle": (lambda f: as_pickle(f, x=Foreign()), r"pytorch_model\.bin"),
    "half a pickle": (
        lambda f: (as_pickle(f), cut(f / "pytorch_model.bin")),
        r"pytorch_model\.bin",
    ),
    "a shard too few": (
        lambda f: as_shards(f, "one.safetensors", "two.safetensors"),
        r"1 of the 2 files that model\.safetensors\.index\.json names are not in .*two",
    ),
    "a shard of elsewhere": (
        lambda f: as_shards(f, "one.safetensors", "../teacher/model.safetensors"),
        r"names '\.\./teacher/model\.safetensors', which is not a file in its folder",
    ),
    "an index of nothing": (
        lambda f: (
            as_shards(f, "one.safetensors"),
            (f / f"{WEIGHTS}.index.json").write_text("[]"),
        ),
        "has no weight_map",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_folder_is_one_message_that_names_the_field(
    recipe: Recipe, role: str, kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = Path(getattr(recipe, role).model)
    spoil, message = BAD[kind]
    spoil(folder)
    with pytest.raises(UserError, match=message) as caught:
        check_recipe(recipe)
    assert f"{role}.model = " in str(caught.value) or str(folder / "config.json") in str(
        caught.value
    )
    assert "foreign code ran" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("where", ["student.model", "teacher.model"])
def test_a_file_in_the_place_of_a_model_is_refused(recipe: Recipe, where: str) -> None:
    with pytest.raises(UserError, match=rf"{where} = .*: it is a file; name the folder"):
        check_models(recipe.with_values({where: str(recipe.data.path)}))


GOOD: dict[str, Callable[[Path], object]] = {
    "as it is": lambda f: None,
    "a pickle of torch": as_pickle,
    "a shard": lambda f: as_shards(f, "one.safetensors"),
    "the lm_head stored a second time": lambda f: change_weights(
        f, **{"lm_head.weight": load_file(f / WEIGHTS)["model.embed_tokens.weight"].clone()}
    ),
    "bfloat16": lambda f: change_weights(
        f, **{k: v.bfloat16() for k, v in load_file(f / WEIGHTS).items()}
    ),
    "a value head beside it": lambda f: change_weights(f, **{"v_head.weight": torch.zeros(1, 32)}),
    "frequencies stored by an old version": lambda f: change_weights(
        f, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    ),
}


@pytest.mark.parametrize("kind", GOOD)
def test_a_good_folder_passes_and_tells_how_many_tokens_it_embeds(
    recipe: Recipe, role: str, kind: str
) -> None:
    GOOD[kind](Path(getattr(recipe, role).model))
    vocab_size = json.loads((Path(recipe.student.model) / "config.json").read_text())["vocab_size"]
    assert check_models(recipe) == vocab_size


def test_a_part_that_is_not_loaded_is_told(
    recipe: Recipe, caplog: pytest.LogCaptureFixture
) -> None:
    GOOD["a value head beside it"](Path(recipe.student.model))
    check_models(recipe)
    assert "not loaded: v_head.weight" in caplog.text


def test_a_random_student_needs_a_config_and_no_weights(recipe: Recipe) -> None:
    random = recipe.with_values({"student.init": "random"})
    (Path(recipe.student.model) / WEIGHTS).unlink()
    assert check_models(random) > 0
    (Path(recipe.student.model) / "config.json").unlink()
    model_folder._num_embedded.cache_clear()
    with pytest.raises(UserError, match=r"student\.model = .*no config\.json"):
        check_models(random)


def test_no_weight_is_read(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a weight is read")

    monkeypatch.setattr(model_folder, "_read", refuse)
    check_models(recipe)


@pytest.mark.parametrize("change", ["pad_token", "eos_token"])
def test_a_special_token_without_an_embedding_is_refused(recipe: Recipe, change: str) -> None:
    for model in (recipe.student.model, recipe.teacher.model):
        add_token(Path(model), change)
    with pytest.raises(
        UserError, match=r"token '<new>' has id \d+, but the models embed only \d+ tok"
    ):
        check_models(recipe)


def test_a_token_of_the_data_without_an_embedding_is_refused(recipe: Recipe) -> None:
    for model in (recipe.student.model, recipe.teacher.model):
        add_token(Path(model), None)
    num_embedded = check_models(recipe)  # the token is there, and nothing uses it yet
    tokenizer = load_tokenizers(recipe)
    check_data_ids(load_data(recipe, tokenizer), tokenizer, num_embedded)
    traces = Path(str(recipe.data.path))
    traces.write_text(traces.read_text().replace('"reasoning": "', '"reasoning": "<new>'))
    with pytest.raises(UserError, match="the token '<new>' of the data has id"):
        check_data_ids(load_data(recipe, tokenizer), tokenizer, num_embedded)


def add_token(folder: Path, name: str | None) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<new>"])
    if name is not None:
        setattr(tokenizer, name, "<new>")
    tokenizer.save_pretrained(folder)
