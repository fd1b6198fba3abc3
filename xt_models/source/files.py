"""Regular files: bytes at any place from any thread, and windows of uncompressed rows."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Callable, Sequence
from typing import Any, Self

import numpy as np

from .base import Array, Empty, ImageSource, SourceError, Window, expect


class File:
    """A regular file, open for reading at any place from any thread; a short read is an error."""

    def __init__(self, path: str) -> None:
        self.name, self.fd, self.bytes_read = path, -1, 0
        self._lock = threading.Lock()
        try:
            mode = os.stat(path).st_mode  # before opening, which would wait on a pipe
            kind = "a folder" if stat.S_ISDIR(mode) else "a device or pipe"
            expect(stat.S_ISREG(mode), path, "a regular file", kind)
            self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise SourceError(
                f"{path}: expected a readable file, found {error.strerror}."
            ) from error
        status = os.fstat(self.fd)
        self.size, self._modified = status.st_size, status.st_mtime_ns
        if not self.size:
            self.close()
            raise SourceError(f"{path}: expected an image, found an empty file (0 bytes).")

    def pread(self, offset: int, count: int) -> bytes:
        """`count` bytes, at most 2 GiB, at byte `offset`."""
        data = os.pread(self.fd, count, offset)
        if len(data) != count:
            raise self._ended(offset, count, len(data))
        with self._lock:
            self.bytes_read += count
        return data

    def pread_spans(self, view: memoryview, spans: Sequence[tuple[int, int]]) -> None:
        """Fill a buffer of bytes with (byte offset, bytes) spans of the file, in order."""
        done = 0
        for offset, count in spans:
            got = 0
            while got < count:  # mostly once, but a call moves at most 2 GiB
                more = os.preadv(self.fd, [view[done + got : done + count]], offset + got)
                if not more:
                    raise self._ended(offset, count, got)
                got += more
            done += count
        with self._lock:
            self.bytes_read += done

    def check_unchanged(self) -> None:
        """Raise if the file was written to since it was opened."""
        status = os.fstat(self.fd)
        same = (status.st_size, status.st_mtime_ns) == (self.size, self._modified)
        found = f"one that changed while it was open ({status.st_size:,} bytes now); open it again"
        expect(same, self.name, f"the file of {self.size:,} bytes that was opened", found)

    def close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def _ended(self, offset: int, count: int, got: int) -> SourceError:
        expected = f"{count:,} bytes at byte {offset:,}"
        return SourceError(
            f"{self.name}: expected {expected}, found the end of the file after {got:,}."
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


class FileSource(ImageSource):
    """A source that reads one file by itself, in `self._file`."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self._file = File(path)

    @property
    def bytes_read(self) -> int:
        return self._file.bytes_read

    def check_unchanged(self) -> None:
        self._file.check_unchanged()

    def close(self) -> None:
        super().close()
        self._file.close()


def read_rows(
    file: File,
    place: Callable[[int, int], tuple[int, int]],
    layout: tuple[int, int, int],
    dtype: np.dtype[Any],
    window: Window,
    empty: Empty,
) -> Array:
    """A window `[planes, height, width, samples]` of uncompressed rows, without what lies between.

    Windows of full width are the fast ones: a run of rows is one call. Not a memory map: its pages
    count as memory of the process, and a file that is cut off while mapped kills the process.

    Args:
        place: (plane, row) -> (byte offset of the row, rows that follow without a gap, with it).
        layout: (planes, image width in pixels, samples per pixel of a plane).
        dtype: as stored.
        empty: as of `ImageSource.read`.
    """
    planes, full_width, samples = layout
    top, left, height, width = window
    pixel_bytes = samples * dtype.itemsize
    row_bytes, part_bytes = full_width * pixel_bytes, width * pixel_bytes
    out = empty((planes, height, width, samples), dtype)
    spans: list[tuple[int, int]] = []
    for plane in range(planes):
        row = 0
        while row < height:
            offset, run = place(plane, top + row)
            run = min(run, height - row)
            start = offset + left * pixel_bytes
            if width == full_width:
                spans.append((start, run * part_bytes))
            else:
                spans.extend((start + i * row_bytes, part_bytes) for i in range(run))
            row += run
    file.pread_spans(memoryview(out.reshape(-1).view(np.uint8).data), spans)
    return out


def bands_first(out: Array) -> Array:
    """`[planes, h, w, samples]`, where planes or samples is one -> `[bands, h, w]`, a view."""
    return out[..., 0] if out.shape[0] > 1 else np.moveaxis(out[0], -1, 0)
