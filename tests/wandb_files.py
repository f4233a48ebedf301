"""What an offline run of Weights & Biases holds: its .wandb file, a log of protocol buffers in
blocks as LevelDB writes them.
"""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

HEADER, BLOCK = 7, 32768  # bytes; of a file, and of each part of a record
FULL, LAST = 1, 4  # kinds of parts that end a record


def wandb_history(folder: Path) -> dict[int, dict[str, Any]]:
    """{step: {name: value}} of the one run in folder; an entry of a table is NAME/KEY."""
    (path,) = (folder / "wandb").glob("offline-run-*/*.wandb")
    steps = [found.history for found in _records(path) if found.HasField("history")]
    names = [history.step.num for history in steps]
    assert names == sorted(set(names)), "a step was logged twice, or out of order"
    return {
        history.step.num: {
            item.key or "/".join(item.nested_key): json.loads(item.value_json)
            for item in history.item
        }
        for history in steps
    }


def _records(path: Path) -> Iterator[Any]:
    content, at, record = path.read_bytes(), HEADER, b""
    while at + HEADER <= len(content):
        if (left := BLOCK - at % BLOCK) < HEADER:
            at += left  # what is too short for a part is filled with zeros
            continue
        _, size, kind = struct.unpack_from("<IHB", content, at)
        record += content[at + HEADER : at + HEADER + size]
        at += HEADER + size
        if kind in (FULL, LAST):
            found = wandb_internal_pb2.Record()
            found.ParseFromString(record)
            yield found
            record = b""
