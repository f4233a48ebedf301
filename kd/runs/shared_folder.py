"""Whether all nodes see the folder that rank 0 writes to."""

import socket
import time
import uuid
from pathlib import Path

from kd.distributed.layout import Layout
from kd.distributed.process_group import gather_objects, on_rank_zero
from kd.errors import UserError

PATIENCE_SECONDS = 5.0  # a network file system may show another host's new file late


def ranks_without(folder: Path, layout: Layout) -> list[str]:
    """ "rank R on HOST: why" of each rank that does not see what rank 0 writes to the folder.

    Collective: every rank must call this. Raises UserError when rank 0 cannot write there.
    """
    token = folder / on_rank_zero(lambda: _write_token(folder))
    me = f"rank {layout.rank} on {socket.gethostname()}"
    found = gather_objects(_problem_of(token, me))
    if layout.rank == 0:
        token.unlink()
    return [problem for problem in found if problem]


def check_shared(field: str, folder: Path, layout: Layout) -> None:
    """Raise UserError, on every rank, when a rank sees another folder of that name.

    Collective: every rank must call this.
    """
    problems = ranks_without(folder, layout)
    if problems:
        raise UserError(f"{field}: {not_shared(problems, layout)}")


def not_shared(problems: list[str], layout: Layout) -> str:
    return (
        f"{problems[0]}; {len(problems)} of {layout.world_size} ranks do not see the files of "
        "rank 0: use a folder on a file system that all hosts mount at the same path"
    )


def _write_token(folder: Path) -> str:
    name = f".seen_by_all_{uuid.uuid4().hex}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    except OSError as error:
        where = f"rank 0 on {socket.gethostname()}"
        raise UserError(f"{where} cannot write to {folder}: {error}") from None
    return name


def _problem_of(token: Path, me: str) -> str | None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            same = token.read_text() == token.name
            return None if same else f"{me} sees other files in {token.parent}"
        except OSError as error:
            if time.monotonic() > deadline:
                return f"{me}: {error.strerror} in {token.parent}"
            time.sleep(0.1)
