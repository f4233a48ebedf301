"""One file of responses from several ranks: each writes its share of the batches, and the last to
finish joins them.

Batch b is rank b modulo N's, so that the file and its journal are, byte for byte, those of one rank
that generates the same responses. Rank R of N appends to OUTPUT.R-of-N.partial and keeps a journal
next to it, so that it may be killed at any time. No rank waits for another, or needs a network
between them: whoever finishes its share and finds all of them finished joins them.
"""

import os
import re
from pathlib import Path
from typing import Any

from kd.errors import UserError
from kd.generation.journal import TraceFile, write_lines

# Of a file of rows: what is being written, and its journal
ENDINGS = r"(\.partial|\.progress)?"


def open_share(output: Path, settings: dict[str, Any], rank: int, num_ranks: int) -> TraceFile:
    """This rank's share, or the file itself where it is complete or there is one rank.

    Raises UserError as TraceFile does, and for a file that another number of ranks began.
    """
    if output.exists():
        return TraceFile(output, settings)
    begun = set(_journals(output).values()) - {num_ranks}
    if begun:
        other = min(begun)
        shares = f"{output}.R-of-{other}.*" if other > 1 else f"{output}.progress"
        raise UserError(
            f"{output} was begun with {other} ranks, but there are {num_ranks} now: start it with "
            f"{other} ranks again, or remove {shares} to start over"
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
    remove_shares(output, but_whole=True)
    return TraceFile(output, settings)


def remove_shares(output: Path, *, but_whole: bool = False) -> None:
    """Remove all shares and their journals, and the whole file with its own unless but_whole:
    another file has what they hold.
    """
    share = r"\.\d+-of-\d+"
    for path in _named(output, share + ENDINGS if but_whole else f"({share})?{ENDINGS}"):
        path.unlink(missing_ok=True)


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


def check_num_batches(num_ranks: int, num_requests: int, batch_size: int, remedy: str) -> None:
    """Raises UserError for ranks that would have nothing to generate."""
    num_batches = -(-num_requests // batch_size)
    if num_ranks > num_batches:
        raise UserError(
            f"WORLD_SIZE = {num_ranks}, but there are only {num_batches} batches of {batch_size} "
            f"responses: start fewer ranks, or {remedy}"
        )


def _share(output: Path, rank: int, num_ranks: int) -> Path:
    return output.with_name(share_name(output.name, rank, num_ranks))


def _journals(output: Path) -> dict[Path, int]:
    """The journals of all shares, or of the one file, and the number of ranks that began each."""
    found = _named(output, r"(\.\d+-of-(\d+))?\.progress")
    return {path: int(match[2] or 1) for path, match in found.items()}


def _named(output: Path, ending: str) -> dict[Path, re.Match[str]]:
    """The files of this output; another one may have a name that begins alike."""
    if not output.parent.is_dir():
        return {}
    matches = {
        path: re.fullmatch(re.escape(output.name) + ending, path.name)
        for path in output.parent.iterdir()
    }
    return {path: match for path, match in matches.items() if match}
