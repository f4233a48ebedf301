"""Whether all ranks share the folder of runs, and checkpoints fit there, and how fast."""

import os
import shutil
import socket
import time
import uuid
from pathlib import Path

from kd.distributed.layout import Layout
from kd.distributed.process_group import gather_objects, on_rank_zero
from kd.engine.checkpoint import step_folders
from kd.errors import UserError
from kd.plan import MemoryPlan
from kd.preflight.verdict import Check, fail, ok, size
from kd.runs.shared_folder import not_shared, ranks_without

GIB = 2**30
MAX_BYTES = 256 * 2**20  # written by each rank
BLOCK_BYTES = 2**20
# DeepSpeed's launcher kills ranks so long after it told them to end.
LAUNCHER_SECONDS = 30


def check_disk(plan: MemoryPlan, layout: Layout) -> list[Check]:
    """Makes run.output_dir, and leaves nothing in it. Collective: every rank must call this."""
    output_dir = plan.recipe.run.output_dir
    folder = Path(output_dir).resolve()
    where = f"run.output_dir = {output_dir!r}"
    try:
        problems = ranks_without(folder, layout)
    except UserError as error:
        return [fail("shared folder", f"{where}: {error}")]
    if problems:
        return [fail("shared folder", f"{where}: {not_shared(problems, layout)}")]
    me = f"rank {layout.rank} on {socket.gethostname()}"
    shared = ok("shared folder", f"{folder}: all ranks see the files of rank 0")
    free, there = on_rank_zero(
        lambda: (shutil.disk_usage(folder).free, _bytes_of_run(plan.recipe.run_dir))
    )
    needed = max(plan.disk_gib - there / GIB, plan.checkpoint_gib)
    needs = (
        f"{size(free / GIB)} free in {folder}, {size(needed)} needed: {size(plan.disk_gib)} for "
        f"{plan.recipe.training.keep_last + 2} checkpoints of {size(plan.checkpoint_gib)} and "
        "exports" + (f", minus {size(there / GIB)} written already" if there else "")
    )
    if free < needed * GIB:
        return [
            shared,
            fail("free space", f"{needs}: free some space, or lower training.keep_last"),
        ]
    return [
        shared,
        ok("free space", needs),
        _check_speed(plan, folder, free, me, layout.world_size),
    ]


def _bytes_of_run(run_dir: Path) -> int:
    """What a run has written already of what it needs room for."""
    folders = [*step_folders(run_dir / "checkpoints"), run_dir / "export"]
    return sum(
        path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file()
    )


def _check_speed(plan: MemoryPlan, folder: Path, free: int, me: str, world_size: int) -> Check:
    """All ranks write at once, as for a checkpoint, and wait until it is on the disk."""
    wanted = min(MAX_BYTES, int(plan.checkpoint_gib * GIB) // world_size, free // 4 // world_size)
    num_blocks = max(1, wanted // BLOCK_BYTES)
    results = gather_objects(_write(folder / f".preflight_{uuid.uuid4().hex}", num_blocks, me))
    problems = [result for result in results if isinstance(result, str)]
    if problems:
        return fail("write speed", f"{problems[0]}: check the disk or the quota of run.output_dir")
    slowest = max(result for result in results if not isinstance(result, str))
    rate = world_size * num_blocks * BLOCK_BYTES / slowest
    seconds = plan.checkpoint_gib * GIB / rate
    speed = f"{rate / 2**20:.0f} MiB/s by {world_size} ranks, fsync included"
    text = f"{speed}, {seconds:.1f} s for a checkpoint"
    if seconds > LAUNCHER_SECONDS:
        text += (
            f", but DeepSpeed's launcher kills ranks {LAUNCHER_SECONDS} s after a TERM: signal "
            "the ranks directly, as launch/hosts.sh and launch/slurm do"
        )
    return ok("write speed", text)


def _write(path: Path, num_blocks: int, me: str) -> float | str:
    """Seconds, or what went wrong."""
    block = os.urandom(BLOCK_BYTES)
    started = time.perf_counter()
    try:
        with path.open("wb") as file:
            for _ in range(num_blocks):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        return time.perf_counter() - started
    except OSError as error:
        return f"{me}: {error}"
    finally:
        path.unlink(missing_ok=True)
