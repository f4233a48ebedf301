"""Checkpoints run no foreign code: their pickles are read as text before DeepSpeed executes them.

DeepSpeed loads checkpoints with torch.load(weights_only=False), which calls whatever a pickle
names. The manifest's checksums find damage; they do not stop someone who writes a manifest.
"""

import os
import pickle
import stat
import struct
from pathlib import Path

import torch
import torch.distributed as dist

from kd.distributed.process_group import gather_objects, on_rank_zero
from kd.errors import UserError

# What DeepSpeed 0.19 writes into checkpoints of stages 1, 2 and 3 and into their universal form,
# besides what torch itself lets pass with weights_only=True.
DEEPSPEED_GLOBALS = frozenset(
    {
        "deepspeed.runtime.fp16.loss_scaler.LossScaler",
        "deepspeed.runtime.zero.config.ZeroStageEnum",
        "deepspeed.utils.tensor_fragment.fragment_address",  # stages 1 and 2
    }
)
# Everything else is scanned, whatever its name. The last is the raw content of an optimizer state
# that is offloaded to NVMe.
NEVER_UNPICKLED = (".json", ".safetensors", ".swp")
# Of a file that is no zip, or half of one, and of a pickle of another form than torch.save's.
SCAN_ERRORS = (
    OSError,
    RuntimeError,
    ValueError,
    EOFError,
    LookupError,
    AssertionError,
    struct.error,
    pickle.UnpicklingError,
)


def check_pickles(folder: Path) -> None:
    """Raise UserError, on every rank, unless each pickle of a checkpoint names only what torch and
    DeepSpeed write. No tensor is read and nothing is executed.

    Collective: every rank must call this. The ranks share the files between them.
    """
    files = on_rank_zero(lambda: pickle_files(folder))
    mine = files[dist.get_rank() :: dist.get_world_size()]
    found = gather_objects([text for text in map(foreign_code, mine) if text])
    problem = next((text for texts in found for text in texts), None)
    if problem:
        raise UserError(
            f"{problem}: {folder} was not loaded, since it may run foreign code. Restore it from "
            "a copy that you trust, or remove it and resume from another checkpoint"
        )


def pickle_files(folder: Path) -> list[Path]:
    """All files of a checkpoint that may be unpickled, in its manifest or not. Rank 0."""
    files = (Path(root, name) for root, _, names in os.walk(folder) for name in names)
    return sorted(path for path in files if path.suffix not in NEVER_UNPICKLED)


def foreign_code(path: Path) -> str | None:
    """What torch and DeepSpeed would not have written into a file, or None."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return f"{path} is not a regular file"
        unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    except SCAN_ERRORS as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return f"{path} cannot be scanned as a file written by torch.save ({reason})"
    foreign = sorted(set(unsafe) - DEEPSPEED_GLOBALS)
    if foreign:
        return f"{path} names {', '.join(foreign)}, which torch and DeepSpeed do not write"
    return None
