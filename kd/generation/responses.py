"""Responses of one model, on disk batch by batch: an interrupted evaluation continues.

Batches hold requests of similar length and have fixed borders, so that the responses are those of
an uninterrupted evaluation, and of one rank where several share the batches. They are kept under a
fingerprint of all they depend on, and are never mixed with those of other settings.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from kd.generation.backends import Generate, Request
from kd.generation.journal import TraceFile
from kd.generation.sampling import Response
from kd.generation.shares import open_share


def fingerprint(settings: dict[str, Any]) -> str:
    """12 hexadecimal digits that change with any of the settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def open_progress(
    output: Path, settings: dict[str, Any], rank: int = 0, num_ranks: int = 1
) -> TraceFile:
    """This rank's share of the responses under these settings.

    output: LABEL.FINGERPRINT. What was begun under other settings is left as it is, and said.
    Raises UserError for responses that another number of ranks began.
    """
    progress = open_share(output, settings, rank, num_ranks)
    others = sorted(
        path.name
        for path in output.parent.glob(f"{output.stem}.{'?' * 12}*.progress")
        if not path.name.startswith(output.name)
    )
    if others and rank == 0 and not progress.batches:
        print(
            f"{output.stem}: an earlier one with other settings is kept: {', '.join(others)} in "
            f"{output.parent}"
        )
    return progress


def respond(
    requests: Sequence[Request],
    batch_size: int,
    load: Callable[[], Generate],
    progress: TraceFile,
    rank: int = 0,
    num_ranks: int = 1,
) -> None:
    """Finish this rank's share: each batch whose number is rank modulo num_ranks.

    Loads the model when a batch is missing; a batch is on disk when done. Longest prompts come
    first: what does not fit in memory is known at once.
    """
    if progress.complete:
        return
    order = sorted(
        range(len(requests)), key=lambda index: len(requests[index].prompt), reverse=True
    )
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    share = range(len(batches))[rank::num_ranks]
    todo = share[progress.num_batches :]
    if progress.num_batches:
        print(
            f"{progress.output.name}: {progress.num_batches} of {len(share)} batches are done "
            "already"
        )
    bar = tqdm(
        todo,
        desc="batches",
        initial=progress.num_batches,
        total=len(share),
        disable=True if rank else None,
    )
    for index in bar:
        found = load()([requests[position] for position in batches[index]], index)
        rows = [
            {"position": p, **vars(response)}
            for p, response in zip(batches[index], found, strict=True)
        ]
        progress.append(rows, Counter())
    progress.finish()


def in_order(whole: TraceFile) -> list[Response]:
    """The responses of all ranks' shares, in the order of their requests."""
    done = {row.pop("position"): Response(**row) for row in whole.rows()}
    return [done[position] for position in range(len(done))]
