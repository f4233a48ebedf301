"""Check a model before it is loaded: its files, their headers and its tokenizer. No weight is read.

transformers itself says what it would load, on the meta device, so names that it converts while
loading (of experts, for example) are compared in their final form.
"""

import contextlib
import functools
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from kd.data.tokenizers import load_tokenizers
from kd.errors import UserError
from kd.files import read_json
from kd.hub import find_model, first_line, hub_errors, resolve
from kd.models.trained import check_trained
from kd.recipe import ModelSection, Recipe, StudentSection, TeacherSection

if TYPE_CHECKING:
    from kd.data.dataset import Data  # imports datasets; --check does without

log = logging.getLogger(__name__)

# As transformers chooses: the first that is there. An index names the files of several shards.
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
FLOATS = {"F64", "F32", "F16", "BF16"}
# Recomputed, and stored by versions of long ago.
BUFFERS = ("inv_freq", "masked_bias", "attn.bias", "attention.bias")


def check_models(recipe: Recipe) -> int:
    """Look at student, teacher and their tokenizer; returns how many tokens both models embed.

    A hub model is looked at where its files are in the local cache: no network is asked. Raises
    UserError that names the field, the file and the remedy.
    """
    sections: dict[str, ModelSection] = {"student.model": recipe.student}
    if recipe.teacher is not None and needs_weights(recipe.teacher):
        sections["teacher.model"] = recipe.teacher
    rows = {field: _num_embedded(field, section) for field, section in sections.items()}
    num_embedded = min(rows.values())
    if num_embedded:
        tokenizer = load_tokenizers(recipe)
        pad, end = tokenizer.pad_token, tokenizer.eos_token
        _check_token_id(f"the pad token {pad!r}", tokenizer.pad_token_id, num_embedded)
        _check_token_id(f"the end token {end!r}", tokenizer.eos_token_id, num_embedded)
    return num_embedded


def needs_weights(teacher: TeacherSection) -> bool:
    """Whether the teacher's weights are read. A cache of tokens or vectors replaces all of them,
    and a cache of hidden states all but the head.
    """
    if teacher.cache is None:
        return True
    manifest = Path(teacher.cache) / "manifest.json"
    return not manifest.is_file() or read_json(manifest).get("kind") == "hidden"


def check_data_ids(data: "Data", tokenizer: PreTrainedTokenizerFast, num_embedded: int) -> None:
    """Raise UserError for a token of the data that the models do not embed: num_embedded, as
    check_models returns it. Tokens are read only where the tokenizer has such ids.
    """
    if not num_embedded or max(tokenizer.get_vocab().values()) < num_embedded:
        return
    from pyarrow import compute

    for examples in (data.train, data.validation):
        if examples is not None:
            for batch in examples.table.with_format("arrow").iter(batch_size=1000):
                largest = compute.max(compute.list_flatten(batch["input_ids"])).as_py()
                if largest is not None:
                    token = tokenizer.convert_ids_to_tokens(largest)
                    _check_token_id(f"the token {token!r} of the data", largest, num_embedded)


def _check_token_id(what: str, token_id: int, num_embedded: int) -> None:
    if token_id >= num_embedded:
        raise UserError(
            f"{what} has id {token_id}, but the models embed only {num_embedded} tokens, 0 to "
            f"{num_embedded - 1}: save the model after model.resize_token_embeddings(), or the "
            "tokenizer without added tokens"
        )


@functools.cache
def _num_embedded(field: str, section: ModelSection) -> int:
    """Rows of the embedding, or of the lm_head where it has fewer; 0 where nothing is there yet."""
    folder = find_model(field, section)
    if folder is None:
        return 0
    _check_config(field, section, folder)
    if isinstance(section, StudentSection) and section.init == "random":
        with hub_errors(field, section.model), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(_config(field, section, folder))
    else:
        files = _weight_files(field, section, folder)
        if not files:
            return 0
        for file in files:
            _check_header(field, section, file)
        model = _described(field, section, folder, files)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if isinstance(section, StudentSection) and head is not None:
        check_trained(model, section)
    return min(part.weight.shape[0] for part in (embedding, head) if part is not None)


def _is_local(section: ModelSection, folder: Path) -> bool:
    return folder == Path(resolve("", section.model))


def _check_config(field: str, section: ModelSection, folder: Path) -> None:
    where = f"{field} = {section.model!r}"
    if (folder / "adapter_config.json").exists():
        raise UserError(
            f"{where}: adapter_config.json: adapters cannot be loaded: merge it into its base "
            "model and save that, or remove the file if the weights are merged already"
        )
    config = _config(field, section, folder)
    quantised = getattr(config.get_text_config(), "quantization_config", None) or getattr(
        config, "quantization_config", None
    )
    if quantised:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise UserError(
            f"{where}: its weights are quantised (quantization_config, {method}), and ZeRO cannot "
            "divide those: name the model in bfloat16"
        )


def _config(field: str, section: ModelSection, folder: Path) -> PretrainedConfig:
    content = read_json(folder / "config.json") if (folder / "config.json").exists() else None
    if not isinstance(content, dict) or not content:
        raise UserError(
            f"{field} = {section.model!r}: {folder} holds no config.json of a model: name the "
            "folder that save_pretrained wrote"
        )
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=section.trust_remote_code)
    except Exception as error:  # whatever a configuration of others leads to
        raise _cannot_load(field, section, f"{folder / 'config.json'}", error) from error


def _cannot_load(field: str, section: ModelSection, where: str, error: BaseException) -> UserError:
    return UserError(
        f"{field} = {section.model!r}: {where}: transformers cannot load it\n"
        f"({type(error).__name__}: {first_line(error)})"
    )


def _weight_files(field: str, section: ModelSection, folder: Path) -> list[Path]:
    """Those that transformers would read. A hub snapshot that is not whole gives none: loading it
    fetches the rest.
    """
    where = f"{field} = {section.model!r}"
    for name in WEIGHTS:
        index = folder / f"{name}.index.json"
        if (folder / name).exists():
            return [folder / name]
        if index.exists():
            break
    else:
        if not _is_local(section, folder):
            return []
        raise UserError(f"{where}: no weights in {folder}: it has neither {' nor '.join(WEIGHTS)}")
    content = read_json(index)
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not names:
        raise UserError(f"{where}: {index} has no weight_map: save the model again")
    for shard in names.values():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise UserError(f"{where}: {index} names {shard!r}, which is not a file in its folder")
    files = [folder / shard for shard in sorted(set(names.values()))]
    missing = [file.name for file in files if not file.exists()]
    if missing and not _is_local(section, folder):
        return []
    if missing:
        raise UserError(
            f"{where}: {len(missing)} of the {len(files)} files that {index.name} names are not "
            f"in {folder}, such as {missing[0]}: copy or download them"
        )
    return files


def _check_header(field: str, section: ModelSection, file: Path) -> None:
    where = f"{field} = {section.model!r}: {file.name}"
    if not file.is_file():
        raise UserError(f"{where} is not a regular file")
    with file.open("rb") as content:
        if content.read(40).startswith(b"version https://git-lfs"):
            raise UserError(
                f"{where} is a Git LFS pointer, not weights: run `git lfs pull` in its "
                "repository, or download the file"
            )
    if file.suffix != ".safetensors":
        return  # read by torch below
    try:
        with safe_open(file, "pt") as tensors:
            names = list(tensors.keys())
            dtypes = {name: tensors.get_slice(name).get_dtype() for name in names}
    except SafetensorError as error:
        raise UserError(
            f"{where} is damaged, or not a safetensors file ({error}): copy or download it again"
        ) from None
    for name, dtype in dtypes.items():
        if name.endswith(".weight") and dtype not in FLOATS:
            raise UserError(
                f"{where}: {name} is {dtype}: ZeRO cannot divide quantised weights: name the "
                "model in bfloat16"
            )


def _described(
    field: str, section: ModelSection, folder: Path, files: list[Path]
) -> PreTrainedModel:
    """The model on the meta device, when its files hold what its configuration asks for."""
    where = f"{field} = {section.model!r}"
    try:
        with _without_progress_bar():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                device_map="meta",
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # told below, with the others
                trust_remote_code=section.trust_remote_code,
            )
    except Exception as error:  # a pickle that torch refuses, a shape that no layer has
        names = ", ".join(sorted({file.name for file in files})[:2])
        raise _cannot_load(field, section, f"config.json or {names}", error) from error
    model, info = loaded
    if info["missing_keys"]:
        raise UserError(
            f"{where}: the checkpoint lacks {_some(info['missing_keys'])}: check that the model "
            "is complete"
        )
    if info["mismatched_keys"]:
        name, stored, wanted = sorted(info["mismatched_keys"])[0]
        raise UserError(
            f"{where}: {name} is {tuple(stored)} in the checkpoint but {tuple(wanted)} by "
            f"config.json ({len(info['mismatched_keys'])} such weights): use the config.json that "
            "belongs to the weights"
        )
    left_out = [name for name in info["unexpected_keys"] if _belongs_to(model, name)]
    if left_out:
        raise UserError(
            f"{where}: config.json describes a model without {_some(left_out)}, which the "
            "checkpoint has: use the config.json that belongs to the weights"
        )
    if info["unexpected_keys"]:
        log.warning("%s: not loaded: %s", where, _some(info["unexpected_keys"]))
    _check_tied(where, model, files)
    return model


@contextlib.contextmanager
def _without_progress_bar() -> Iterator[None]:
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _some(names: Iterable[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")


def _belongs_to(model: PreTrainedModel, name: str) -> bool:
    """Whether a weight that was not asked for is of a part that is trained, as a bias or a layer
    would be; a value head or a vision tower is a part of its own.
    """
    if name.endswith(BUFFERS):
        return False
    modules = dict(model.named_modules()).keys() - {"", model.base_model_prefix}
    parents = name.split(".")[:-1]
    return any(".".join(parents[:depth]) in modules for depth in range(1, len(parents) + 1))


def _check_tied(where: str, model: PreTrainedModel, files: list[Path]) -> None:
    """Where config.json ties the lm_head to the embedding and the checkpoint has both, they must be
    the same: ZeRO-3 would keep one of them.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = model.config.get_text_config().tie_word_embeddings
    if not tied or head is None or head.weight is embedding.weight:
        return
    names = [name for name, module in model.named_modules() if module in (embedding, head)]
    stored = [_read(files, f"{name}.weight") for name in names]
    if any(tensor is None for tensor in stored) or torch.equal(*stored):  # type: ignore[arg-type]
        return
    raise UserError(
        f"{where}: config.json says tie_word_embeddings = true, but {names[-1]}.weight in the "
        f"checkpoint differs from {names[0]}.weight: set tie_word_embeddings to false to keep it, "
        "or remove it from the checkpoint"
    )


def _read(files: list[Path], name: str) -> Tensor | None:
    for file in files:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as tensors:
                names = list(tensors.keys())
                if name in names:
                    return tensors.get_tensor(name)
        else:
            weights = torch.load(file, mmap=True, weights_only=True)
            if name in weights:
                return weights[name]
    return None
