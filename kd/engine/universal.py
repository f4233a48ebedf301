"""A checkpoint for any number of ranks: DeepSpeed's universal form, made when needed."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist

from kd.distributed.interruption import SIGNALS
from kd.distributed.process_group import on_rank_zero
from kd.errors import UserError


@contextlib.contextmanager
def universal_checkpoint(path: Path) -> Iterator[Path]:
    """A context that gives the folder of the checkpoint in universal form, with fp32 weights and
    optimizer state in separate files.

    Collective: every rank must call this.
    Rank 0 converts, on its CPU, in the checkpoints' folder, and needs there about twice the room of
    the checkpoint. Raises UserError when that fails.
    """
    partial = path.parent / f".{path.name}.universal.partial"
    on_rank_zero(lambda: _convert(path, partial / path.name))
    try:
        yield partial / path.name
        dist.barrier()
    finally:
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)


def _ignore_signals() -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _convert(path: Path, output: Path) -> None:
    shutil.rmtree(output.parent, ignore_errors=True)
    try:
        output.parent.mkdir()
    except OSError as error:
        raise UserError(
            f"{path} could not be converted for {dist.get_world_size()} ranks: {error}"
        ) from None
    workers = str(min(8, os.cpu_count() or 1))
    command = [
        sys.executable,
        "-m",
        "deepspeed.checkpoint.ds_to_universal",
        "--inject_missing_state",
    ]
    command += ["--input_folder", str(path), "--output_folder", str(output)]
    command += ["--num_extract_workers", workers, "--num_merge_workers", workers]
    # Deaf: a signal to the whole job asks for a save, and ends no conversion.
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, preexec_fn=_ignore_signals
    )
    if done.returncode:
        shutil.rmtree(output.parent, ignore_errors=True)
        free = shutil.disk_usage(path.parent).free / 2**30
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        killed = (
            f"ended by {signal.Signals(-done.returncode).name} (out of memory?); "
            if done.returncode < 0
            else ""
        )
        raise UserError(
            f"{path} could not be converted for {dist.get_world_size()} ranks: {killed}{last} "
            f"({free:.2f} GiB free). Free some space, or resume with as many ranks as wrote it"
        )
