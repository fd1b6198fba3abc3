"""What every source of pixels has in common: windows, one error, and limits on what a file asks."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from operator import index as as_int
from typing import Any, Self

import numpy as np

from ..profiling import Spans, no_spans

Array = np.ndarray[Any, Any]
Window = tuple[int, int, int, int]  # top, left, height, width in pixels of a level
Empty = Callable[
    [tuple[int, ...], np.dtype[Any]], Array
]  # np.empty, or what gives memory as it does

# A file may ask for this much and no more. Decoded bytes of one tile, strip or chunk:
MAX_SEGMENT_BYTES = 512 << 20
# Tiles or strips of one level: offsets and counts take 32 MiB; 137 Gpx at 256 px tiles.
MAX_SEGMENTS = 1 << 21
MAX_PAGES = 2000
MAX_TAGS = 4096
MAX_SUB_IFDS = 64
# PNG and JPEG have no random access and are decoded whole.
MAX_PILLOW_PIXELS = 1_000_000_000

DTYPES = "bool, integers of 8 to 64 bits or floats of 16 to 64 bits"


class SourceError(ValueError):
    """What cannot be read as an image; one sentence: name, what was expected, what was found."""


class DamagedTileError(SourceError):
    """A tile or strip that does not decode, in a file that is otherwise readable."""


def expect(holds: object, name: str, expected: str, found: object) -> None:
    """Raise a `SourceError` about the file `name` unless `holds`."""
    if not holds:
        raise SourceError(f"{name}: expected {expected}, found {found}.")


def reason(error: BaseException) -> str:
    """What a library said, as the end of a sentence."""
    text = " ".join(str(error).split()).rstrip(".")[:300]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


class ImageSource(ABC):
    """An image of any size, read by windows. Thread-safe; pickles; a context manager.

    Attributes:
        name: the path, or "array".
        height, width: pixels of level 0.
        bands: number of bands.
        dtype: as stored, in native byte order. 1-bit and bool read as uint8, 0 or 255.
        level_sizes: (height, width) of each pyramid level in pixels, full size first.
        block: (rows, columns) of the natural storage unit of level 0: a tile, a strip, a chunk;
            (1, width) where rows lie one after the other. Windows aligned to it are the fast ones.
        metadata: JSON-able facts: "format", "compression", and where the file has them "crs"
            ("EPSG:32633" or WKT), "crs_kind" ("projected", "geographic" or "geocentric", of GeoTIFF
            only), "transform" ([a, b, c, d, e, f]: x = a column + b row + c,
            y = d column + e row + f), "mpp" ([y, x], microns per pixel), "nodata".
        recipe: the callable and its arguments that make this source again; for pickle.
        spans: takes the times of "read" and "decode".
    """

    height: int
    width: int
    bands: int
    dtype: np.dtype[Any]
    level_sizes: tuple[tuple[int, int], ...]
    block: tuple[int, int]
    metadata: dict[str, Any]
    recipe: tuple[Any, ...]

    def __init__(self, name: str) -> None:
        self.name = name
        self.spans: Spans = no_spans
        self._closed = False
        self._bytes_read = 0
        self._lock = threading.Lock()

    def read(
        self,
        top: int,
        left: int,
        height: int,
        width: int,
        level: int = 0,
        *,
        empty: Empty = np.empty,
    ) -> Array:
        """Pixels of one window, `[bands, height, width]`, native dtype, not always contiguous.

        Args:
            top, left: first row and column, in pixels of `level`.
            height, width: size of the window in pixels; it must lie inside the image.
            level: pyramid level, 0 is the full size.
            empty: called as `np.empty` is for the memory of the window, by sources that fill it
                themselves (TIFF, .npy, arrays, zarr).

        Returns:
            A fresh array that the caller may keep and change.

        Raises:
            ValueError: a window outside the image; names argument, rule and value.
            SourceError: the file is damaged, was changed or is closed.
        """
        top, left, height, width, level = map(as_int, (top, left, height, width, level))
        last = len(self.level_sizes) - 1
        if not 0 <= level <= last:
            raise ValueError(f"read: level must be in 0..{last} for {self.name}, got {level}.")
        rows, columns = self.level_sizes[level]
        for start_name, start, size_name, size, limit in (
            ("top", top, "height", height, rows),
            ("left", left, "width", width, columns),
        ):
            if start < 0 or size < 1 or start + size > limit:
                raise ValueError(
                    f"read: {start_name} must be >= 0, {size_name} >= 1 and {start_name} + "
                    f"{size_name} <= {limit} for level {level} of {self.name}, "
                    f"got {start_name} {start}, {size_name} {size}."
                )
        expect(not self._closed, self.name, "an open source", "one that was closed")
        try:
            with self.spans("read"):
                return self._read((top, left, height, width), level, empty)
        except (SourceError, MemoryError):
            raise
        except Exception as error:
            window = f"a window of {height} x {width} px at ({top}, {left}) of level {level}"
            raise SourceError(f"{self.name}: expected {window}, found {reason(error)}.") from error

    @property
    def bytes_read(self) -> int:
        """Bytes fetched from the file so far, as stored; bytes of windows where that is unknown."""
        return self._bytes_read

    def check_unchanged(self) -> None:
        """Raise `SourceError` if the file was written to since it was opened, where that shows."""
        return None

    def close(self) -> None:
        """Let the file go; reading afterwards raises `SourceError`. Closing twice is fine."""
        self._closed = True

    @abstractmethod
    def _read(self, window: Window, level: int, empty: Empty) -> Array: ...

    def _count(self, size: int) -> None:
        """Add to `bytes_read`."""
        with self._lock:
            self._bytes_read += size

    def _set_size(self, sizes: Sequence[tuple[int, int]], bands: int, dtype: np.dtype[Any]) -> None:
        """Check and keep level sizes in pixels, number of bands and stored dtype."""
        known = dtype.kind in "buif" and dtype.itemsize <= 8
        expect(known, self.name, f"a data type of {DTYPES}", dtype)
        found = f"{sizes[0][0]} x {sizes[0][1]} px, {bands} bands"
        filled = bands > 0 and all(min(size) > 0 for size in sizes)
        expect(filled, self.name, "at least one row, column and band", found)
        self.level_sizes = tuple((int(height), int(width)) for height, width in sizes)
        (self.height, self.width), self.bands = self.level_sizes[0], int(bands)
        self.dtype = np.dtype(np.uint8) if dtype.kind == "b" else dtype.newbyteorder("=")

    def __repr__(self) -> str:
        size = f"{self.height} x {self.width} px, {self.bands} bands, {self.dtype}"
        return f"<{type(self).__name__} {self.name}: {size}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return self.recipe
