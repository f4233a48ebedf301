"""A teacher whose outputs are read from a cache; at most its head is loaded."""

import contextlib
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from kd.cache import Cache
from kd.cache.kinds import Fields
from kd.data.collate import Batch, Place
from kd.losses import Head, Targets


class CachedTeacher:
    """A Teacher whose targets are read: ahead of their step where it is told, by a thread.

    Each rank reads for itself, and no call is collective.
    """

    def __init__(self, cache: Cache, head: Head | None, device: torch.device) -> None:
        """head: on the device, for a cache of hidden states; others need none."""
        self._cache, self._head, self._device = cache, head, device
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="teacher-cache")
        self._ahead: dict[tuple[Place, ...], Future[Fields]] = {}
        self.waited_seconds = 0.0  # that steps stood still for the disk

    @property
    def weights(self) -> list[Tensor]:
        """What this rank holds of the teacher."""
        head = self._head
        return [] if head is None else [t for t in (head.weight_VH, head.bias_V) if t is not None]

    def read_ahead(self, batches: Iterable[Batch]) -> None:
        """Begin to read what these batches will ask for."""
        for batch in batches:
            if batch.places not in self._ahead:
                self._ahead[batch.places] = self._thread.submit(self._read, batch)

    @contextlib.contextmanager
    def targets(self, batch: Batch) -> Iterator[Targets]:
        started = time.perf_counter()
        ahead = self._ahead.pop(batch.places, None)
        fields = ahead.result() if ahead else self._read(batch)
        self.waited_seconds += time.perf_counter() - started
        moved = {name: f.to(self._device, non_blocking=True) for name, f in fields.items()}
        yield self._cache.kind.targets(moved, self._head, self._cache.manifest.vocab_size)

    def _read(self, batch: Batch) -> Fields:
        """By name (B, L, ...), on the host, zero where a sequence has no token."""
        num_rows, num_columns = batch.input_ids.shape
        fields: Fields = {}
        for start, place in zip(batch.starts, batch.places, strict=True):
            stored = self._cache.read(place.key, place.read_start, place.read_start + place.length)
            for name, values in self._decoded(stored).items():
                if name not in fields:
                    fields[name] = values.new_zeros((num_rows * num_columns, *values.shape[1:]))
                fields[name][start : start + place.length] = values
        fields = fields or self._of_padding(num_rows * num_columns)
        pinned = self._device.type == "cuda"
        return {
            name: (values.pin_memory() if pinned else values).view(num_rows, num_columns, -1)
            for name, values in fields.items()
        }

    def _decoded(self, stored: Fields) -> Fields:
        dtype = torch.float32 if self._head is None else self._head.weight_VH.dtype
        return self._cache.kind.decode(stored, dtype)

    def _of_padding(self, num_positions: int) -> Fields:
        """For a batch without a sequence, which takes part in every collective: zeros, of the form
        that any row has.
        """
        form = self._decoded(self._cache.read(*self._cache.any_token()))
        return {name: v.new_zeros((num_positions, *v.shape[1:])) for name, v in form.items()}
