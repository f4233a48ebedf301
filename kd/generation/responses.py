"""Responses of one model, on disk batch by batch: an interrupted evaluation continues.

Batches hold requests of similar length and have fixed borders, so that the responses are those of
an uninterrupted evaluation. They are kept under a fingerprint of all they depend on, and are never
mixed with those of other settings.
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


def fingerprint(settings: dict[str, Any]) -> str:
    """12 hexadecimal digits that change with any of the settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def open_progress(folder: Path, label: str, settings: dict[str, Any]) -> TraceFile:
    """The file of responses under these settings: LABEL.FINGERPRINT.partial.

    What was begun under other settings is left as it is, and said.
    """
    progress = TraceFile(folder / f"{label}.{fingerprint(settings)}", settings)
    others = sorted(
        path.name
        for path in folder.glob(f"{label}.{'?' * 12}.progress")
        if path != progress.journal
    )
    if others:
        print(
            f"{label}: begun before with other settings, and left as it is: {', '.join(others)} in "
            f"{folder}"
        )
    return progress


def respond(
    requests: Sequence[Request], batch_size: int, load: Callable[[], Generate], progress: TraceFile
) -> list[Response]:
    """One response per request, in their order. Loads the model when a batch is missing; a batch is
    on disk when done.

    Longest prompts come first: what does not fit in memory is known at once.
    """
    order = sorted(
        range(len(requests)), key=lambda index: len(requests[index].prompt), reverse=True
    )
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    todo = range(progress.num_batches, len(batches))
    if progress.num_batches:
        print(
            f"{progress.output.name}: {progress.num_batches} of {len(batches)} batches are done "
            "already"
        )
    generate = load() if todo else None
    for index in tqdm(todo, desc="batches", initial=todo.start, total=len(batches), disable=None):
        assert generate is not None
        found = generate([requests[position] for position in batches[index]], index)
        rows = [
            {"position": p, **vars(response)}
            for p, response in zip(batches[index], found, strict=True)
        ]
        progress.append(rows, Counter())
    done = {row.pop("position"): Response(**row) for row in progress.rows()}
    return [done[position] for position in range(len(requests))]
