"""Shards of a cache: written once, of whole rows, and read token by token.

    manifest.json
    shards/NAME.safetensors     one tensor (tokens, ...) for each field of the kind, and of its rows
                                "keys" (R, 16), "starts" (R + 1,) and checksums
    shards/NAME.json            ShardRecord: the shard is whole
    filled.json                 FilledRecord: no row is missing

safetensors is mapped into memory, knows bf16 and int8, holds no code, and slices without reading
the rest. A row is keyed by a hash of its token ids: other orders and mixtures find it. Each BLOCK
of its tokens has a CRC-32 of its own, looked at whenever it is read, so that a flipped byte is an
error and no wrong target; the SHA-256 of a shard is for --verify.

Shapes: R rows of a shard, T tokens.
"""

import hashlib
import itertools
import os
import time
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from kd.cache.cache_records import REMEDY, CacheManifest, ShardRecord
from kd.cache.kinds import Fields, Kind, kind_of
from kd.errors import UserError
from kd.files import write_json
from kd.runs.records import FILLED, FilledRecord, read_record

BLOCK = 128  # tokens that share a checksum
SHARD_BYTES = 2**28
REFILL = "to fill this shard again, run launch/cache.py with the recipe that filled it"
OF_ROWS = ("keys", "starts", "checksums", "first_blocks")


class ShardWriter:
    """Collects rows on the host, and writes a shard when they are enough."""

    def __init__(self, folder: Path, prefix: str, shard_bytes: int = SHARD_BYTES) -> None:
        """prefix: of file names that no other writer uses."""
        self.folder = folder
        self._shards, self._prefix, self._limit = folder / "shards", prefix, shard_bytes
        self._shards.mkdir(parents=True, exist_ok=True)
        self._number = 0
        self._clear()

    def add(self, key: bytes, fields: Fields) -> None:
        """A row: of each field (T, ...), on any device."""
        row = {name: tensor.detach().cpu().contiguous() for name, tensor in fields.items()}
        self._rows.append((key, row))
        self._num_bytes += sum(tensor.nbytes for tensor in row.values())
        if self._num_bytes >= self._limit:
            self.flush()

    def flush(self) -> None:
        """Write what was added since the last shard. Raises OSError; then the shard is absent."""
        if not self._rows:
            return
        path = self._free_path()
        rows = [row for _, row in self._rows]
        lengths = [len(next(iter(row.values()))) for row in rows]
        checksums = [_checksums(row) for row in rows]
        tensors = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
        tensors |= {
            "keys": torch.tensor([list(key) for key, _ in self._rows], dtype=torch.uint8),
            "starts": torch.tensor([0, *np.cumsum(lengths).tolist()], dtype=torch.int64),
            "first_blocks": torch.tensor(
                [0, *np.cumsum([len(c) for c in checksums]).tolist()], dtype=torch.int64
            ),
            "checksums": torch.tensor([*itertools.chain(*checksums)], dtype=torch.int64),
        }
        content = save(tensors)
        partial = path.with_suffix(".partial")
        try:
            with partial.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
            record = ShardRecord(
                num_rows=len(rows),
                num_tokens=sum(lengths),
                bytes=len(content),
                sha256=hashlib.sha256(content).hexdigest(),
                rank_seconds=time.perf_counter() - self._started,
            )
            write_json(path.with_suffix(".json"), record.model_dump())
        except OSError:
            partial.unlink(missing_ok=True)
            path.unlink(missing_ok=True)
            raise
        self._clear()

    def _free_path(self) -> Path:
        while True:
            path = self._shards / f"{self._prefix}-{self._number:06d}.safetensors"
            self._number += 1
            if not path.exists():
                return path

    def _clear(self) -> None:
        self._rows: list[tuple[bytes, Fields]] = []
        self._num_bytes, self._started = 0, time.perf_counter()


@dataclass(frozen=True)
class _Row:
    """Where a row lies."""

    shard: Path
    start: int
    stop: int
    first_block: int


class Cache:
    """Rows by key. Shards are mapped into memory when they are first read, and stay so."""

    def __init__(self, folder: Path, manifest: CacheManifest) -> None:
        self.folder, self.manifest = folder, manifest
        self.kind: Kind = _kind(folder, manifest)
        self._rows: dict[bytes, _Row] = {}
        self._open: dict[Path, Any] = {}
        for path, _ in whole_shards(folder):
            self._index(path)

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, key: bytes) -> bool:
        return key in self._rows

    @property
    def lengths_N(self) -> npt.NDArray[np.int64]:
        """Tokens of each row."""
        return np.array([row.stop - row.start for row in self._rows.values()], dtype=np.int64)

    def any_token(self) -> tuple[bytes, int, int]:
        """What to read for the form of a token."""
        return next(iter(self._rows)), 0, 1

    def read(self, key: bytes, start: int, stop: int) -> Fields:
        """The fields of tokens start to stop of a row, (stop - start, ...) each, on the host.

        Raises UserError for a damaged shard, naming it.
        """
        row = self._rows[key]
        if not 0 <= start <= stop <= row.stop - row.start:
            raise UserError(
                f"{row.shard}: tokens {start} to {stop} were asked of a row of "
                f"{row.stop - row.start} tokens: {REMEDY}"
            )
        first, last = start // BLOCK, -(-stop // BLOCK)
        begin, end = row.start + first * BLOCK, min(row.start + last * BLOCK, row.stop)
        shard = self._shard(row.shard)
        names = [name for name in shard.keys() if name not in OF_ROWS]  # noqa: SIM118 (no dict)
        fields = {name: shard.get_slice(name)[begin:end] for name in names}
        blocks = slice(row.first_block + first, row.first_block + last)
        if _checksums(fields) != shard.get_slice("checksums")[blocks].tolist():
            raise UserError(f"{row.shard} is damaged: a row differs from its checksum. {REFILL}")
        offset = start - first * BLOCK
        return {name: field[offset : offset + stop - start] for name, field in fields.items()}

    def _index(self, path: Path) -> None:
        shard = self._shard(path)
        try:
            keys, starts = shard.get_tensor("keys"), shard.get_tensor("starts").tolist()
            blocks = shard.get_tensor("first_blocks").tolist()
        except SafetensorError as error:
            raise UserError(f"{path}: not a shard of a cache ({error}): {REMEDY}") from None
        for number, key in enumerate(keys):
            row = _Row(path, starts[number], starts[number + 1], blocks[number])
            self._rows[bytes(key.tolist())] = row

    def _shard(self, path: Path) -> Any:
        if path not in self._open:
            try:
                self._open[path] = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path}: cannot be read ({error}): {REMEDY}") from None
        return self._open[path]


def open_cache(folder: Path) -> Cache:
    """Raises UserError for what is no cache, one of a later version, or one whose shards are not of
    the size that they were written with.
    """
    return Cache(folder, read_manifest(folder))


def read_manifest(folder: str | Path) -> CacheManifest:
    path = Path(folder) / "manifest.json"
    if not path.is_file():
        raise UserError(
            f"{folder} is not a cache, since it has no manifest.json: fill one with launch/cache.py"
        )
    return read_record(path, CacheManifest, REMEDY)


def whole_shards(folder: Path) -> Iterator[tuple[Path, ShardRecord]]:
    """Those that were written to their end. Raises UserError for one whose size has changed, or
    that is missing.
    """
    for path in sorted((folder / "shards").glob("*.json")):
        record, shard = read_record(path, ShardRecord, REMEDY), path.with_suffix(".safetensors")
        size = shard.stat().st_size if shard.is_file() else None
        if size != record.bytes:
            raise UserError(
                f"{shard} is damaged: "
                f"{'it is missing' if size is None else f'it has {size} bytes'} instead of "
                f"{record.bytes}. {REFILL}"
            )
        yield shard, record


def set_filled(folder: Path, flops: float | None) -> FilledRecord:
    """Say that nothing is missing, and what it took."""
    records = [record for _, record in whole_shards(folder)]
    filled = FilledRecord(
        num_rows=sum(record.num_rows for record in records),
        num_tokens=sum(record.num_tokens for record in records),
        bytes=sum(record.bytes for record in records),
        rank_seconds=float(sum(record.rank_seconds for record in records)),
        flops=flops,
    )
    write_json(folder / FILLED, filled.model_dump())
    return filled


def damage_of(folder: Path) -> Iterator[tuple[Path, str]]:
    """(shard, what is wrong with it) for each damaged shard. Reads every byte."""
    for path in sorted((folder / "shards").glob("*.json")):
        shard = path.with_suffix(".safetensors")
        if not shard.is_file():
            yield shard, "it is missing"
            continue
        record, digest = read_record(path, ShardRecord, REMEDY), hashlib.sha256()
        with shard.open("rb") as file:
            while part := file.read(2**24):
                digest.update(part)
        if digest.hexdigest() != record.sha256:
            yield shard, "its SHA-256 differs from that in its record"


def remove_shard(shard: Path) -> None:
    """The record first: without it a shard is one that was never finished."""
    shard.with_suffix(".json").unlink(missing_ok=True)
    shard.unlink(missing_ok=True)


def remove_unfinished(folder: Path) -> None:
    """What a writer that was killed has left."""
    for path in (folder / "shards").glob("*"):
        if path.suffix == ".partial" or not path.with_suffix(".json").exists():
            path.unlink()


def _checksums(fields: Mapping[str, Tensor]) -> list[int]:
    """Of each BLOCK tokens, over all fields in the order of their names."""
    num_tokens = len(next(iter(fields.values())))
    found = []
    for start in range(0, num_tokens, BLOCK):
        checksum = 0
        for name in sorted(fields):
            part = fields[name][start : start + BLOCK].contiguous().view(torch.uint8)
            checksum = zlib.crc32(part.numpy().data, checksum)
        found.append(checksum)
    return found


def _kind(folder: Path, manifest: CacheManifest) -> Kind:
    try:
        return kind_of(manifest.kind, manifest.parameters)
    except UserError as error:
        raise UserError(f"{folder / 'manifest.json'}: {error}") from None
