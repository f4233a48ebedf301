"""Checkpoints that are whole or absent: written aside, with checksums, then renamed.

    checkpoints/step_40/            DeepSpeed's files of every rank, rng_rank*.safetensors
        manifest.json               state of the loop, world size, size and SHA-256 of every file
    checkpoints/.step_60.partial/   a save in progress, or one that was interrupted

All ranks share the folder. What does not say rank 0 is collective: every rank must call it.
"""

import hashlib
import logging
import os
import re
import reprlib
import shutil
import stat
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
import torch.distributed as dist
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    TypeAdapter,
    ValidationError,
)
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from kd.distributed.device import device_type
from kd.distributed.process_group import gather_objects, on_rank_zero
from kd.engine.engine import Engine
from kd.engine.hashed_files import hashed_files
from kd.engine.pickles import check_pickles
from kd.engine.universal import universal_checkpoint
from kd.errors import UserError
from kd.files import read_json, write_json

MANIFEST = "manifest.json"
# torch.save raises RuntimeError; of a missing parent where another rank has failed and removed it.
TORCH_SAVE_ERRORS = (
    "PytorchStreamWriter",
    "inline_container",
    "No space left",
    "Parent directory",
)

log = logging.getLogger(__name__)
State = TypeVar("State")


class FileEntry(BaseModel):
    """Size and checksum of one file."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    bytes: NonNegativeInt
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Manifest(BaseModel):
    """What a checkpoint says of itself; state is the loop's own."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    step: NonNegativeInt
    world_size: PositiveInt
    state: Any
    files: Annotated[dict[str, FileEntry], Field(min_length=1)]


def save_checkpoint(engine: Engine, folder: Path, step: int, state: dict[str, Any]) -> None:
    """Write step_{step} with the engine, the random state of each rank and the loop's own `state`
    (JSON).

    Raises UserError when it cannot be written (a full disk); earlier checkpoints are not touched.
    """
    final, partial = folder / f"step_{step}", folder / f".step_{step}.partial"
    rank, world_size = dist.get_rank(), dist.get_world_size()
    try:
        if rank == 0:
            remove_partial(folder)
            partial.mkdir(parents=True)
        dist.barrier()
        with hashed_files(engine) as checksums:
            engine.save_checkpoint(
                str(folder), tag=partial.name, save_latest=False, exclude_frozen_parameters=True
            )
        random_state = partial / f"rng_rank{rank}.safetensors"
        random_state.write_bytes(save(_random_state()))  # save_file() keeps it to its owner
        checksums[random_state] = _checksum(random_state, sync=True)
        mine = {str(path.relative_to(partial)): entry for path, entry in checksums.items()}
        files = {name: entry for part in gather_objects(mine) for name, entry in part.items()}
        if rank == 0:
            for name in set(_files(partial)) - files.keys():  # not written by the engine
                files[name] = _checksum(partial / name, sync=True)
            files = dict(sorted(files.items()))
            write_json(
                partial / MANIFEST,
                {"step": step, "world_size": world_size, "state": state, "files": files},
            )
            partial.rename(final)
            _sync_folder(folder)
        dist.barrier()
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and not any(
            sign in str(error) for sign in TORCH_SAVE_ERRORS
        ):
            raise  # a lost peer, memory: not the disk
        # Space is given back by the rank that failed: the launcher ends the others, which may wait
        # in a collective.
        shutil.rmtree(partial, ignore_errors=True)
        free = shutil.disk_usage(folder).free / 2**30
        first_line = (
            str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        )
        raise UserError(
            f"the checkpoint of step {step} could not be written to {folder}: {first_line} "
            f"({free:.2f} GiB free). Earlier checkpoints are whole: free some space and continue "
            "with --resume auto"
        ) from error


def choose_checkpoint(folder: Path, resume: str, state_type: type[Any]) -> Path | None:
    """The checkpoint of `folder` that a path or "auto" names: the newest whole one, or None.
    state_type: what save_checkpoint was given as `state`, read back.

    Damaged ones that "auto" passes over are named in the log. Raises UserError for a path that is
    not a whole checkpoint of this folder.
    """
    if resume != "auto":
        path = Path(resume)
        on_rank_zero(lambda: read_manifest(path, state_type))
        if path.resolve().parent != folder.resolve():
            raise UserError(
                f"--resume {resume} is not a checkpoint of this run ({folder}): to start from "
                "another run's student, set student.model to its export"
            )
        damage = damage_of(path, state_type)
        if damage:
            raise UserError(
                f"--resume {resume} is damaged ({damage}): choose an earlier one, or --resume auto"
            )
        return path
    paths = on_rank_zero(lambda: step_folders(folder))
    for path in reversed(paths):
        damage = damage_of(path, state_type)
        if damage is None:
            return path
        if dist.get_rank() == 0:
            log.warning("%s is damaged (%s): trying the checkpoint before it", path, damage)
    return None


def damage_of(path: Path, state_type: type[Any]) -> str | None:
    """What is wrong with a checkpoint, or None; the ranks share the reading."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    try:
        files = on_rank_zero(lambda: read_manifest(path, state_type).files)
    except UserError as error:
        return str(error)
    try:
        mine = sorted(files)[rank::world_size]
        damage = [name for name in mine if not _is_whole(path / name, files[name])]
        found = ", ".join(f"{name} differs from its checksum" for name in damage[:1])
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL
        found = str(error)
    return next((part for part in gather_objects(found) if part), None)


def load_checkpoint(engine: Engine, path: Path, state_type: type[State]) -> State:
    """Restore weights, optimizer and random state from a whole checkpoint; returns the loop's
    state.

    One that another number of ranks wrote is converted first: weights and optimizer are then the
    same, and only a random state, which models with dropout use, begins anew on ranks that have
    none. Raises UserError, before anything is loaded, for files that torch, DeepSpeed and this
    project do not write.
    """
    manifest = on_rank_zero(lambda: read_manifest(path, state_type))
    check_pickles(path)
    written_by, world_size = manifest.world_size, dist.get_world_size()
    random_state = _read_random_state(path, required=written_by == world_size)
    if written_by == world_size:
        _load_engine(engine, path)
    else:
        if dist.get_rank() == 0:
            log.info(
                "%s was written by %d ranks: converting it for %d", path, written_by, world_size
            )
        with universal_checkpoint(path) as converted:
            engine._config.load_universal_checkpoint = True
            _load_engine(engine, converted)
            engine._config.load_universal_checkpoint = False
    if random_state:
        _restore_random_state(random_state)
    state: State = manifest.state
    return state


def read_manifest(path: Path, state_type: type[Any]) -> Manifest:
    """A checkpoint's manifest, its state as a state_type. Raises UserError when path holds none, or
    a damaged one. Rank 0.
    """
    if not (path / MANIFEST).exists():
        raise UserError(
            f"{path}: not a checkpoint (no {MANIFEST}); name a folder such as checkpoints/step_40"
        )
    try:
        manifest = Manifest.model_validate(read_json(path / MANIFEST))
        state = TypeAdapter(state_type).validate_python(manifest.state, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "state"
        value = reprlib.repr(first["input"])
        raise UserError(
            f"{path}: its {MANIFEST} is damaged: {where} = {value}: {first['msg']}"
        ) from None
    except UserError as error:
        raise UserError(f"{path}: its {MANIFEST} is damaged: {error}") from None
    if getattr(state, "step", manifest.step) != manifest.step:
        raise UserError(
            f"{path}: its {MANIFEST} is damaged: step = {manifest.step}, state.step = {state.step}"
        )
    return manifest.model_copy(update={"state": state})


def _load_engine(engine: Engine, path: Path) -> None:
    loaded, _ = engine.load_checkpoint(
        str(path.parent),
        tag=path.name,
        # What is frozen was not saved
        load_module_strict=all(parameter.requires_grad for parameter in engine.parameters()),
        load_lr_scheduler_states=False,
    )
    if loaded is None:
        raise UserError(
            f"{path}: DeepSpeed found no checkpoint in it: remove it and resume from an earlier one"
        )


def step_folders(folder: Path) -> list[Path]:
    """The finished checkpoints of a run, oldest first, whole or damaged. Rank 0."""
    found = [path for path in folder.glob("step_*") if re.fullmatch(r"step_\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def set_aside_after(folder: Path, step: int) -> None:
    """Rename checkpoints beyond `step`, which a resumed run is about to write anew, to
    abandoned_step_N. Rank 0.
    """
    for path in step_folders(folder):
        if int(path.name.removeprefix("step_")) > step:
            abandoned = path.with_name(f"abandoned_{path.name}")
            shutil.rmtree(abandoned, ignore_errors=True)
            path.rename(abandoned)
            log.info(
                "%s is after the step that the run resumes from: renamed it to %s",
                path,
                abandoned.name,
            )


def prune(folder: Path, *, keep_last: int, best_step: int | None) -> None:
    """Remove all but the newest `keep_last` checkpoints and the best one. Rank 0."""
    for path in step_folders(folder)[:-keep_last]:
        if path.name != f"step_{best_step}":
            try:
                shutil.rmtree(path)
            except OSError as error:  # a file still open over NFS; the next call tries again
                log.warning("could not remove %s: %s", path, error)


def remove_partial(folder: Path) -> None:
    """Remove what an interrupted save left. Rank 0."""
    for leftover in folder.glob(".step_*.partial"):
        shutil.rmtree(leftover)


def _files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _checksum(path: Path, *, sync: bool = False) -> dict[str, Any]:
    """{"bytes", "sha256"} of a file."""
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": file.tell(), "sha256": digest}


def _is_whole(path: Path, entry: FileEntry) -> bool:
    """One of an unexpected size is not read to its end; nor is a named pipe, which would wait."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode) or status.st_size != entry.bytes:
        return False
    return _checksum(path) == entry.model_dump()


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def _random_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device_type() == "cuda":
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _read_random_state(path: Path, *, required: bool) -> dict[str, torch.Tensor] | None:
    """What _random_state() returned on this rank, or None where it saved none and none is required.
    Raises UserError on every rank when one of them finds something else.
    """
    file = path / f"rng_rank{dist.get_rank()}.safetensors"
    state, problem = None, None
    try:
        if required or file.exists():
            state = load_file(file)
            for device, tensor in state.items():
                torch.Generator(device).set_state(tensor)
            torch.Generator().set_state(state["cpu"])
    except (OSError, SafetensorError, RuntimeError, TypeError, KeyError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        problem = (
            f"{file}: it holds no random state ({reason}): remove this checkpoint and resume from "
            "an earlier one"
        )
    if found := [text for text in gather_objects(problem) if text]:
        raise UserError(found[0])
    return state


def _restore_random_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
