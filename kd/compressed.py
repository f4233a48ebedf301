"""A file's bytes, decompressed as they are read: plain, gzip (.gz) or Zstandard (.zst)."""

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from kd.errors import UserError

SUFFIXES = (".gz", ".zst")
READ_BYTES = 2**14  # of a compressed file at a time: what they expand to is held in memory


@contextmanager
def open_bytes(path: Path) -> Iterator[BinaryIO]:
    """A stream of the content. Raises UserError that names the file: one that cannot be opened, and
    while it is read, one that is damaged or ends early.
    """
    try:
        with _open(path) as stream:
            yield stream
    except UserError:
        raise
    except (gzip.BadGzipFile, zlib.error, EOFError, _Damaged) as error:
        raise UserError(
            f"{path}: damaged or incomplete: {error}; copy or download the file again"
        ) from None
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL
        raise UserError(
            f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}"
        ) from None


def uncompressed_suffix(path: Path) -> str:
    """Such as ".jsonl" of rows.jsonl, rows.jsonl.gz and rows.jsonl.zst, in lower case."""
    name = Path(path.name.lower())
    return (name.with_suffix("") if name.suffix in SUFFIXES else name).suffix


class _Damaged(Exception):
    pass


def _open(path: Path) -> BinaryIO:
    if path.suffix.lower() == ".gz":
        return cast(BinaryIO, gzip.open(path, "rb"))
    file = path.open("rb")
    return cast(BinaryIO, io.BufferedReader(_Zstd(file))) if path.suffix.lower() == ".zst" else file


class _Zstd(io.RawIOBase):
    """All frames of a file. zstandard's own reader takes a file that was cut for its end."""

    def __init__(self, file: BinaryIO) -> None:
        try:
            import zstandard
        except ImportError:
            file.close()
            raise UserError(
                f"{file.name}: reading .zst needs the package zstandard: pip install zstandard, "
                "or decompress the file"
            ) from None
        self._file, self._error = file, zstandard.ZstdError
        # A window as large as `zstd --long=31` writes; the default stops at 128 MiB.
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)
        self._frame: Any = None  # the one at work, if any
        self._compressed, self._ready = b"", io.BytesIO()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        size = self._ready.readinto(buffer)
        while not size and self._decompress():
            size = self._ready.readinto(buffer)
        return size

    def close(self) -> None:
        self._file.close()
        super().close()

    def _decompress(self) -> bool:
        """Whether there was anything left to decompress."""
        self._compressed = self._compressed or self._file.read(READ_BYTES)
        if not self._compressed:
            if self._frame is not None:
                raise _Damaged("it ends in the middle of a frame")
            return False
        self._frame = self._frame or self._decompressor.decompressobj()
        try:
            self._ready = io.BytesIO(self._frame.decompress(self._compressed))
        except self._error as error:
            raise _Damaged(str(error)) from None
        self._compressed = self._frame.unused_data if self._frame.eof else b""
        if self._frame.eof:
            self._frame = None
        return True
