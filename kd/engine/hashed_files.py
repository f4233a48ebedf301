"""DeepSpeed's checkpoint files, hashed while they are written: none is read again for it."""

import hashlib
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

from kd.engine.engine import Engine

Checksum = dict[str, Any]  # {"bytes": int, "sha256": str}


class HashingWriter(io.RawIOBase):
    """A new file that knows the checksum of what went into it, in the order in which it did."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._digest = hashlib.sha256()
        self._num_bytes = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        with memoryview(data).cast("B") as view:
            self._file.write(view)
            self._digest.update(view)
            self._num_bytes += len(view)
            return len(view)

    def flush(self) -> None:
        if not self._file.closed:
            self._file.flush()

    def close(self) -> None:
        """Synced to the disk."""
        if not self._file.closed:
            try:
                self._file.flush()
                os.fsync(self._file.fileno())
            finally:
                self._file.close()
        super().close()

    @property
    def checksum(self) -> Checksum:
        return {"bytes": self._num_bytes, "sha256": self._digest.hexdigest()}


class HashingCheckpointEngine(TorchCheckpointEngine):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.checksums: dict[Path, Checksum] = {}

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        with HashingWriter(Path(path)) as file:
            torch.save(state_dict, file)  # type: ignore[arg-type]
        self.checksums[Path(path)] = file.checksum


@contextmanager
def hashed_files(engine: Engine) -> Iterator[dict[Path, Checksum]]:
    """Inside, what this rank saves through the engine is hashed: {path: its checksum}."""
    usual, engine.checkpoint_engine = engine.checkpoint_engine, HashingCheckpointEngine()
    try:
        yield engine.checkpoint_engine.checksums
    finally:
        engine.checkpoint_engine = usual
