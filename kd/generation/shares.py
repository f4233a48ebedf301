"""One file of responses from several ranks: each writes its share of the batches, and the last to
finish joins them.

Batch b is rank b modulo N's, so that the file and its journal are, byte for byte, those of one rank
that generates the same responses. Rank R of N appends to OUTPUT.R-of-N.partial and keeps a journal
beside it, so that it may be killed at any time. No rank waits for another, and none needs a network
between them: whoever finishes its share and finds all of them finished joins them.
"""

import glob
import os
from pathlib import Path
from typing import Any

from kd.errors import UserError
from kd.generation.journal import TraceFile, write_lines


def open_share(output: Path, settings: dict[str, Any], rank: int, num_ranks: int) -> TraceFile:
    """This rank's share, or the file itself where it is complete or there is one rank.

    Raises UserError as TraceFile does, and for a file that another number of ranks began.
    """
    if output.exists():
        return TraceFile(output, settings)
    begun = {int(path.stem.rpartition("-")[2]) for path in _journals(output, "*")}
    if not begun and output.with_name(output.name + ".progress").exists():
        begun = {1}
    if begun - {num_ranks}:
        (other,) = sorted(begun - {num_ranks})[:1]
        raise UserError(
            f"{output} was begun with {other} ranks, but there are {num_ranks} now: start it with "
            f"{other} ranks again, or remove {output}.* to start over"
        )
    return TraceFile(_share(output, rank, num_ranks), settings)


def join_shares(output: Path, settings: dict[str, Any], num_ranks: int) -> TraceFile | None:
    """The whole file, once all shares are finished; None before.

    The caller holds a lock, so that only one rank at a time joins them.
    """
    shares = [_share(output, rank, num_ranks) for rank in range(num_ranks)]
    if not output.exists():
        if not all(share.exists() for share in shares):
            return None
        _join(output, settings, [TraceFile(share, settings) for share in shares])
    for path in {*shares, *_journals(output, str(num_ranks))} - {output}:
        path.unlink(missing_ok=True)
    return TraceFile(output, settings)


def remove_shares(output: Path) -> None:
    """Remove the whole file, all shares and journals: another file has what they hold."""
    for path in output.parent.glob(f"{glob.escape(output.name)}*"):
        path.unlink()


def _join(output: Path, settings: dict[str, Any], shares: list[TraceFile]) -> None:
    """The rows, then their journal, then the name that says that both are whole."""
    partial = output.with_name(output.name + ".partial")
    journal: list[dict[str, Any]] = []
    with partial.open("wb") as file:
        for number in range(sum(share.num_batches for share in shares)):
            index, rank = divmod(number, len(shares))
            batches = shares[rank].batches
            start = batches[index - 1].num_bytes if index else 0
            with shares[rank].output.open("rb") as rows:
                rows.seek(start)
                file.write(rows.read(batches[index].num_bytes - start))
            journal.append({"num_bytes": file.tell(), "counts": batches[index].counts})
        file.flush()
        os.fsync(file.fileno())
    write_lines(output.with_name(output.name + ".progress"), [settings, *journal])
    os.replace(partial, output)


def share_name(name: str, rank: int, num_ranks: int) -> str:
    """Of what one rank of several writes: NAME.R-of-N; NAME itself where there is one rank."""
    return name if num_ranks == 1 else f"{name}.{rank}-of-{num_ranks}"


def check_num_batches(num_ranks: int, num_batches: int, batch_size: int, remedy: str) -> None:
    """Raises UserError for ranks that would have nothing to generate."""
    if num_ranks > num_batches:
        raise UserError(
            f"WORLD_SIZE = {num_ranks}, but there are only {num_batches} batches of {batch_size} "
            f"responses: start fewer ranks, or {remedy}"
        )


def _share(output: Path, rank: int, num_ranks: int) -> Path:
    return output.with_name(share_name(output.name, rank, num_ranks))


def _journals(output: Path, num_ranks: str) -> list[Path]:
    return [*output.parent.glob(f"{glob.escape(output.name)}.*-of-{num_ranks}.progress")]
