"""A checkpoint's files: what identifies a model, and its head without the rest of it."""

import hashlib
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM

from kd.errors import UserError
from kd.hub import hub_errors, resolve
from kd.losses import Head
from kd.models.head import head_of
from kd.models.loading import load_config, load_whole
from kd.recipe import ModelSection


def weights_folder(section: ModelSection, *, role: str) -> Path:
    """Where a model's weights are on this host: its folder, or its place in the hub's cache.

    Raises UserError where there are none.
    """
    field = f"{role}.model"
    folder = Path(resolve(field, section.model))
    if not folder.exists():
        with hub_errors(field, section.model):
            folder = Path(
                snapshot_download(section.model, revision=section.revision, local_files_only=True)
            )
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        raise UserError(
            f"{field} = {section.model!r}: no weights in {folder}: run launch/prepare.py with "
            "this recipe"
        )
    return folder


def weights_sha256(section: ModelSection, *, role: str) -> str:
    """Of every byte of all files of weights, in the order of their names, and of config.json."""
    digest = hashlib.sha256()
    folder = weights_folder(section, role=role)
    for path in [*sorted(folder.glob("*.safetensors")), folder / "config.json"]:
        with path.open("rb") as file:
            while part := file.read(2**24):
                digest.update(part)
    return digest.hexdigest()


def load_head(section: ModelSection, *, role: str, dtype: torch.dtype) -> Head:
    """A model's head, on the CPU: its own tensors out of the checkpoint, and nothing else, where
    they are found under a name that the model has for them; else from the whole model.
    """
    config = load_config(section, role=role)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, trust_remote_code=section.trust_remote_code
        )
    head = head_of(model)
    names = {
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter is head.weight_VH
    }
    bias_names = {n for n, p in model.named_parameters() if p is head.bias_V}
    folder = weights_folder(section, role=role)
    weight = _find(folder, names, tuple(head.weight_VH.shape))
    bias = _find(folder, bias_names, tuple(head.bias_V.shape)) if head.bias_V is not None else None
    if weight is None or (head.bias_V is not None and bias is None):
        ds_config = {"bf16": {"enabled": dtype == torch.bfloat16}}
        whole = head_of(load_whole(section, ds_config, role=role))
        weight, bias = whole.weight_VH.detach(), whole.bias_V
    return head._replace(
        weight_VH=weight.to(dtype), bias_V=None if bias is None else bias.detach().to(dtype)
    )


def _find(folder: Path, names: set[str], shape: tuple[int, ...]) -> Tensor | None:
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as tensors:
            for name in names & set(tensors.keys()):
                tensor: Tensor = tensors.get_tensor(name)
                if tuple(tensor.shape) == shape:
                    return tensor
    return None
