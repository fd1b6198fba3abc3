"""Image files and arrays behind one reader: a size, a data type, and windows of pixels.

`open_image` is the only place in the project that opens image files. What it returns reads any
window of any pyramid level, from any number of threads at once, without touching the rest.

A file is not trusted. Headers are judged before anything is decoded: sizes, the number of tiles,
each offset and byte count, and how much the stored bytes can expand to. Whatever is wrong ends in
one `SourceError`; a damaged tile raises and never turns into zeros. TIFF directories are walked
here, because a reader that believes a header can be made to hang or to fill the memory. Tiles and
strips are fetched with `pread` and decoded one by one by tifffile and imagecodecs, without a lock:

    4096 x 4096 x 3 uint8, 512 px tiles, two cores; Mpx/s with 1 and 2 threads    JPEG      deflate
    pread + TiffPage.decode                                                     277, 518   146, 274
    zarr.open(page.aszarr())                                                    226, 188   127, 115
"""

from __future__ import annotations

import io
import math
import os
import re
import stat
import struct
import threading
import warnings
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import lru_cache, partial
from operator import index as as_int
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np

__all__ = ["ImageSource", "SourceError", "open_image"]

Array = np.ndarray[Any, Any]
Window = tuple[int, int, int, int]  # top, left, height, width in pixels of a level

# A file may ask for this much and no more. Decoded bytes of one tile, strip or chunk:
MAX_SEGMENT_BYTES = 512 << 20
# Tiles or strips of one level: offsets and counts take 32 MiB; 137 Gpx at 256 px tiles.
MAX_SEGMENTS = 1 << 21
MAX_PAGES = 2000
MAX_TAGS = 4096
MAX_SUB_IFDS = 64
# PNG and JPEG have no random access and are decoded whole.
MAX_PILLOW_PIXELS = 1_000_000_000
# Decoded tiles kept per source, only those that a window met in part. Walking in 256 px regions
# over 512 px tiles meets each tile four times; 48 MiB hold a row of such tiles of a 29,000 px image
# of 3 bands. Measured as above, one thread: 193 Mpx/s of JPEG and 113 of deflate with it, 128 and
# 67 with only the last tile kept. Keeping whole tiles too would cost 20 % where windows fit tiles.
CACHE_BYTES = 48 << 20

_DTYPES = "bool, integers of 8 to 64 bits or floats of 16 to 64 bits"
_WSI_SUFFIXES = {".ndpi", ".mrxs", ".vms", ".vmu", ".scn", ".bif", ".svslide"}
_GEO_SUFFIXES = {".jp2", ".j2k", ".img", ".ntf", ".nitf", ".ecw", ".sid", ".hdf", ".h5", ".nc"}
_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


class SourceError(ValueError):
    """What cannot be read as an image; one sentence: name, what was expected, what was found."""


def _expect(holds: object, name: str, expected: str, found: object) -> None:
    if not holds:
        raise SourceError(f"{name}: expected {expected}, found {found}.")


def _reason(error: BaseException) -> str:
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
            (1, width) where rows lie one after the other.
        metadata: JSON-able facts: "format", "compression", and where the file has them "crs"
            ("EPSG:32633" or WKT), "transform" ([a, b, c, d, e, f]: x = a column + b row + c,
            y = d column + e row + f), "mpp" ([y, x], microns per pixel), "nodata".
    """

    name: str
    height: int
    width: int
    bands: int
    dtype: np.dtype[Any]
    level_sizes: tuple[tuple[int, int], ...]
    block: tuple[int, int]
    metadata: dict[str, Any]
    _closed = False
    _recipe: tuple[Any, str | None, str | None]  # the arguments of open_image that made this

    def read(self, top: int, left: int, height: int, width: int, level: int = 0) -> Array:
        """Pixels of one window, `[bands, height, width]`, native dtype, not always contiguous.

        Args:
            top, left: first row and column, in pixels of `level`.
            height, width: size of the window in pixels; it must lie inside the image.
            level: pyramid level, 0 is the full size.

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
        _expect(not self._closed, self.name, "an open source", "one that was closed")
        try:
            return self._read((top, left, height, width), level)
        except (SourceError, MemoryError):
            raise
        except Exception as error:
            window = f"a window of {height} x {width} px at ({top}, {left}) of level {level}"
            raise SourceError(f"{self.name}: expected {window}, found {_reason(error)}.") from error

    @property
    def bytes_read(self) -> int:
        """Bytes fetched from the file so far, as stored; bytes of windows where that is unknown."""
        return 0

    def close(self) -> None:
        """Let the file go; reading afterwards raises `SourceError`. Closing twice is fine."""
        self._closed = True

    @abstractmethod
    def _read(self, window: Window, level: int) -> Array: ...

    def _set_size(self, sizes: Sequence[tuple[int, int]], bands: int, dtype: np.dtype[Any]) -> None:
        """Check and keep level sizes in pixels, number of bands and stored dtype."""
        known = dtype.kind in "buif" and dtype.itemsize <= 8
        _expect(known, self.name, f"a data type of {_DTYPES}", dtype)
        found = f"{sizes[0][0]} x {sizes[0][1]} px, {bands} bands"
        filled = bands > 0 and all(min(size) > 0 for size in sizes)
        _expect(filled, self.name, "at least one row, column and band", found)
        self.level_sizes = tuple((int(height), int(width)) for height, width in sizes)
        (self.height, self.width), self.bands = self.level_sizes[0], int(bands)
        self.dtype = np.dtype(np.uint8) if dtype.kind == "b" else dtype.newbyteorder("=")

    def __repr__(self) -> str:
        size = f"{self.height} x {self.width} px, {self.bands} bands, {self.dtype}"
        return f"<{type(self).__name__.strip('_')} {self.name}: {size}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, self._recipe


def open_image(image: Any, *, backend: str | None = None, axes: str | None = None) -> ImageSource:
    """Open a file or wrap an array; the header is checked, no pixel is decoded.

    Files are recognised by their first bytes: TIFF, BigTIFF (SVS too), PNG, JPEG, `.npy`, and
    folders with zarr metadata. Slides that need openslide (`.ndpi`, `.mrxs`, `.scn`, ...) and
    formats that need rasterio (`.jp2`, `.img`, ...) are recognised by suffix. A `.vrt` refers to
    other files and is opened only with `backend="rasterio"`.

    TIFF: page 0 is the image. Its SubIFDs, pages marked as reduced, and (in tiled files) tiled
    pages are pyramid levels if they are smaller by the same factor in both directions. Other pages
    (labels, thumbnails, masks) are left out and counted in `metadata["other_pages"]`; a second page
    of full size makes the file a stack, which is refused. Palettes and JPEG YCbCr become RGB, 1-bit
    becomes 0/255, white-is-zero is inverted; CMYK, CIELab, sensor mosaics, complex numbers and odd
    sample sizes (4, 12 bits) are refused. Tiles that a sparse file leaves out read as its nodata
    value; without one the file is refused. The stored grid is kept: an Orientation tag only shows
    in `metadata["orientation"]`. GeoTIFF tags and world files give crs and transform.

    PNG, JPEG: decoded whole on the first read and kept, since they have no random access; refused
    above 1 Gpx. Palette and CMYK become RGB, EXIF orientation of JPEG is applied, alpha stays as
    the last band.

    Arrays of two axes are `[H, W]`. With three axes, at most 16 in the last and more than 16 in the
    first means `[H, W, C]`, the opposite `[C, H, W]`; anything else is ambiguous and needs `axes`.
    Torch tensors are `[C, H, W]`. Axis names in zarr metadata count before this rule. Missing zarr
    chunks read as the fill value, as zarr defines it.

    Args:
        image: a path, a numpy array or memory map, a zarr array or group, a CPU tensor, or an
            `ImageSource`, which is returned as it is.
        backend: "tiff", "pillow", "npy", "zarr", "rasterio", "openslide"; None chooses by content.
        axes: "HW", "HWC" or "CHW" for arrays, `.npy` and zarr.

    Raises:
        SourceError: not a readable image; names the file, what was expected and what was found.
    """
    if isinstance(image, ImageSource):
        return image
    _expect(axes in (None, "HW", "HWC", "CHW"), "open_image", "axes HW, HWC or CHW", repr(axes))
    known = backend is None or backend in _BACKENDS
    _expect(known, "open_image", f"a backend of {', '.join(_BACKENDS)}", repr(backend))
    if not isinstance(image, str | os.PathLike):
        source = _open_array(image, axes)
        source._recipe = (image, backend, axes)
        return source
    path = os.fspath(image)
    backend = backend or _detect(path)
    has_axes = backend in ("npy", "zarr")
    _expect(axes is None or has_axes, path, "axes only with arrays, .npy and zarr", backend)
    try:
        source = _BACKENDS[backend](path, axes) if has_axes else _BACKENDS[backend](path)
    except (SourceError, MemoryError):
        raise
    except Exception as error:
        raise SourceError(
            f"{path}: expected a file for {backend}, found {_reason(error)}."
        ) from error
    source._recipe = (os.path.abspath(path), backend, axes)
    return source


def _reopen(image: Any, backend: str | None, axes: str | None) -> ImageSource:
    return open_image(image, backend=backend, axes=axes)


def _detect(path: str) -> str:
    """The backend for a path, by its first bytes, then by its suffix."""
    suffix = Path(path).suffix.lower()
    if os.path.isdir(path):
        names = ("zarr.json", ".zarray", ".zgroup")
        is_zarr = any(os.path.isfile(os.path.join(path, name)) for name in names)
        _expect(is_zarr, path, "an image file or a zarr folder", "a folder without zarr metadata")
        return "zarr"
    with _File(path) as file:
        head = file.pread(0, min(16, file.size))
    if suffix in _WSI_SUFFIXES:
        return "openslide"
    if head[:4] in _TIFF_MAGIC:
        return "tiff"
    if head.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")):
        return "pillow"
    if head.startswith(b"\x93NUMPY"):
        return "npy"
    followed = 'backend="rasterio" to follow what a .vrt refers to'
    _expect(suffix != ".vrt", path, followed, "no backend")
    images = 'TIFF, PNG, JPEG, .npy or zarr (others with backend="rasterio" or "openslide")'
    _expect(suffix in _GEO_SUFFIXES, path, images, f"a file that starts with {head!r}")
    return "rasterio"


class _File:
    """A regular file, open for reading at any place from any thread; a short read is an error."""

    def __init__(self, path: str) -> None:
        self.name, self.fd, self.bytes_read = path, -1, 0
        self._lock = threading.Lock()
        try:
            mode = os.stat(path).st_mode  # before opening, which would wait on a pipe
            kind = "a folder" if stat.S_ISDIR(mode) else "a device or pipe"
            _expect(stat.S_ISREG(mode), path, "a regular file", kind)
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
        self._account(offset, count, len(data))
        return data

    def pread_rows(self, view: memoryview, spans: Sequence[tuple[int, int]]) -> None:
        """Fill a buffer of bytes with (byte offset, bytes) spans of the file, in order."""
        done = 0
        for offset, count in spans:
            got = os.preadv(self.fd, [view[done : done + count]], offset)
            if got != count:  # one call moves at most 2 GiB
                self._account(offset, count if got else 1, got or 0)
                self.pread_rows(view[done + got : done + count], [(offset + got, count - got)])
            done += count
        with self._lock:
            self.bytes_read += done

    def _account(self, offset: int, wanted: int, got: int) -> None:
        place = f"{wanted:,} bytes at byte {offset:,}"
        _expect(got == wanted, self.name, place, f"the end of the file after {got:,}")
        with self._lock:
            self.bytes_read += got

    def check_unchanged(self) -> None:
        """Raise if the file was written to since it was opened."""
        status = os.fstat(self.fd)
        same = (status.st_size, status.st_mtime_ns) == (self.size, self._modified)
        found = f"one that changed while it was open ({status.st_size:,} bytes now); open it again"
        _expect(same, self.name, f"the file of {self.size:,} bytes that was opened", found)

    def close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


# Arrays and zarr


def _dims(name: str, shape: tuple[int, ...], axes: str | None) -> str:
    """The axes of an array as a word over "c", "y", "x"; the rule of `open_image`."""
    if axes is None:
        axes = "HW"
        if len(shape) == 3:
            last, first = shape[2] <= 16 < shape[0], shape[0] <= 16 < shape[2]
            clear = 'axes="HWC" or "CHW" where the shape does not tell the bands'
            _expect(last or first, name, clear, list(shape))
            axes = "HWC" if last else "CHW"
    _expect(len(axes) == len(shape), name, f"an array of {len(axes)} axes ({axes})", list(shape))
    return axes.translate(str.maketrans("HWC", "yxc"))


def _dims_size(dims: str, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(bands, height, width) of an array."""
    size = dict(zip(dims, shape, strict=True))
    return size.get("c", 1), size["y"], size["x"]


class _ArraySource(ImageSource):
    """What slices like a numpy array: one array per pyramid level, all with the same axes."""

    def __init__(
        self,
        name: str,
        levels: Sequence[Any],
        dims: str,
        metadata: dict[str, Any],
        chunks: tuple[int, ...] | None = None,
    ) -> None:
        self.name, self.metadata = name, metadata
        self._levels, self._dims = tuple(levels), dims
        sizes = [_dims_size(dims, level.shape) for level in levels]
        dtype = np.dtype(levels[0].dtype)
        self._set_size([size[1:] for size in sizes], sizes[0][0], dtype)
        alike = all(size[0] == self.bands for size in sizes)
        alike = alike and all(np.dtype(level.dtype) == dtype for level in levels)
        _expect(alike, name, "levels of the same bands and data type", "others")
        self.block = _dims_size(dims, chunks)[1:] if chunks else (1, self.width)
        self._bytes_read = 0
        self._lock = threading.Lock()

    @property
    def bytes_read(self) -> int:
        return self._bytes_read

    def _read(self, window: Window, level: int) -> Array:
        top, left, height, width = window
        part = {"y": slice(top, top + height), "x": slice(left, left + width), "c": slice(None)}
        index = tuple(part.get(dim, 0) for dim in self._dims)
        pixels = np.asarray(self._levels[level][index])
        kept = "".join(dim for dim in self._dims if dim in part)
        if "c" not in kept:
            pixels, kept = pixels[None], "c" + kept
        pixels = pixels.transpose([kept.index(dim) for dim in "cyx"])
        with self._lock:
            self._bytes_read += pixels.nbytes
        if pixels.dtype.kind == "b":
            return pixels * np.uint8(255)
        return pixels.astype(self.dtype, order="K")

    def close(self) -> None:
        super().close()
        self._levels = ()

    def __reduce__(self) -> tuple[Any, ...]:
        image, backend, axes = self._recipe
        # A map pickles as its file name. Views keep the offset of their map, so only a whole map
        # can be mapped again by name.
        if isinstance(image, np.memmap) and type(image.base).__name__ == "mmap" and image.filename:
            order = "C" if image.flags.c_contiguous else "F"
            where = (str(image.filename), image.dtype, "r", image.offset, image.shape, order)
            return _reopen_memmap, (where, backend, axes)
        return super().__reduce__()


def _reopen_memmap(where: tuple[Any, ...], backend: str | None, axes: str | None) -> ImageSource:
    try:
        return open_image(np.memmap(*where), backend=backend, axes=axes)
    except (OSError, ValueError) as error:
        found = _reason(error)
        raise SourceError(f"{where[0]}: expected the mapped file, found {found}.") from error


def _open_array(image: Any, axes: str | None) -> ImageSource:
    """A numpy array, memory map, zarr array or group, or torch tensor."""
    package = type(image).__module__.partition(".")[0]
    if package == "zarr":
        return _zarr_source("zarr", image, axes)
    if package == "torch" and hasattr(image, "detach"):
        _expect(image.device.type == "cpu", "array", "a tensor on the CPU", image.device)
        try:
            image = image.detach().numpy()
        except TypeError as error:
            raise SourceError(
                f"array: expected a data type of {_DTYPES}, found {image.dtype}."
            ) from error
        axes = axes or ("CHW" if image.ndim == 3 else None)
    kinds = "a path, an array, a zarr array or a CPU tensor"
    _expect(isinstance(image, np.ndarray), "open_image", kinds, type(image).__name__)
    is_map = isinstance(image, np.memmap)
    name = str(image.filename) if is_map and image.filename else "array"
    metadata = {"format": "memmap" if is_map else "array", "compression": "none"}
    return _ArraySource(name, [image], _dims(name, image.shape, axes), metadata)


def _open_zarr(path: str, axes: str | None) -> ImageSource:
    import zarr

    return _zarr_source(path, zarr.open(path, mode="r"), axes)


def _zarr_source(name: str, node: Any, axes: str | None) -> ImageSource:
    """A zarr array, or a group with OME-Zarr `multiscales`, whose arrays are the levels."""
    if hasattr(node, "shape"):
        levels = [node]
        names = getattr(node.metadata, "dimension_names", None)
        names = names or node.attrs.get("_ARRAY_DIMENSIONS") or ()
    else:
        attributes = dict(node.attrs)
        scales = attributes.get("multiscales") or attributes.get("ome", {}).get("multiscales")
        arrays = ", ".join(sorted(key for key, _ in node.arrays())[:8]) or "no array"
        _expect(scales, name, "a zarr array or a group with multiscales", f"a group of {arrays}")
        levels = [node[item["path"]] for item in scales[0]["datasets"]]
        names = [a["name"] if isinstance(a, dict) else a for a in scales[0].get("axes", "tczyx")]
    short = {"band": "c", "channel": "c", "row": "y", "column": "x"}
    dims = "".join(short.get(str(item).lower(), str(item).lower()) for item in names)
    usable = len(dims) == len(set(dims)) == levels[0].ndim and {"y", "x"} <= set(dims)
    if axes or not usable or not set(dims) <= set("tczyx"):
        dims = _dims(name, levels[0].shape, axes)
    for level in levels:
        shape = f"{dims} = {list(level.shape)}"
        flat = all(n == 1 for d, n in zip(dims, level.shape, strict=True) if d not in "cyx")
        _expect(flat, name, "size 1 in all axes but c, y and x", shape)
        chunk = math.prod(level.chunks) * np.dtype(level.dtype).itemsize
        limit = f"chunks of at most {MAX_SEGMENT_BYTES:,} bytes"
        _expect(chunk <= MAX_SEGMENT_BYTES, name, limit, f"{chunk:,} bytes ({level.chunks})")
    codecs = ", ".join(type(codec).__name__ for codec in levels[0].compressors) or "none"
    metadata = {"format": "zarr", "compression": codecs}
    return _ArraySource(name, levels, dims, metadata, tuple(levels[0].chunks))


# Uncompressed rows: .npy and plain TIFF strips


def _read_rows(
    file: _File,
    place: Callable[[int, int], tuple[int, int]],
    layout: tuple[int, int, int],
    dtype: np.dtype[Any],
    window: Window,
) -> Array:
    """A window `[planes, height, width, samples]` of uncompressed rows, without what lies between.

    Not a memory map: its pages count as memory of the process, and a file that is cut off while
    mapped kills the process.

    Args:
        place: (plane, row) -> (byte offset of the row, rows that follow without a gap, with it).
        layout: (planes, image width in pixels, samples per pixel of a plane).
    """
    planes, full_width, samples = layout
    top, left, height, width = window
    pixel_bytes = samples * dtype.itemsize
    out = np.empty((planes, height, width, samples), dtype)
    spans = []
    for plane in range(planes):
        row = 0
        while row < height:
            offset, run = place(plane, top + row)
            # Rows of a full-width window touch each other and come in one span.
            count = min(run, height - row) if width == full_width else 1
            spans.append((offset + left * pixel_bytes, count * width * pixel_bytes))
            row += count
    file.pread_rows(memoryview(out.reshape(-1).view(np.uint8).data), spans)
    return out


def _bands_first(out: Array) -> Array:
    """`[planes, h, w, samples]`, where planes or samples is one -> `[bands, h, w]`, a view."""
    return out[..., 0] if out.shape[0] > 1 else np.moveaxis(out[0], -1, 0)


class _NpySource(ImageSource):
    """A `.npy` file in C order, read row by row."""

    def __init__(self, path: str, axes: str | None) -> None:
        self.name = path
        self._file = _File(path)
        formats = np.lib.format
        readers = {(1, 0): formats.read_array_header_1_0, (2, 0): formats.read_array_header_2_0}
        with open(path, "rb") as stream:
            version = formats.read_magic(stream)
            _expect(version in readers, path, ".npy of version 1.0 or 2.0", version)
            shape, fortran, self._stored = readers[version](stream)
            self._offset = stream.tell()
        dims = _dims(path, shape, axes)
        bands, height, width = _dims_size(dims, shape)
        self._set_size([(height, width)], bands, self._stored)
        order = "C order (np.ascontiguousarray)"
        _expect(not fortran or max(shape) == 1, path, order, "Fortran order")
        claimed, held = math.prod(shape) * self._stored.itemsize, self._file.size - self._offset
        what = f"{claimed:,} bytes of {list(shape)} {self._stored}"
        _expect(claimed <= held, path, what, f"{held:,} bytes")
        self.block = (1, width)
        self.metadata = {"format": "npy", "compression": "none"}
        self._layout = (bands, width, 1) if dims == "cyx" else (1, width, bands)

    @property
    def bytes_read(self) -> int:
        return self._file.bytes_read

    def _read(self, window: Window, level: int) -> Array:
        self._file.check_unchanged()
        row_bytes = self._layout[1] * self._layout[2] * self._stored.itemsize

        def place(plane: int, row: int) -> tuple[int, int]:
            return self._offset + (plane * self.height + row) * row_bytes, self.height - row

        # A byte of a damaged bool array may be neither 0 nor 1.
        dtype = np.dtype(np.uint8) if self._stored.kind == "b" else self._stored
        out = _bands_first(_read_rows(self._file, place, self._layout, dtype, window))
        if self._stored.kind == "b":
            return np.where(out != 0, np.uint8(255), np.uint8(0))
        return out.astype(self.dtype, copy=False)

    def close(self) -> None:
        super().close()
        self._file.close()


# Directories of TIFF files

# Field types of the TIFF 6.0 and BigTIFF specifications; rationals are pairs.
_FIELD_TYPES = dict(enumerate("u1 S1 u2 u4 2u4 i1 u1 i2 i4 2i4 f4 f8 u4".split(), start=1))
_FIELD_TYPES |= {16: "u8", 17: "i8", 18: "u8"}
_TAG_TABLE = """
254 subfile 255 old_subfile 256 width 257 height 258 bits 259 compression 262 photometric
266 fill_order 270 description 273 strip_offsets 274 orientation 277 samples 278 strip_rows
279 strip_counts 282 x_resolution 283 y_resolution 284 planar 296 resolution_unit 317 predictor
320 palette 322 tile_width 323 tile_height 324 tile_offsets 325 tile_counts 330 sub_ifds
338 extra_samples 339 sample_format 347 jpeg_tables 32997 depth
33550 geo_scale 33922 geo_tiepoint 34264 geo_matrix 34735 geo_keys 42113 nodata
""".split()
_TAGS = {int(code): name for code, name in zip(_TAG_TABLE[::2], _TAG_TABLE[1::2], strict=True)}


@dataclass
class _Directory:
    """One TIFF directory (IFD): where its fields lie; values are fetched when asked for."""

    file: _File
    order: Literal["<", ">"]
    big: bool
    offset: int
    fields: dict[str, tuple[int, int, int]]  # field type, number of values, byte offset
    following: int  # offset of the next directory, 0 at the end

    def array(self, tag: str, limit: int) -> Array | None:
        """All values of a tag, or None; rationals as `[count, 2]`."""
        if tag not in self.fields:
            return None
        kind, count, where = self.fields[tag]
        name, at = self.file.name, f"{tag} of the page at byte {self.offset:,}"
        known = kind in _FIELD_TYPES and count <= limit
        _expect(known, name, f"at most {limit:,} numbers in {at}", f"{count:,} of type {kind}")
        dtype = np.dtype(_FIELD_TYPES[kind]).newbyteorder(self.order)
        end = where + dtype.itemsize * count
        _expect(end <= self.file.size, name, f"{at} inside the file", f"an end at {end:,}")
        return np.frombuffer(self.file.pread(where, end - where), dtype)

    def number(self, tag: str, default: int) -> int:
        """The integer of a tag; where there is one per band, all must be equal."""
        values = self.array(tag, 1 << 16)
        if values is None or not len(values):
            return default
        plain = values.dtype.kind in "iu" and values.ndim == 1 and (values == values[0]).all()
        _expect(plain, self.file.name, f"one integer as {tag}", values[:8].tolist())
        return int(values[0])

    def text(self, tag: str) -> str:
        values = self.array(tag, 1 << 24)
        return "" if values is None else values.tobytes().split(b"\0")[0].decode("utf-8", "replace")


def _walk_tiff(file: _File) -> Iterator[_Directory]:
    """The directories of the main chain, first page first; loops and wild offsets raise."""
    head = file.pread(0, min(16, file.size))
    _expect(head[:4] in _TIFF_MAGIC, file.name, "a TIFF file", f"a start of {head[:4]!r}")
    order: Literal["<", ">"] = "<" if head[:1] == b"I" else ">"
    big = b"+" in head[2:4]
    where = head[8:16] if big else head[4:8]
    whole = len(where) == (8 if big else 4) and (not big or head[4:8].strip(b"\0") == b"\x08")
    _expect(whole, file.name, "a whole TIFF header", repr(head))
    offset = struct.unpack(order + ("Q" if big else "I"), where)[0]
    _expect(offset, file.name, "at least one page", "a TIFF without pages")
    seen: set[int] = set()
    while offset:
        found = f"{'a loop' if offset in seen else 'one more'} at byte {offset:,}"
        ends = offset not in seen and len(seen) < MAX_PAGES
        _expect(ends, file.name, f"a chain of at most {MAX_PAGES:,} pages", found)
        seen.add(offset)
        directory = _read_directory(file, order, big, offset)
        yield directory
        offset = directory.following


def _read_directory(file: _File, order: Literal["<", ">"], big: bool, offset: int) -> _Directory:
    """The directory at a byte offset."""
    count_size, word = (8, "u8") if big else (2, "u4")
    layout = [("tag", "u2"), ("kind", "u2"), ("count", word), ("value", word)]
    entry = np.dtype(layout).newbyteorder(order)
    endian: Literal["little", "big"] = "little" if order == "<" else "big"
    word_size, start = entry["value"].itemsize, offset + count_size
    what = f"a page directory of at most {MAX_TAGS} tags at byte {offset:,}"
    cut = f"the end of the file at {file.size:,}"
    _expect(start <= file.size, file.name, what, cut)
    number = int.from_bytes(file.pread(offset, count_size), endian)
    _expect(number <= MAX_TAGS, file.name, what, f"{number:,} tags")
    size = number * entry.itemsize + word_size
    _expect(start + size <= file.size, file.name, what, cut)
    data = file.pread(start, size)
    entries = np.frombuffer(data, entry, number)
    fields: dict[str, tuple[int, int, int]] = {}
    for at in np.flatnonzero(np.isin(entries["tag"], list(_TAGS))):
        tag, kind, count, value = (int(item) for item in entries[at])
        inline = start + int(at + 1) * entry.itemsize - word_size
        fits = count * np.dtype(_FIELD_TYPES.get(kind, "u1")).itemsize <= word_size
        fields.setdefault(_TAGS[tag], (kind, count, inline if fits else value))
    following = int.from_bytes(data[-word_size:], endian)
    return _Directory(file, order, big, offset, fields, following)


# Pages of TIFF files

_JPEG, _FAX = 7, (2, 3, 4)
# TIFF compression -> (name, the most decoded bytes that one stored byte can give). Deflate stays
# below 1032, LZW packs at most 4095 bytes into 12 bits, a JPEG block takes 2 bits or more.
_COMPRESSIONS = {
    **{1: ("none", 1), 5: ("lzw", 2800), 8: ("deflate", 1032), 32946: ("deflate", 1032)},
    **{_JPEG: ("jpeg", 2048), 32773: ("packbits", 64), 34925: ("lzma", 20_000)},
    **{50000: ("zstd", 50_000)},
    **{2: ("ccitt-rle", 1 << 20), 3: ("ccitt-g3", 1 << 20), 4: ("ccitt-g4", 1 << 20)},
}
_PHOTOMETRIC = {0: "white is zero", 1: "black is zero", 2: "RGB", 3: "palette", 6: "YCbCr"}
_REFUSED_COLOURS = {4: "a mask", 5: "CMYK", 8: "CIELab", 32803: "a sensor mosaic"}


@dataclass
class _Page:
    """What a directory says about its image: sensible in itself, and after `_check_segments` held
    against the file."""

    directory: _Directory
    height: int
    width: int
    samples: int
    dtype: np.dtype[Any]  # file byte order; bool for 1-bit
    compression: int
    photometric: int
    planar: bool
    predictor: int
    fill_order: int
    extra_samples: int
    tiled: bool
    rows: int  # of a tile or strip
    columns: int
    subfile: int  # bit 0: reduced resolution, bit 2: mask
    offsets: Array  # bytes, one per tile or strip, row by row, plane by plane
    counts: Array
    jpeg_tables: bytes | None = None
    fill: Any = None  # value of tiles that a sparse file leaves out

    @property
    def name(self) -> str:
        return self.directory.file.name

    @property
    def grid(self) -> tuple[int, int, int]:
        """Planes, and tiles or strips down and across."""
        planes = self.samples if self.planar else 1
        return planes, -(-self.height // self.rows), -(-self.width // self.columns)

    @property
    def plane_samples(self) -> int:
        return 1 if self.planar else self.samples

    @property
    def in_rows(self) -> bool:
        """Plain rows of whole pixels, which need no decoding."""
        plain = self.compression == self.predictor == self.fill_order == 1
        return plain and not self.tiled and self.dtype.kind != "b"

    @property
    def bits(self) -> int:
        return 1 if self.dtype.kind == "b" else 8 * self.dtype.itemsize

    def segment_bytes(self, rows: int) -> int:
        """Decoded bytes of a tile or strip of so many rows."""
        return rows * -(-self.columns * self.plane_samples * self.bits // 8)


def _parse_page(directory: _Directory) -> _Page:
    """Read the fields that describe the image; anything we do not support raises."""
    name, number = directory.file.name, directory.number
    height, width, samples = number("height", 0), number("width", 0), number("samples", 1)
    found = f"{height} x {width} px, {samples} bands"
    filled = min(height, width, samples) > 0
    _expect(filled, name, "at least one row, column and band", found)
    compression = number("compression", 1)
    codecs = ", ".join(sorted({text for text, _ in _COMPRESSIONS.values()}))
    hint = f'number {compression} (backend="rasterio" or "openslide" may read it)'
    _expect(compression in _COMPRESSIONS, name, f"TIFF compression of {codecs}", hint)

    kind, bits = number("sample_format", 1), number("bits", 1)
    letter = {1: "u", 2: "i", 3: "f", 4: "u"}.get(kind)
    bilevel = letter == "u" and bits == samples == 1
    whole = letter is not None and bits in ((16, 32, 64) if letter == "f" else (8, 16, 32, 64))
    found = f"{bits} bits of sample format {kind}" + (" (complex)" if kind in (5, 6) else "")
    _expect(bilevel or whole, name, f"samples of {_DTYPES}", found)
    dtype = np.dtype(bool) if bilevel else np.dtype(f"{directory.order}{letter}{bits // 8}")

    tiled = "tile_width" in directory.fields or "tile_offsets" in directory.fields
    rows, columns = number("tile_height", 0), number("tile_width", 0)
    if not tiled:
        rows, columns = min(number("strip_rows", height), height), width
    _expect(rows > 0 < columns, name, "tiles or strips of some pixels", f"{rows} x {columns}")
    page = _Page(
        directory=directory,
        height=height,
        width=width,
        samples=samples,
        dtype=dtype,
        compression=compression,
        photometric=number("photometric", 0 if compression in _FAX else 1),
        planar=number("planar", 1) == 2 and samples > 1,
        predictor=1 if compression in (_JPEG, *_FAX) else number("predictor", 1),
        fill_order=number("fill_order", 1),
        extra_samples=directory.fields.get("extra_samples", (0, 0, 0))[1],
        tiled=tiled,
        rows=rows,
        columns=columns,
        subfile=number("subfile", 1 if number("old_subfile", 1) == 2 else 0),
        offsets=np.empty(0, np.uint64),
        counts=np.empty(0, np.uint64),
    )
    _check_colour(page, number("depth", 1))
    return page


def _check_colour(page: _Page, depth: int) -> None:
    """Photometric, predictor, depth and codec must fit together."""
    kind, codec = page.photometric, page.compression
    known = ", ".join(_PHOTOMETRIC.values())
    found = f"{_REFUSED_COLOURS.get(kind, f'photometric {kind}')}; convert it to RGB"
    _expect(kind in _PHOTOMETRIC, page.name, f"TIFF colours of {known}", found)
    bytes_only = page.dtype == np.dtype(np.uint8)
    predictors = {"f": (1, 2, 3), "b": (1,)}.get(page.dtype.kind, (1, 2))
    ycbcr = codec == _JPEG and page.samples == 3 and not page.planar
    what = f"{page.samples} bands of {page.bits}-bit {page.dtype.kind}, {_COMPRESSIONS[codec][0]}"
    for holds, expected in (
        (depth == 1, "a flat image, not a volume"),
        (kind != 2 or page.samples >= 3, "RGB of 3 bands or more"),
        (kind != 3 or (page.samples == 1 and bytes_only), "a palette image of 8 bits"),
        (kind != 6 or ycbcr, "YCbCr of 3 interleaved bands in JPEG"),
        (codec != _JPEG or bytes_only, "JPEG of 8 bits"),
        (codec != _JPEG or page.plane_samples in (1, 3, 4), "JPEG of 1, 3 or 4 bands"),
        (codec not in _FAX or page.dtype.kind == "b", "fax compression of 1 bit"),
        (page.predictor in predictors, f"a predictor of {predictors}, not {page.predictor}"),
        (page.fill_order in (1, 2), f"fill order 1 or 2, not {page.fill_order}"),
    ):
        _expect(holds, page.name, expected, what)


def _check_segments(page: _Page, level: int) -> None:
    """Load offsets and byte counts, and hold them against the file; nothing is decoded.

    Numbers are judged before arrays and arrays before data, so that a header that claims millions
    of tiles costs no more than the bytes that it really has.
    """
    directory, name = page.directory, page.name
    what = "tile" if page.tiled else "strip"
    expected = math.prod(page.grid)
    size = f"{page.height:,} x {page.width:,} px in {what}s of {page.rows:,} x {page.columns:,}"
    arrays = []
    for part in ("offsets", "counts"):
        found = directory.fields.get(f"{what}_{part}", (0, 0, 0))[1]
        needed = f"{expected:,} {what} {part} in level {level} ({size})"
        _expect(found == expected, name, needed, f"{found:,}")
    limit = f"at most {MAX_SEGMENTS:,} {what}s"
    _expect(expected <= MAX_SEGMENTS, name, limit, f"{expected:,} ({size})")
    decoded = page.segment_bytes(page.rows)
    limit = f"{what}s of at most {MAX_SEGMENT_BYTES:,} decoded bytes (rewrite as tiled TIFF)"
    fits = page.in_rows or decoded <= MAX_SEGMENT_BYTES
    _expect(fits, name, limit, f"{decoded:,} ({size})")

    for part in ("offsets", "counts"):
        values = directory.array(f"{what}_{part}", MAX_SEGMENTS)
        integers = values is not None and values.dtype.kind in "iu" and values.ndim == 1
        _expect(integers, name, f"integers as {what} {part}", "another type")
        # A negative number becomes too large, which the next check refuses.
        arrays.append(np.asarray(values).astype(np.uint64))
    page.offsets, page.counts = offsets, counts = arrays
    held = np.uint64(directory.file.size)
    outside = (counts > held) | (offsets > held - np.minimum(counts, held))
    at = int(outside.argmax())
    inside = f"{what} {at:,} of level {level} inside the {held:,} bytes of the file"
    _expect(not outside.any(), name, inside, f"{counts[at]:,} bytes at {offsets[at]:,}")

    absent = (counts == 0) & (offsets == 0)
    if absent.any():
        page.fill = _nodata_fill(page)
        gap = f"{what} {int(absent.argmax()):,} of level {level} in the file"
        known = page.fill is not None and not page.in_rows
        _expect(known, name, f"{gap}, or a nodata value to stand for it", "neither")
    _check_counts(page, what, level, absent)


def _nodata_fill(page: _Page) -> Any:
    """The nodata value in the page's dtype, or None: an absent tile is never made up."""
    try:
        value = float(page.directory.text("nodata").strip())
        with np.errstate(all="ignore"):
            fill = np.array(value).astype(page.dtype.newbyteorder("="))[()]
    except ValueError:
        return None
    return fill if page.dtype.kind == "f" or float(fill) == value else None


def _check_counts(page: _Page, what: str, level: int, absent: Array) -> None:
    """Every byte count must be able to hold its tile or strip, and must not be absurdly large."""
    codec, ratio = _COMPRESSIONS[page.compression]
    _, down, across = page.grid
    full = page.segment_bytes(page.rows)
    # The last strip of a plane is shorter; tiles are always whole.
    last = full if page.tiled else page.segment_bytes(page.height - (down - 1) * page.rows)
    is_last = np.arange(len(page.counts)) // across % down == down - 1
    pixels = np.where(is_last, last, full)
    least = np.maximum(1, pixels // ratio - (0 if ratio == 1 else 64)).astype(np.uint64)
    # Codecs grow data that does not compress, and JPEG brings tables along.
    most = page.directory.file.size if page.in_rows else 2 * full + (1 << 16)
    wrong = ((page.counts < least) | (page.counts > most)) & ~absent
    at = int(wrong.argmax())
    needed = f"{least[at]:,} to {most:,} bytes of {codec} for {pixels[at]:,} bytes of pixels"
    found = f"{page.counts[at]:,} bytes"
    _expect(not wrong.any(), page.name, f"{needed} in {what} {at:,} of level {level}", found)


def _is_level(base: _Page, page: _Page, is_sub_ifd: bool) -> bool:
    """Whether a page shows the image of `base`, smaller by the same factor in both directions."""
    marked = is_sub_ifd or bool(page.subfile & 1) or (base.tiled and page.tiled)
    colours = {base.photometric, page.photometric}
    alike = (page.samples, page.dtype) == (base.samples, base.dtype)
    alike = alike and (len(colours) == 1 or colours == {2, 6}) and not page.subfile & 4
    sizes = (page.height, page.width), (base.height, base.width)
    smaller = sizes[0] != sizes[1] and page.height <= base.height and page.width <= base.width
    # One pixel of rounding in either size.
    skew = abs(page.height * base.width - page.width * base.height)
    return marked and alike and smaller and skew <= base.width + base.height


def _tiff_levels(file: _File) -> tuple[list[_Page], int]:
    """The pages of the pyramid, largest first, all checked; and the number of other pages."""
    chain = _walk_tiff(file)
    first = next(chain)
    base = _parse_page(first)
    _check_segments(base, 0)
    offsets = first.array("sub_ifds", MAX_SUB_IFDS)
    below = [] if offsets is None else [int(offset) for offset in offsets.flat]
    found = [(_read_directory(file, first.order, first.big, offset), True) for offset in below]
    found += [(directory, False) for directory in chain]
    levels: dict[tuple[int, int], _Page] = {}
    others = 0
    for directory, is_sub_ifd in found:
        try:
            page = _parse_page(directory)
        except SourceError:  # a thumbnail or label in a form that we do not read
            others += 1
            continue
        size = (page.height, page.width)
        twin = size == (base.height, base.width) and page.samples == base.samples
        twin = twin and page.dtype == base.dtype and not page.subfile & 5
        again = f"a stack (a second page of {size[0]} x {size[1]} px); split it, or pass an array"
        _expect(not twin, file.name, "one image, with smaller pages as its levels", again)
        if _is_level(base, page, is_sub_ifd) and size not in levels:
            levels[size] = page
        else:
            others += 1
    pages = [base, *(levels[size] for size in sorted(levels, reverse=True))]
    for level, page in enumerate(pages):
        if level:
            _check_segments(page, level)
        tables = page.directory.array("jpeg_tables", 1 << 16)
        page.jpeg_tables = None if tables is None else tables.tobytes()
    return pages, others


# Pixels of TIFF files


class _TileCache:
    """Decoded tiles, the last used kept within a byte budget; none is decoded twice at a time."""

    def __init__(self, budget: int) -> None:
        self._budget, self._bytes = budget, 0
        self._lock = threading.Lock()
        self._tiles: OrderedDict[tuple[int, int], Future[Array]] = OrderedDict()

    def get(self, key: tuple[int, int], decode: Callable[[], Array], keep: bool) -> Array:
        """The tile of `key`, decoded if it is not here; kept if other windows will want it too."""
        with self._lock:
            future = self._tiles.get(key)
            mine = future is None
            if future is not None:
                self._tiles.move_to_end(key)
            elif keep:
                future = self._tiles[key] = Future()
        if future is None:
            return decode()
        if not mine:
            return future.result()
        try:
            tile = decode()
        except BaseException as error:
            with self._lock:
                del self._tiles[key]
            future.set_exception(error)
            raise
        with self._lock:
            future.set_result(tile)
            self._bytes += tile.nbytes
            for old in list(self._tiles):
                if self._bytes <= self._budget:
                    break
                # The newest stays, whatever its size: a strip of the whole image is met again.
                if old != key and self._tiles[old].done():
                    self._bytes -= self._tiles.pop(old).result().nbytes
        return tile


class _TiffSource(ImageSource):
    """TIFF and BigTIFF: tiles or strips, interleaved or planar, with pyramid levels."""

    def __init__(self, path: str) -> None:
        self.name = path
        self._file = _File(path)
        self._cache = _TileCache(CACHE_BYTES)
        self._pages, others = _tiff_levels(self._file)
        base = self._pages[0]
        self._palette = _palette(base) if base.photometric == 3 else None
        sizes = [(page.height, page.width) for page in self._pages]
        self._set_size(sizes, 3 if base.photometric == 3 else base.samples, base.dtype)
        self.block = (1, self.width) if base.in_rows else (base.rows, base.columns)
        self.metadata = {
            "format": "tiff",
            "compression": _COMPRESSIONS[base.compression][0],
            "photometric": _PHOTOMETRIC[base.photometric],
            **({"other_pages": others} if others else {}),
            **_tiff_metadata(base.directory),
        }

    @property
    def bytes_read(self) -> int:
        return self._file.bytes_read

    def close(self) -> None:
        super().close()
        self._file.close()
        self._cache = _TileCache(0)

    def _read(self, window: Window, level: int) -> Array:
        self._file.check_unchanged()
        page = self._pages[level]
        if page.in_rows:
            layout = (page.grid[0], page.width, page.plane_samples)
            place = partial(_strip_row, page)
            out = _read_rows(self._file, place, layout, page.dtype, window)
        else:
            out = self._read_tiles(page, level, window)
        if self._palette is not None:
            return self._palette[:, out[0, :, :, 0]]
        bands = _bands_first(out)
        if page.dtype.kind == "b":
            bands = bands * np.uint8(255)
        bands = bands.astype(self.dtype, copy=False)
        return ~bands if page.photometric == 0 and self.dtype.kind == "u" else bands

    def _read_tiles(self, page: _Page, level: int, window: Window) -> Array:
        top, left, height, width = window
        bottom, right = top + height, left + width
        planes, down, across = page.grid
        out = np.empty((planes, height, width, page.plane_samples), page.dtype.newbyteorder("="))
        for plane in range(planes):
            for row in range(top // page.rows, -(-bottom // page.rows)):
                for column in range(left // page.columns, -(-right // page.columns)):
                    y, x = row * page.rows, column * page.columns  # of the tile in the image
                    y0, y1 = max(top, y), min(bottom, y + page.rows)
                    x0, x1 = max(left, x), min(right, x + page.columns)
                    rest_y, rest_x = (
                        min(page.rows, page.height - y),
                        min(page.columns, page.width - x),
                    )
                    index = (plane * down + row) * across + column
                    decode = partial(self._tile, page, level, index)
                    is_part = (y1 - y0, x1 - x0) != (rest_y, rest_x)
                    tile = self._cache.get((level, index), decode, keep=is_part)
                    out[plane, y0 - top : y1 - top, x0 - left : x1 - left] = tile[
                        y0 - y : y1 - y, x0 - x : x1 - x
                    ]
        return out

    def _tile(self, page: _Page, level: int, index: int) -> Array:
        """One decoded tile or strip, `[rows, columns, samples]`, native byte order."""
        offset, count = int(page.offsets[index]), int(page.counts[index])
        _, down, across = page.grid
        row, column = divmod(index % (down * across), across)
        # What of it lies in the image: strips end there, tiles are filled up.
        rest = (
            min(page.rows, page.height - row * page.rows),
            min(page.columns, page.width - column * page.columns),
        )
        if not count:
            return np.full((*rest, page.plane_samples), page.fill, page.dtype.newbyteorder("="))
        data = self._file.pread(offset, count)
        shape = (page.rows, page.columns) if page.tiled else rest
        jfif = False
        try:
            if page.compression == _JPEG:
                shape = _jpeg_frame(data, shape, rest)
                jfif = data[6:10] == b"JFIF"
            return _decoder(*_codec(page), *shape, jfif)(data, page.jpeg_tables)
        except MemoryError:
            raise
        except Exception as error:
            what = f"{'tile' if page.tiled else 'strip'} {index} (row {row}, column {column})"
            where = f"{count:,} bytes at byte {offset:,}"
            raise SourceError(
                f"{self.name}: expected {what} of level {level} in {where}, "
                f"found damaged data ({_reason(error)})."
            ) from error


def _strip_row(page: _Page, plane: int, row: int) -> tuple[int, int]:
    """Byte offset of an uncompressed row, and the rows left in its strip."""
    strip, inside = divmod(row, page.rows)
    offset = int(page.offsets[plane * page.grid[1] + strip])
    return offset + inside * page.segment_bytes(1), page.rows - inside


def _palette(page: _Page) -> Array:
    """Colour map, uint8 `[3, 256]`."""
    values = page.directory.array("palette", 3 * 256)
    whole = values is not None and values.dtype.kind == "u" and values.shape == (3 * 256,)
    _expect(whole, page.name, "a palette of 3 x 256 numbers", "another")
    colours = np.asarray(values).astype(np.uint16).reshape(3, 256)
    # Some writers store 8-bit colours in the 16-bit fields.
    return (colours >> (8 if colours.max() > 255 else 0)).astype(np.uint8)


def _jpeg_frame(data: bytes, most: tuple[int, int], least: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns that a JPEG stream claims, before it is decoded.

    A stream that is cut off or overwritten decodes to grey without an error, so it must also end
    with the end marker.
    """
    if not data.startswith(b"\xff\xd8") or not data.rstrip(b"\0").endswith(b"\xff\xd9"):
        raise ValueError("JPEG without a start or an end marker")
    at = 2
    while at + 9 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            rows, columns = struct.unpack(">HH", data[at + 5 : at + 9])
            if not (least[0] <= rows <= most[0] and least[1] <= columns <= most[1]):
                raise ValueError(f"JPEG of {rows} x {columns} px instead of {most[0]} x {most[1]}")
            return rows, columns
        if marker == 0xFF:  # a fill byte
            at += 1
        elif marker == 0x01 or 0xD0 <= marker <= 0xD7:  # without a length
            at += 2
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    raise ValueError("JPEG without a frame header")


def _codec(page: _Page) -> tuple[Any, ...]:
    """What `_decoder` needs to know of a page; a separate plane is a grey image."""
    kind = {"b": 1, "u": 1, "i": 2, "f": 3}[page.dtype.kind]
    photometric, extra = (1, 0) if page.planar else (page.photometric, page.extra_samples)
    codec = (page.compression, photometric, page.predictor, page.fill_order)
    return page.directory.order, *codec, page.bits, kind, page.plane_samples, extra


@lru_cache(maxsize=256)
def _decoder(
    order: str,
    compression: int,
    photometric: int,
    predictor: int,
    fill_order: int,
    bits: int,
    kind: int,
    samples: int,
    extra: int,
    rows: int,
    columns: int,
    jfif: bool,
) -> Callable[[bytes, bytes | None], Array]:
    """tifffile's decoder for one tile or strip, seen as the only strip of a small TIFF.

    tifffile gets a header that is written here from checked numbers, never the header of the file.
    """
    import tifffile

    start = b"\xff\xd8\xff\xe0\0\x10JFIF\0\0" if jfif else bytes(12)  # tifffile looks for JFIF
    tags = [(256, columns), (257, rows), (258, bits), (259, compression), (262, photometric)]
    tags += [(266, fill_order), (273, 8), (277, samples), (278, rows), (279, len(start))]
    tags += [(284, 1), (317, predictor), *([(338, 0)] if extra else []), (339, kind)]
    header = struct.pack(order + "2sHI", b"II" if order == "<" else b"MM", 42, 8 + len(start))
    body = b"".join(struct.pack(order + "HHII", tag, 4, 1, value) for tag, value in tags)
    directory = struct.pack(order + "H", len(tags)) + body + bytes(4)
    with tifffile.TiffFile(io.BytesIO(header + start + directory)) as small:
        decode = small.pages[0].decode

    def decode_segment(data: bytes, jpeg_tables: bytes | None) -> Array:
        tile: Array = decode(data, 0, jpegtables=jpeg_tables)[0][0]
        return tile

    return decode_segment


# Metadata of TIFF files


def _tiff_metadata(directory: _Directory) -> dict[str, Any]:
    """Georeference, microns per pixel, nodata, orientation: whatever the first page tells."""
    name, description = directory.file.name, directory.text("description")
    files = set(re.findall(r'FileName="([^"]*)"', description)) if "<OME" in description else set()
    one = "an OME-TIFF that is complete in itself"
    _expect(len(files) < 2, name, one, f"references to {len(files)} files")
    found: dict[str, Any] = {
        "orientation": directory.number("orientation", 1),
        "nodata": _json_number(directory.text("nodata").strip()),
        "mpp": _microns_per_pixel(directory, description),
        "transform": _geo_transform(directory) or _world_file(name),
        "crs": _geo_crs(directory),
    }
    if found["orientation"] == 1:
        found["orientation"] = None
    return {key: value for key, value in found.items() if value is not None}


def _json_number(text: str) -> float | str | None:
    """A finite number as a number, other text as it is, nothing as None."""
    try:
        value = float(text)
    except ValueError:
        return text or None
    return value if math.isfinite(value) else text


def _microns_per_pixel(directory: _Directory, description: str) -> list[float] | None:
    """[y, x]: from OME-XML, from Aperio's text, or from resolution tags finer than 10 microns.

    Coarser resolution tags tell how a page prints (72 dpi is 353 microns), not how large it is.
    """
    units = {"µm": 1.0, "um": 1.0, "&#181;m": 1.0, "nm": 1e-3, "mm": 1e3, "cm": 1e4}
    sizes = []
    for axis in "YX":
        size = re.search(rf'PhysicalSize{axis}="([0-9.eE+-]+)"', description)
        unit = re.search(rf'PhysicalSize{axis}Unit="([^"]+)"', description)
        scale = units.get(unit.group(1) if unit else "um")
        if size and scale:
            sizes.append(float(size.group(1)) * scale)
    aperio = re.search(r"\bMPP\s*=\s*([0-9.]+)", description)
    if len(sizes) < 2 and aperio:
        sizes = [float(aperio.group(1))] * 2
    elif len(sizes) < 2:
        microns = {2: 25_400.0, 3: 10_000.0}.get(directory.number("resolution_unit", 2), math.inf)
        for tag in ("y_resolution", "x_resolution"):
            ratio = directory.array(tag, 1)
            if ratio is not None and ratio.shape == (1, 2) and ratio.all():
                sizes.append(microns * float(ratio[0, 1]) / float(ratio[0, 0]))
        sizes = sizes if all(size < 10 for size in sizes) else []
    return sizes if len(sizes) == 2 and all(0 < size < math.inf for size in sizes) else None


def _geo_transform(directory: _Directory) -> list[float] | None:
    """Six affine numbers, for the upper left corner of pixel (0, 0)."""
    matrix, scale = directory.array("geo_matrix", 16), directory.array("geo_scale", 3)
    tiepoint = directory.array("geo_tiepoint", 1 << 16)
    if matrix is not None and len(matrix) == 16:
        a, b, c, d, e, f = (float(matrix[i]) for i in (0, 1, 3, 4, 5, 7))
    elif scale is not None and len(scale) >= 2 and tiepoint is not None and len(tiepoint) >= 6:
        column, row, _, x, y = (float(value) for value in tiepoint[:5])
        a, b, d, e = float(scale[0]), 0.0, 0.0, -float(scale[1])
        c, f = x - column * a, y - row * e
    else:
        if tiepoint is not None:
            lost = "ground control points are left out; only an affine georeference is kept"
            warnings.warn(f"{directory.file.name}: {lost}.", stacklevel=2)
        return None
    if _geo_keys(directory).get(1025) == 2:  # the numbers are for pixel centres
        c, f = c - (a + b) / 2, f - (d + e) / 2
    return [a, b, c, d, e, f]


def _geo_keys(directory: _Directory) -> dict[int, int]:
    """GeoKeys whose value is a short number."""
    values = directory.array("geo_keys", 1 << 14)
    if values is None or values.dtype.itemsize != 2:
        return {}
    table = values[4 : len(values) // 4 * 4].reshape(-1, 4)
    return {int(key): int(value) for key, place, _, value in table if place == 0}


def _geo_crs(directory: _Directory) -> str | None:
    """An EPSG code, or WKT by rasterio where the file defines its own coordinate system."""
    keys = _geo_keys(directory)
    model = keys.get(1024)  # 1 projected, 2 geographic, 3 geocentric
    if model not in (1, 2, 3):
        return None
    code, vertical = keys.get(3072 if model == 1 else 2048, 32767), keys.get(4096)
    if 1024 <= code < 32767 and vertical != 32767:
        return f"EPSG:{code}" + (f"+{vertical}" if vertical else "")
    try:
        import rasterio
    except ImportError:
        lost = "its coordinate system has no EPSG code and is left out"
        hint = "pip install 'xt-kernels[geo]' to keep it"
        warnings.warn(f"{directory.file.name}: {lost}; {hint}.", stacklevel=2)
        return None
    with rasterio.open(directory.file.name) as dataset:
        return str(dataset.crs.to_wkt()) if dataset.crs else None


def _world_file(path: str) -> list[float] | None:
    """The transform of a world file beside an image (`.tfw`, `.pgw`, `.jgw`, `.wld`), if any."""
    suffix = Path(path).suffix
    for end in (f".{suffix[1:2]}{suffix[-1:]}w", f"{suffix}w", ".wld"):
        beside = Path(path).with_suffix(end)
        if suffix and beside.is_file() and beside.stat().st_size < 4096:
            words = beside.read_text(errors="replace").split()[:6]
            try:
                a, d, b, e, c, f = (float(word) for word in words)
            except ValueError as error:
                raise SourceError(f"{beside}: expected six numbers, found {words}.") from error
            # World files place the centre of pixel (0, 0).
            return [a, b, c - (a + b) / 2, d, e, f - (d + e) / 2]
    return None


# PNG and JPEG

# Pillow mode -> bands; other modes are converted to RGB.
_PILLOW_BANDS = {"1": 1, "L": 1, "I;16": 1, "LA": 2, "RGB": 3, "RGBA": 4}


class _PillowSource(ImageSource):
    """PNG or JPEG. The first read decodes the whole image and keeps it: no random access."""

    def __init__(self, path: str) -> None:
        self.name = path
        self._lock = threading.Lock()
        self._pixels: Array | None = None
        self._bytes_read = 0
        with _File(path) as file:
            size, head = file.size, file.pread(0, min(26, file.size))
        self._is_png = head[:4] == b"\x89PNG"
        # Pillow would make 8 bits of a colour PNG of 16, so imagecodecs decodes that.
        self._deep_colour = self._is_png and head[24:25] == b"\x10" and head[25:] != b"\0"
        with self._open() as image:
            (width, height), mode = image.size, image.mode
            self._turn = 1 if self._is_png else image.getexif().get(0x0112, 1)
            self._alpha = mode == "PA" or (mode == "P" and "transparency" in image.info)
        found = f"{height:,} x {width:,} px; convert it to a tiled TIFF"
        limit = f"at most {MAX_PILLOW_PIXELS:,} px in a file that is decoded whole"
        _expect(height * width <= MAX_PILLOW_PIXELS, path, limit, found)
        # The densest a stream can be: deflate 1032 to 1 at 1 bit per pixel, JPEG 2 bits a block.
        room = size * (1032 * 8 if self._is_png else 2048)
        found = f"a claim of {height:,} x {width:,}"
        _expect(height * width <= room, path, f"at most {room:,} px in {size:,} bytes", found)
        bands = 4 if self._alpha else _PILLOW_BANDS.get(mode, 3)
        if self._deep_colour:
            bands = {2: 3, 4: 2, 6: 4}[head[25]]
        deep = mode == "I;16" or self._deep_colour
        shape = (width, height) if self._turn in (5, 6, 7, 8) else (height, width)
        self._set_size([shape], bands, np.dtype(np.uint16 if deep else np.uint8))
        self.block = (self.height, self.width)
        kinds = ("png", "deflate") if self._is_png else ("jpeg", "jpeg")
        self.metadata = dict(zip(("format", "compression"), kinds, strict=True))
        transform = _world_file(path)
        if transform:
            self.metadata["transform"] = transform

    def _open(self) -> Any:
        """The Pillow image; its class is named, to pass by Pillow's own, lower pixel limit."""
        from PIL import JpegImagePlugin, PngImagePlugin

        if self._is_png:
            return PngImagePlugin.PngImageFile(self.name)
        return JpegImagePlugin.JpegImageFile(self.name)

    @property
    def bytes_read(self) -> int:
        return self._bytes_read

    def _read(self, window: Window, level: int) -> Array:
        with self._lock:
            if self._pixels is None:
                self._pixels = self._decode()
            pixels = self._pixels
        top, left, height, width = window
        return np.moveaxis(pixels[top : top + height, left : left + width].copy(), -1, 0)

    def _decode(self) -> Array:
        """The whole image, `[H, W, bands]`."""
        if self._deep_colour:
            import imagecodecs

            pixels = np.asarray(imagecodecs.png_decode(Path(self.name).read_bytes()))
        else:
            from PIL import ImageOps

            with self._open() as image:
                _expect(
                    image.size[0] * image.size[1] == self.height * self.width,
                    self.name,
                    f"{self.height} x {self.width} px as when it was opened",
                    f"{image.size[1]} x {image.size[0]}",
                )
                image.load()
                turned = ImageOps.exif_transpose(image) if self._turn != 1 else image
                if turned.mode == "1":
                    turned = turned.convert("L")
                elif turned.mode not in _PILLOW_BANDS:
                    turned = turned.convert("RGBA" if self._alpha else "RGB")
                pixels = np.asarray(turned)
        pixels = pixels.reshape(*pixels.shape[:2], -1)
        same = pixels.shape == (self.height, self.width, self.bands) and pixels.dtype == self.dtype
        _expect(same, self.name, repr(self), f"{pixels.dtype} {list(pixels.shape)} when decoded")
        self._bytes_read = os.stat(self.name).st_size
        return pixels

    def close(self) -> None:
        super().close()
        self._pixels = None


# rasterio and openslide


class _HandleSource(ImageSource):
    """A file behind a library whose handles belong to one thread: each thread opens its own."""

    def __init__(self, path: str, package: str, extra: str) -> None:
        self.name = path
        self._lock = threading.Lock()
        self._bytes_read = 0
        self._handles: dict[tuple[int, int, int], Any] = {}
        _File(path).close()  # a missing, empty or unreadable file gets our words
        try:
            __import__(package)
        except ImportError as error:
            hint = f"pip install 'xt-kernels[{extra}]'"
            raise SourceError(
                f"{path}: expected {package} to read it ({hint}), found none."
            ) from error

    @abstractmethod
    def _open(self, level: int) -> Any: ...

    def _handle(self, level: int) -> Any:
        # With the process id, since a forked child must not share file positions.
        key = (os.getpid(), threading.get_ident(), level)
        with self._lock:
            handle = self._handles.get(key)
        if handle is None:
            handle = self._open(level)
            with self._lock:
                self._handles[key] = handle
        return handle

    def _count(self, size: int) -> None:
        with self._lock:
            self._bytes_read += size

    @property
    def bytes_read(self) -> int:
        return self._bytes_read

    def close(self) -> None:
        super().close()
        with self._lock:
            for handle in self._handles.values():
                handle.close()
            self._handles.clear()


class _RasterioSource(_HandleSource):
    """Whatever GDAL reads; overviews are levels. Palette images keep their indices."""

    def __init__(self, path: str) -> None:
        super().__init__(path, "rasterio", "geo")
        data = self._handle(0)
        parts = f"{len(data.subdatasets)} images: {', '.join(data.subdatasets[:4])}"
        _expect(data.count, path, "one image", parts)
        plain = len(set(data.dtypes)) == 1 and not data.dtypes[0].startswith("complex")
        _expect(plain, path, f"one data type of {_DTYPES}", ", ".join(data.dtypes))
        levels = range(1, len(data.overviews(1)) + 1)
        sizes = [data.shape, *(self._handle(level).shape for level in levels)]
        self._set_size(sizes, data.count, np.dtype(data.dtypes[0]))
        self.block = (int(data.block_shapes[0][0]), int(data.block_shapes[0][1]))
        codec = data.compression.value.lower() if data.compression else "none"
        self.metadata = {"format": data.driver.lower(), "compression": codec}
        if data.crs:
            code = data.crs.to_epsg()
            self.metadata["crs"] = f"EPSG:{code}" if code else data.crs.to_wkt()
        if not data.transform.is_identity:
            self.metadata["transform"] = [float(value) for value in data.transform[:6]]
        if data.nodata is not None:
            self.metadata["nodata"] = _json_number(str(data.nodata))

    def _open(self, level: int) -> Any:
        import rasterio

        return rasterio.open(self.name, **({"overview_level": level - 1} if level else {}))

    def _read(self, window: Window, level: int) -> Array:
        from rasterio.windows import Window as RasterioWindow

        top, left, height, width = window
        pixels = self._handle(level).read(window=RasterioWindow(left, top, width, height))
        self._count(pixels.nbytes)
        return np.asarray(pixels)


class _OpenSlideSource(_HandleSource):
    """A whole-slide image: RGB uint8, transparent places filled with the slide's background colour.

    openslide places windows of lower levels by whole pixels of level 0, so where a level is not
    smaller by a whole factor, they shift by less than one of its pixels.
    """

    def __init__(self, path: str) -> None:
        super().__init__(path, "openslide", "wsi")
        slide = self._handle(0)
        facts = dict(slide.properties)
        sizes = [(height, width) for width, height in slide.level_dimensions]
        self._set_size(sizes, 3, np.dtype(np.uint8))
        self._downsamples = tuple(slide.level_downsamples)
        colour = bytes.fromhex(facts.get("openslide.background-color", "FFFFFF"))
        self._background = np.frombuffer(colour, np.uint8).astype(np.uint16)
        rows = facts.get("openslide.level[0].tile-height", 1)
        columns = facts.get("openslide.level[0].tile-width", self.width)
        self.block = (int(rows), int(columns))
        vendor = facts.get("openslide.vendor", "unknown")
        self.metadata = {"format": f"openslide {vendor}", "compression": "unknown"}
        if "openslide.mpp-x" in facts and "openslide.mpp-y" in facts:
            self.metadata["mpp"] = [float(facts[f"openslide.mpp-{axis}"]) for axis in "yx"]

    def _open(self, level: int) -> Any:
        import openslide

        return openslide.OpenSlide(self.name)

    def _read(self, window: Window, level: int) -> Array:
        top, left, height, width = window
        place = tuple(round(start * self._downsamples[level]) for start in (left, top))
        rgba = np.asarray(self._handle(0).read_region(place, level, (width, height)))
        self._count(3 * height * width)
        rgb, alpha = rgba[..., :3], rgba[..., 3:].astype(np.uint16)
        if alpha.min() < 255:
            rgb = ((rgb * alpha + self._background * (255 - alpha) + 127) // 255).astype(np.uint8)
        return np.moveaxis(np.array(rgb), -1, 0)


_BACKENDS: dict[str, Callable[..., ImageSource]] = {
    "tiff": _TiffSource,
    "pillow": _PillowSource,
    "npy": _NpySource,
    "zarr": _open_zarr,
    "rasterio": _RasterioSource,
    "openslide": _OpenSlideSource,
}
