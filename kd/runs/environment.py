"""What a run depends on besides its data: versions, commit, hardware and variables of a process,
and its recipe.
"""

import os
import platform
import subprocess
from importlib import metadata
from typing import Any

from kd.distributed.device import device_type
from kd.engine.ds_config import read_ds_config
from kd.recipe import ROOT, Recipe

PACKAGES = (
    "torch",
    "deepspeed",
    "transformers",
    "datasets",
    "accelerate",
    "flash-attn",
    "triton",
    "pydantic",
)

# Variables that change the numbers of a run.
VARIABLES = (
    "DS_ACCELERATOR",
    "NVIDIA_TF32_OVERRIDE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "TRITON_INTERPRET",
)


def environment() -> dict[str, Any]:
    """Versions, commit and hardware, as written into every run's folder."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "commit": _commit(),
        "cuda": torch.version.cuda,
        "gpus": gpus,
        "cpu": platform.processor() or platform.machine(),
        "num_cpus": os.cpu_count(),
    }


def facts_of_rank(recipe: Recipe) -> dict[str, Any]:
    """{"software", "environment", "recipe"}: what every rank of a run must have alike
    (kd.distributed.agreement).
    """
    return {**facts_of_host(), "recipe": facts_of_recipe(recipe)}


def facts_of_host() -> dict[str, dict[str, Any]]:
    """This process's versions, and what of its environment changes the numbers of a run."""
    found = environment()
    software = {
        "python": found["python"],
        **found["packages"],
        "cuda": found["cuda"],
        "commit": found["commit"],
    }
    variables = {name: os.environ.get(name) for name in VARIABLES}
    return {"software": software, "environment": {**variables, "device": device_type()}}


def facts_of_recipe(recipe: Recipe) -> dict[str, Any]:
    """{section.key: value} of the resolved recipe, and the JSON of its engines."""
    sections = recipe.model_dump(mode="json")
    facts = {
        f"{name}.{key}": value
        for name, section in sections.items()
        for key, value in (section or {}).items()
    }
    for role in ("student", "teacher") if recipe.teacher else ("student",):
        facts[f"{role}'s DeepSpeed JSON"] = read_ds_config(recipe, role)
    return facts


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """KD_COMMIT, or the checkout's commit, with "+" when what runs from it differs, files that are
    not tracked yet among it; None outside a checkout.
    """
    if os.environ.get("KD_COMMIT"):
        return os.environ["KD_COMMIT"]
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        # Of the folders that jobs get a copy of
        folders = [str(ROOT / name) for name in ("kd", "launch", "recipes", "ds_configs")]
        status = [*git, "status", "--porcelain", "--untracked-files=all", "--", *folders]
        changed = subprocess.run(status, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if changed else "")
