"""Image files and arrays behind one reader: a size, a data type, and windows of pixels.

`open_image` is the only place in the project that opens image files. What it returns reads any window
of any pyramid level without touching the rest of the image, from any number of threads at once.

A file is not trusted. Headers are judged before anything is decoded: sizes, the number of tiles, every
offset and byte count, and how much the stored bytes could possibly expand to. Whatever is wrong ends
in one `SourceError`; a damaged tile raises and never turns into zeros.

TIFF directories are walked here, because a reader that believes a header can be made to hang or to fill
the memory. Compressed tiles and strips are then fetched with `pread` and decoded one by one by tifffile
and imagecodecs, without a lock. 4096 x 4096 x 3 uint8, 512 px tiles read one by one, two cores:

    Mpx/s, threads                  JPEG, 1    2      deflate, 1    2
    pread + TiffPage.decode            277   518             146   274
    zarr.open(page.aszarr())           226   188             127   115
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
from functools import lru_cache
from operator import index as as_int
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

__all__ = ["ImageSource", "SourceError", "open_image"]

# A file may ask for this much and no more. Decoded bytes of one tile, strip or chunk:
MAX_SEGMENT_BYTES = 512 << 20
# Tiles or strips of one level: their offsets and counts take 32 MiB; 137 Gpx at 256 px tiles.
MAX_SEGMENTS = 1 << 21
MAX_PAGES = 10_000
MAX_TAGS = 4096
MAX_SUB_IFDS = 64
# PNG and JPEG have no random access and are decoded whole.
MAX_PILLOW_PIXELS = 1_000_000_000
# Decoded tiles kept per source. A walk in 256 px regions over 512 px tiles meets each tile four times, twice
# in a row of regions and twice in the next: without a cache 77 Mpx/s of JPEG, with one that holds a row of
# tiles (48 MiB is 29,000 px of 3-band 512 px tiles) 250 Mpx/s.
CACHE_BYTES = 48 << 20

_KINDS = {"b": "bool", "u": "unsigned", "i": "signed", "f": "float"}
_DTYPES = "bool, 8 to 64-bit integers, or 16 to 64-bit floats"
_WSI_SUFFIXES = {".ndpi", ".mrxs", ".vms", ".vmu", ".scn", ".bif", ".svslide", ".czi"}
_GEO_SUFFIXES = {".jp2", ".j2k", ".img", ".ntf", ".nitf", ".ecw", ".sid", ".dat", ".hdf", ".nc"}
_GEO_SUFFIXES |= {".h5", ".bil", ".bsq", ".bip", ".webp", ".gpkg", ".kea", ".grd", ".asc"}
_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


class SourceError(ValueError):
    """A file or array that cannot be read as an image; one sentence with name, expected and found."""


class ImageSource(ABC):
    """An image of any size, read by windows. Thread-safe; pickles; a context manager.

    Attributes:
        name: the path, or "array".
        height, width: pixels of level 0.
        bands: number of bands.
        dtype: as stored, in native byte order. 1-bit images and bool arrays read as uint8, 0 or 255.
        level_sizes: (height, width) of each pyramid level in pixels, full size first.
        block: (rows, columns) of the natural storage unit of level 0: a tile, a strip, a chunk;
            (1, width) where rows lie one after the other.
        metadata: JSON-able facts: "format", "compression", and where the file has them "crs" ("EPSG:32633"
            or WKT), "transform" (a, b, c, d, e, f with x = a column + b row + c, y = d column + e row + f),
            "mpp" ([y, x], microns per pixel), "nodata".
    """

    name: str = "array"
    height: int
    width: int
    bands: int
    dtype: np.dtype[Any]
    level_sizes: tuple[tuple[int, int], ...]
    block: tuple[int, int]
    metadata: dict[str, Any]
    _closed = False
    _recipe: tuple[Any, str | None, str | None]  # what open_image made this from

    def read(
        self, top: int, left: int, height: int, width: int, level: int = 0
    ) -> np.ndarray[Any, Any]:
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
        if not 0 <= level < len(self.level_sizes):
            raise ValueError(
                f"read: level must be in 0..{len(self.level_sizes) - 1} for {self.name}, got {level}."
            )
        full = self.level_sizes[level]
        for (start_name, start), (size_name, size), limit in zip(
            (("top", top), ("left", left)),
            (("height", height), ("width", width)),
            full,
            strict=True,
        ):
            if start < 0 or size < 1 or start + size > limit:
                raise ValueError(
                    f"read: {start_name} >= 0, {size_name} >= 1 and {start_name} + {size_name} <= {limit} "
                    f"must hold for level {level} of {self.name}, got {start_name} {start}, "
                    f"{size_name} {size}."
                )
        if self._closed:
            raise SourceError(f"{self.name}: the source is closed; open it again to read.")
        try:
            return self._read(top, left, height, width, level)
        except (SourceError, MemoryError):
            raise
        except Exception as error:
            raise SourceError(
                f"{self.name}: the window of {height} x {width} px at ({top}, {left}) of level {level} "
                f"cannot be read: {_reason(error)}"
            ) from error

    @property
    def bytes_read(self) -> int:
        """Bytes fetched from the file so far, as stored; bytes of the windows where that is unknown."""
        return 0

    def close(self) -> None:
        """Let the file go; reading afterwards raises `SourceError`. Closing twice is fine."""
        self._closed = True

    @abstractmethod
    def _read(
        self, top: int, left: int, height: int, width: int, level: int
    ) -> np.ndarray[Any, Any]: ...

    def _set_size(self, sizes: Sequence[tuple[int, int]], bands: int, dtype: np.dtype[Any]) -> None:
        """Check and keep sizes in pixels, number of bands and stored dtype."""
        if dtype.kind not in _KINDS or dtype.itemsize > 8:
            raise SourceError(f"{self.name}: the data type must be {_DTYPES}, got {dtype}.")
        if bands < 1 or min(min(size) for size in sizes) < 1:
            raise SourceError(
                f"{self.name}: an image needs at least one row, column and band, "
                f"got {sizes[0][0]} x {sizes[0][1]} px, {bands} bands."
            )
        self.level_sizes = tuple((int(height), int(width)) for height, width in sizes)
        (self.height, self.width), self.bands = self.level_sizes[0], int(bands)
        self.dtype = np.dtype(np.uint8) if dtype.kind == "b" else dtype.newbyteorder("=")

    def __repr__(self) -> str:
        return (
            f"<{type(self).__name__.strip('_')} {self.name}: {self.height} x {self.width} px, "
            f"{self.bands} bands, {self.dtype}>"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, self._recipe


def open_image(image: Any, *, backend: str | None = None, axes: str | None = None) -> ImageSource:
    """Open a file or wrap an array; the header is checked, no pixel is decoded.

    Files are recognised by their first bytes, not by their name: TIFF and BigTIFF (SVS too), PNG, JPEG, `.npy`,
    and folders with zarr metadata. Slides that need openslide (`.ndpi`, `.mrxs`, `.scn`, ...) and formats that
    need rasterio (`.jp2`, `.img`, ...) are recognised by suffix. A `.vrt` refers to other files and is opened
    only with `backend="rasterio"`.

    TIFF: page 0 is the image. Its SubIFDs, pages marked as reduced, and (in tiled files) tiled pages that are
    smaller by the same factor in both directions are pyramid levels; other smaller pages (labels,
    thumbnails, masks) are left out and counted in `metadata["other_pages"]`. A second page of full size
    makes the file a stack, which is refused. Palettes become RGB, JPEG YCbCr becomes RGB, 1-bit becomes
    0/255, white-is-zero is inverted; CMYK, CIELab, sensor mosaics, complex numbers and 2 to 15-bit samples
    other than 8 are refused. Tiles that a sparse file leaves out read as its nodata value, and are refused where
    it names none. The stored grid is kept: an Orientation tag only shows up in `metadata["orientation"]`.

    PNG, JPEG: decoded whole on the first read and kept, since they have no random access; refused above
    1 Gpx. Palette and CMYK become RGB; EXIF orientation of JPEG is applied; alpha stays as the last band.

    Arrays of two axes are `[H, W]`. With three axes, an axis of at most 16 at the end and more than 16 at the
    start means `[H, W, C]`, the opposite `[C, H, W]`; anything else is ambiguous and needs `axes`. Torch
    tensors are `[C, H, W]`. Names in zarr metadata count first. Missing zarr chunks read as the fill value, as
    zarr defines it.

    Args:
        image: a path, a numpy array or memory map, a zarr array or group, a CPU tensor, or an `ImageSource`,
            which is returned as it is.
        backend: "tiff", "pillow", "npy", "zarr", "rasterio", "openslide", or None to choose by content.
        axes: "HW", "HWC" or "CHW" for arrays, `.npy` and zarr.

    Raises:
        SourceError: not a readable image; names the file, what was expected and what was found.
    """
    if isinstance(image, ImageSource):
        return image
    if axes not in (None, "HW", "HWC", "CHW"):
        raise SourceError(f'open_image: axes must be "HW", "HWC" or "CHW", got {axes!r}.')
    if backend is not None and backend not in _BACKENDS:
        raise SourceError(
            f"open_image: backend must be one of {', '.join(_BACKENDS)}, got {backend!r}."
        )
    if not isinstance(image, str | os.PathLike):
        source = _open_array(image, axes)
        source._recipe = (image, backend, axes)
        return source
    path = os.fspath(image)
    backend = backend or _detect(path)
    try:
        if backend in ("npy", "zarr"):
            source = _BACKENDS[backend](path, axes)
        elif axes is not None:
            raise SourceError(
                f"{path}: axes is for arrays, .npy and zarr, not for {backend} files."
            )
        else:
            source = _BACKENDS[backend](path)
    except (SourceError, MemoryError):
        raise
    except Exception as error:
        raise SourceError(f"{path}: cannot be opened as {backend}: {_reason(error)}") from error
    source._recipe = (os.path.abspath(path), backend, axes)
    return source


def _reopen(image: Any, backend: str | None, axes: str | None) -> ImageSource:
    return open_image(image, backend=backend, axes=axes)


def _reason(error: BaseException) -> str:
    """What a library said, as the end of a sentence."""
    text = " ".join(str(error).split()) or type(error).__name__
    return f"{type(error).__name__}: {text.rstrip('.')[:300]}."


def _detect(path: str) -> str:
    """The backend for a path, by its first bytes, then by its suffix."""
    suffix = Path(path).suffix.lower()
    if os.path.isdir(path):
        if any(os.path.isfile(os.path.join(path, n)) for n in ("zarr.json", ".zarray", ".zgroup")):
            return "zarr"
        raise SourceError(
            f"{path}: expected an image file or a zarr folder, found a folder without zarr."
        )
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
    if suffix == ".vrt":
        raise SourceError(
            f'{path}: a .vrt refers to other files; pass backend="rasterio" to follow them.'
        )
    if suffix in _GEO_SUFFIXES:
        return "rasterio"
    raise SourceError(
        f"{path}: expected TIFF, PNG, JPEG, .npy or zarr (other formats with backend="
        f'"rasterio" or "openslide"), found a file that starts with {head!r}.'
    )


class _File:
    """A regular file, open for reading at any place from any thread; a short read is an error."""

    def __init__(self, path: str) -> None:
        self.name = path
        self.fd = -1
        try:
            status = os.stat(path)
            if not stat.S_ISREG(status.st_mode):
                kind = "a folder" if stat.S_ISDIR(status.st_mode) else "something else"
                raise SourceError(f"{path}: expected a regular file, found {kind}.")
            self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            status = os.fstat(self.fd)
        except (OSError, ValueError) as error:
            if isinstance(error, SourceError):
                raise
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise SourceError(f"{path}: the file cannot be opened: {reason}.") from error
        self.size = status.st_size
        self._modified = status.st_mtime_ns
        self._lock = threading.Lock()
        self.bytes_read = 0
        if not self.size:
            self.close()
            raise SourceError(f"{path}: expected an image, found an empty file (0 bytes).")

    def pread(self, offset: int, count: int) -> bytearray:
        """`count` bytes at byte `offset`."""
        data = bytearray(count)
        self.pread_into(offset, memoryview(data))
        return data

    def pread_into(self, offset: int, buffer: memoryview) -> None:
        """Fill a buffer of bytes from byte `offset` on."""
        wanted, done = len(buffer), 0
        while done < wanted:  # one call moves at most 2 GiB
            got = os.preadv(self.fd, [buffer[done:]], offset + done)
            if not got:
                raise SourceError(
                    f"{self.name}: expected {wanted:,} bytes at byte {offset:,}, "
                    f"found the end of the file after {done:,}."
                )
            done += got
        with self._lock:
            self.bytes_read += wanted

    def check_unchanged(self) -> None:
        """Raise if the file was written to since it was opened."""
        status = os.fstat(self.fd)
        if (status.st_size, status.st_mtime_ns) != (self.size, self._modified):
            raise SourceError(
                f"{self.name}: the file changed while it was open "
                f"({self.size:,} bytes then, {status.st_size:,} now); open it again."
            )

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


# ---------------------------------------------------------------------------------------- arrays


def _axes_to_dims(name: str, shape: tuple[int, ...], axes: str | None) -> str:
    """The axes of an array as a word over "c", "y", "x"; the rule of `open_image`."""
    if axes is None and len(shape) == 2:
        axes = "HW"
    elif axes is None and len(shape) == 3:
        if shape[2] <= 16 < shape[0]:
            axes = "HWC"
        elif shape[0] <= 16 < shape[2]:
            axes = "CHW"
        else:
            raise SourceError(
                f"{name}: it is not clear which axis of shape {list(shape)} holds the bands; "
                f'pass axes="HWC" or axes="CHW".'
            )
    if axes is None or len(axes) != len(shape):
        raise SourceError(
            f"{name}: expected {axes or '[H, W], [H, W, C] or [C, H, W]'}, "
            f"got an array of shape {list(shape)}."
        )
    return axes.translate(str.maketrans("HWC", "yxc"))


def _dims_size(dims: str, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(bands, height, width) of an array."""
    size = dict(zip(dims, shape, strict=True))
    return size.get("c", 1), size["y"], size["x"]


class _ArraySource(ImageSource):
    """Anything that slices like a numpy array: one array per pyramid level, all with the same axes."""

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
        self._set_size([size[1:] for size in sizes], sizes[0][0], np.dtype(levels[0].dtype))
        for level, size in zip(levels, sizes, strict=True):
            if size[0] != self.bands or np.dtype(level.dtype).newbyteorder("=") != np.dtype(
                levels[0].dtype
            ).newbyteorder("="):
                raise SourceError(f"{name}: all levels must have the same bands and data type.")
        self.block = _dims_size(dims, chunks)[1:] if chunks else (1, self.width)
        self._bytes_read = 0
        self._lock = threading.Lock()

    @property
    def bytes_read(self) -> int:
        return self._bytes_read

    def _read(
        self, top: int, left: int, height: int, width: int, level: int
    ) -> np.ndarray[Any, Any]:
        part = {"y": slice(top, top + height), "x": slice(left, left + width), "c": slice(None)}
        stored = np.asarray(self._levels[level][tuple(part.get(dim, 0) for dim in self._dims)])
        kept = [dim for dim in self._dims if dim in part]
        window = np.expand_dims(stored, 0) if "c" not in kept else stored
        kept = kept if "c" in kept else ["c", *kept]
        window = window.transpose([kept.index(dim) for dim in "cyx"])
        with self._lock:
            self._bytes_read += window.nbytes
        if window.dtype.kind == "b":
            return window.astype(np.uint8) * np.uint8(255)
        return window.astype(self.dtype, order="K", copy=True)

    def close(self) -> None:
        super().close()
        self._levels = ()


def _open_array(image: Any, axes: str | None) -> ImageSource:
    """A numpy array, memory map, zarr array or group, or torch tensor."""
    package = type(image).__module__.partition(".")[0]
    if package == "zarr":
        return _zarr_source("zarr", image, axes)
    if package == "torch" and hasattr(image, "detach"):
        if image.device.type != "cpu":
            raise SourceError(
                f"array: a tensor must be on the CPU, got {image.device}; call .cpu()."
            )
        try:
            image = image.detach().numpy()
        except TypeError as error:
            raise SourceError(
                f"array: the data type must be {_DTYPES}, got {image.dtype}."
            ) from error
        axes = axes or ("CHW" if image.ndim == 3 else None)
    if not isinstance(image, np.ndarray):
        raise SourceError(
            f"open_image: expected a path, an array, a zarr array or a CPU tensor, "
            f"got {type(image).__name__}."
        )
    is_map = isinstance(image, np.memmap)
    name = str(image.filename) if is_map and image.filename else "array"  # type: ignore[attr-defined]
    dims = _axes_to_dims(name, image.shape, axes)
    return _NumpySource(name, [image], dims, {"format": "memmap" if is_map else "array"})


class _NumpySource(_ArraySource):
    """An array in memory, or a memory map, which pickles as its file name."""

    def __reduce__(self) -> tuple[Any, ...]:
        image, backend, axes = self._recipe
        # Views of a map keep the map's offset, so only a whole map can be opened again by name.
        if isinstance(image, np.memmap) and type(image.base).__name__ == "mmap" and image.filename:
            order = "C" if image.flags.c_contiguous else "F"
            where = (str(image.filename), image.dtype, "r", image.offset, image.shape, order)
            return _reopen_memmap, (where, backend, axes)
        return _reopen, self._recipe


def _reopen_memmap(where: tuple[Any, ...], backend: str | None, axes: str | None) -> ImageSource:
    try:
        return open_image(np.memmap(*where), backend=backend, axes=axes)
    except (OSError, ValueError) as error:
        raise SourceError(
            f"{where[0]}: the memory map cannot be opened: {_reason(error)}"
        ) from error


def _open_zarr(path: str, axes: str | None) -> ImageSource:
    import zarr

    return _zarr_source(path, zarr.open(path, mode="r"), axes)


def _zarr_source(name: str, node: Any, axes: str | None) -> ImageSource:
    """A zarr array, or a group with OME-Zarr `multiscales`, whose arrays are the levels."""
    dims: str | None = None
    if hasattr(node, "shape"):
        levels = [node]
        names = getattr(node.metadata, "dimension_names", None)
        names = names or node.attrs.get("_ARRAY_DIMENSIONS")
        if names and all(str(n).lower() in ("y", "x", "c", "t", "z", "band") for n in names):
            dims = "".join(str(n).lower()[0] for n in names).replace("b", "c")
    else:
        attributes = dict(node.attrs)
        scales = attributes.get("multiscales") or attributes.get("ome", {}).get("multiscales")
        if not scales:
            found = ", ".join(sorted(key for key, _ in node.arrays())[:8]) or "none"
            raise SourceError(
                f"{name}: expected a zarr array or a group with multiscales; open one of the group's "
                f"arrays instead, found: {found}."
            )
        levels = [node[item["path"]] for item in scales[0]["datasets"]]
        named = [a["name"] if isinstance(a, dict) else a for a in scales[0].get("axes", "tczyx")]
        dims = "".join(named)
    if axes or not dims or not {"y", "x"} <= set(dims) or len(dims) != levels[0].ndim:
        dims = _axes_to_dims(name, levels[0].shape, axes)
    for level in levels:
        if any(n != 1 for d, n in zip(dims, level.shape, strict=True) if d not in "cyx"):
            raise SourceError(
                f"{name}: axes other than c, y, x must have size 1, got {dims} = {list(level.shape)}."
            )
        chunk_bytes = math.prod(level.chunks) * np.dtype(level.dtype).itemsize
        if chunk_bytes > MAX_SEGMENT_BYTES:
            raise SourceError(
                f"{name}: a chunk of {list(level.chunks)} decodes to {chunk_bytes:,} bytes, "
                f"expected at most {MAX_SEGMENT_BYTES:,}."
            )
    metadata = {"format": "zarr", "compression": _zarr_codec(levels[0])}
    return _ArraySource(name, levels, dims, metadata, tuple(levels[0].chunks))


def _zarr_codec(array: Any) -> str:
    return ", ".join(type(codec).__name__ for codec in array.compressors) or "none"


# ----------------------------------------------------------------------------------- rows in files


def _read_rows(
    file: _File,
    place: Callable[[int, int], tuple[int, int]],
    layout: tuple[int, int, int],
    dtype: np.dtype[Any],
    window: tuple[int, int, int, int],
) -> np.ndarray[Any, Any]:
    """A window `[planes, height, width, samples]` of uncompressed rows, fetched without the rest.

    `pread` instead of a memory map: pages of a map count as the process's memory, and a file that shrinks under a
    map kills the process.

    Args:
        place: (plane, row) -> (byte offset of the row, rows that follow it without a gap, itself included).
        layout: (planes, image width, samples per pixel of a plane).
        window: top, left, height, width in pixels.
    """
    planes, full_width, samples = layout
    top, left, height, width = window
    out = np.empty((planes, height, width, samples), dtype)
    column = left * samples * dtype.itemsize
    for plane in range(planes):
        row = 0
        while row < height:
            offset, run = place(plane, top + row)
            count = min(run, height - row) if width == full_width else 1
            target = out[plane, row : row + count]
            file.pread_into(offset + column, memoryview(target.reshape(-1).view(np.uint8)))
            row += count
    return out


def _bands_first(out: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """`[planes, h, w, samples]`, where planes or samples is one -> `[bands, h, w]`, a view."""
    return out[..., 0] if out.shape[0] > 1 else np.moveaxis(out[0], -1, 0)


class _NpySource(ImageSource):
    """A `.npy` file in C order, read row by row."""

    def __init__(self, path: str, axes: str | None) -> None:
        self.name = path
        with open(path, "rb") as stream:
            version = np.lib.format.read_magic(stream)
            read_header = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }.get(version)
            if read_header is None:
                raise SourceError(f"{path}: expected .npy version 1.0 or 2.0, got {version}.")
            shape, fortran, self._stored = read_header(stream)
            self._offset = stream.tell()
        dims = _axes_to_dims(path, shape, axes)
        bands, height, width = _dims_size(dims, shape)
        self._set_size([(height, width)], bands, self._stored)
        self.block = (1, width)
        self.metadata = {"format": "npy", "compression": "none"}
        if fortran and len(shape) > 1 and max(bands, height, width) > 1:
            raise SourceError(
                f"{path}: expected C order, found Fortran order; save np.ascontiguousarray(array)."
            )
        self._file = _File(path)
        claimed = math.prod(shape) * self._stored.itemsize
        if self._offset + claimed > self._file.size:
            self._file.close()
            raise SourceError(
                f"{path}: the header claims {claimed:,} bytes of {list(shape)} {self._stored}, "
                f"found {self._file.size - self._offset:,}."
            )
        self._layout = (bands, width, 1) if dims == "cyx" else (1, width, bands)

    @property
    def bytes_read(self) -> int:
        return self._file.bytes_read

    def _read(
        self, top: int, left: int, height: int, width: int, level: int
    ) -> np.ndarray[Any, Any]:
        self._file.check_unchanged()
        row_bytes = math.prod(self._layout[1:]) * self._stored.itemsize

        def place(plane: int, row: int) -> tuple[int, int]:
            return self._offset + (plane * self.height + row) * row_bytes, self.height - row

        window = (top, left, height, width)
        out = _bands_first(_read_rows(self._file, place, self._layout, self._stored, window))
        if self._stored.kind == "b":
            return (out != 0).astype(np.uint8) * np.uint8(255)
        return out.astype(self.dtype, copy=False)

    def close(self) -> None:
        super().close()
        self._file.close()


# ------------------------------------------------------------------------------------------ TIFF

# Field types of the TIFF 6.0 and BigTIFF specifications -> numpy; rationals are pairs.
_FIELD_TYPES = {
    **{1: "u1", 2: "S1", 3: "u2", 4: "u4", 5: "2u4", 6: "i1", 7: "u1", 8: "i2", 9: "i4"},
    **{10: "2i4", 11: "f4", 12: "f8", 13: "u4", 16: "u8", 17: "i8", 18: "u8"},
}
_TAGS = {
    **{"subfile": 254, "old_subfile": 255, "width": 256, "height": 257, "bits": 258},
    **{"compression": 259, "photometric": 262, "fill_order": 266, "description": 270},
    **{"strip_offsets": 273, "orientation": 274, "samples": 277, "strip_rows": 278},
    **{"strip_counts": 279, "x_resolution": 282, "y_resolution": 283, "planar": 284},
    **{"resolution_unit": 296, "predictor": 317, "palette": 320, "tile_width": 322},
    **{"tile_height": 323, "tile_offsets": 324, "tile_counts": 325, "sub_ifds": 330},
    **{"extra_samples": 338, "sample_format": 339, "jpeg_tables": 347, "depth": 32997},
    **{"geo_scale": 33550, "geo_tiepoint": 33922, "geo_matrix": 34264, "geo_keys": 34735},
    **{"nodata": 42113},
}
_TAG_NAMES = {code: name for name, code in _TAGS.items()}

_JPEG = 7
# TIFF compression -> (name, the most decoded bytes that one stored byte can give). Deflate cannot exceed 1032; LZW
# packs at most 4095 bytes into 12 bits; a JPEG block takes 2 bits or more; a zstd or fax run has no real limit.
_COMPRESSIONS = {
    1: ("none", 1),
    2: ("ccitt-rle", 1 << 20),
    3: ("ccitt-g3", 1 << 20),
    4: ("ccitt-g4", 1 << 20),
    5: ("lzw", 2800),
    _JPEG: ("jpeg", 2048),
    8: ("deflate", 1032),
    32773: ("packbits", 64),
    32946: ("deflate", 1032),
    34925: ("lzma", 20_000),
    50000: ("zstd", 50_000),
}
_PHOTOMETRIC = {0: "white is zero", 1: "black is zero", 2: "RGB", 3: "palette", 6: "YCbCr"}
_OTHER_PHOTOMETRIC = {4: "mask", 5: "CMYK", 8: "CIELab", 9: "ICCLab", 32803: "sensor mosaic"}


@dataclass
class _Directory:
    """One TIFF directory (IFD): where its fields lie; values are fetched when asked for."""

    file: _File
    order: str  # "<" or ">"
    offset: int
    fields: dict[str, tuple[int, int, int]]  # tag -> field type, count, byte offset of the value

    def array(self, tag: str, limit: int) -> np.ndarray[Any, Any] | None:
        """All values of a tag, or None; rationals as `[count, 2]`."""
        if tag not in self.fields:
            return None
        kind, count, where = self.fields[tag]
        if kind not in _FIELD_TYPES or count > limit:
            raise SourceError(
                f"{self.file.name}: {tag} in the directory at byte {self.offset:,} must have at most "
                f"{limit:,} values of a known type, got {count:,} of type {kind}."
            )
        dtype = np.dtype(_FIELD_TYPES[kind]).newbyteorder(self.order)
        size = dtype.itemsize * count
        if where + size > self.file.size:
            raise SourceError(
                f"{self.file.name}: {tag} in the directory at byte {self.offset:,} must lie inside the "
                f"{self.file.size:,} bytes of the file, got {size:,} bytes at {where:,}."
            )
        return np.frombuffer(self.file.pread(where, size), dtype)

    def number(self, tag: str, default: int) -> int:
        """The first value of an integer tag."""
        values = self.array(tag, 1 << 16)
        if values is None or not len(values):
            return default
        if values.dtype.kind not in "iu":
            raise SourceError(f"{self.file.name}: TIFF tag {tag} must be an integer.")
        return int(values.flat[0])

    def text(self, tag: str) -> str:
        values = self.array(tag, 1 << 24)
        return "" if values is None else values.tobytes().split(b"\0")[0].decode("utf-8", "replace")


def _walk_tiff(file: _File) -> Iterator[_Directory]:
    """The directories of the main chain, first page first; loops and wild offsets raise."""
    order, big, offset = _tiff_header(file)
    seen: set[int] = set()
    while offset:
        if offset in seen or len(seen) == MAX_PAGES:
            raise SourceError(
                f"{file.name}: the chain of pages must end within {MAX_PAGES:,} pages, found "
                f"{'a loop' if offset in seen else 'more'} at byte {offset:,}."
            )
        seen.add(offset)
        directory, offset = _read_directory(file, order, big, offset)
        yield directory


def _tiff_header(file: _File) -> tuple[str, bool, int]:
    """Byte order, BigTIFF or not, offset of the first directory."""
    head = bytes(file.pread(0, min(16, file.size)))
    if head[:4] not in _TIFF_MAGIC:
        raise SourceError(f"{file.name}: expected a TIFF file, found a start of {head[:4]!r}.")
    order, big = "<" if head[:1] == b"I" else ">", b"+" in head[2:4]
    if len(head) < (16 if big else 8):
        raise SourceError(f"{file.name}: the TIFF header is cut off after {len(head)} bytes.")
    if big and struct.unpack(order + "HH", head[4:8]) != (8, 0):
        raise SourceError(f"{file.name}: a BigTIFF must use 8-byte offsets, found {head[4:8]!r}.")
    offset = struct.unpack(order + ("Q" if big else "I"), head[8:16] if big else head[4:8])[0]
    if not offset:
        raise SourceError(f"{file.name}: expected at least one page, found a TIFF without pages.")
    return order, big, offset


def _read_directory(file: _File, order: str, big: bool, offset: int) -> tuple[_Directory, int]:
    """The directory at a byte offset, and the offset of the next one (0 ends the chain)."""
    count_size, word = (8, "u8") if big else (2, "u4")
    entry = np.dtype([("tag", "u2"), ("kind", "u2"), ("count", word), ("value", word)])
    entry = entry.newbyteorder(order)
    number = MAX_TAGS + 1
    if offset + count_size <= file.size:
        number = int.from_bytes(file.pread(offset, count_size), "little" if order == "<" else "big")
    start = offset + count_size
    next_at = start + number * entry.itemsize
    next_size = entry["value"].itemsize
    if number > MAX_TAGS or next_at + next_size > file.size:
        raise SourceError(
            f"{file.name}: expected a page directory of at most {MAX_TAGS} tags at byte {offset:,}, "
            f"found none inside the {file.size:,} bytes of the file (cut off or damaged)."
        )
    data = file.pread(start, next_at - start + next_size)
    entries = np.frombuffer(data, entry, number)
    fields: dict[str, tuple[int, int, int]] = {}
    for at in np.flatnonzero(np.isin(entries["tag"], list(_TAG_NAMES))):
        tag, kind, count, value = (int(x) for x in entries[at])
        inline = start + int(at) * entry.itemsize + entry.fields["value"][1]  # type: ignore[index]
        size = count * np.dtype(_FIELD_TYPES.get(kind, "u1")).itemsize
        fields.setdefault(_TAG_NAMES[tag], (kind, count, inline if size <= next_size else value))
    following = int.from_bytes(data[-next_size:], "little" if order == "<" else "big")
    return _Directory(file, order, offset, fields), following


@dataclass
class _Page:
    """What a directory says about its image, checked for sense but not yet against the file."""

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
    offsets: np.ndarray[Any, Any] | None = (
        None  # bytes, [planes * down * across], after check_segments
    )
    counts: np.ndarray[Any, Any] | None = None
    jpeg_tables: bytes | None = None
    fill: Any = None  # value of tiles that a sparse file leaves out

    @property
    def across(self) -> int:
        return -(-self.width // self.columns)

    @property
    def down(self) -> int:
        return -(-self.height // self.rows)

    @property
    def planes(self) -> int:
        return self.samples if self.planar else 1

    @property
    def plane_samples(self) -> int:
        return 1 if self.planar else self.samples

    @property
    def in_rows(self) -> bool:
        """Plain rows of whole pixels: read without decoding."""
        plain = self.compression == self.predictor == self.fill_order == 1
        return plain and not self.tiled and self.dtype.kind != "b"

    def segment_bytes(self, rows: int) -> int:
        """Decoded bytes of a tile or strip of so many rows."""
        bits = 1 if self.dtype.kind == "b" else 8 * self.dtype.itemsize
        return rows * -(-self.columns * self.plane_samples * bits // 8)


def _parse_page(directory: _Directory) -> _Page:
    """Read the fields that describe the image; anything we do not support raises."""
    name, number = directory.file.name, directory.number
    height, width, samples = number("height", 0), number("width", 0), number("samples", 1)
    if height < 1 or width < 1 or samples < 1:
        raise SourceError(
            f"{name}: an image needs at least one row, column and band, "
            f"got {height} x {width} px, {samples} bands."
        )
    compression = number("compression", 1)
    if compression not in _COMPRESSIONS:
        known = ", ".join(sorted({text for text, _ in _COMPRESSIONS.values()}))
        raise SourceError(
            f"{name}: the TIFF compression must be one of {known}, got number {compression}; "
            f'backend="rasterio" or "openslide" may read it.'
        )
    kind = _one_value(directory, "sample_format", 1)
    bits = _one_value(directory, "bits", 1)
    letter = {1: "u", 2: "i", 3: "f", 4: "u"}.get(kind)
    if letter == "u" and bits == 1 and samples == 1:
        dtype = np.dtype(bool)
    elif letter is None or bits not in ((16, 32, 64) if letter == "f" else (8, 16, 32, 64)):
        raise SourceError(
            f"{name}: TIFF samples must be {_DTYPES}, got {bits}-bit of sample format {kind} "
            f"({'complex' if kind in (5, 6) else 'packed or unknown'})."
        )
    else:
        dtype = np.dtype(f"{directory.order}{letter}{bits // 8}")
    photometric = number("photometric", 0 if compression in (2, 3, 4) else 1)
    planar = number("planar", 1) == 2 and samples > 1
    tiled = "tile_width" in directory.fields or "tile_offsets" in directory.fields
    rows, columns = number("tile_height", 0), number("tile_width", 0)
    if not tiled:
        rows, columns = min(number("strip_rows", height), height), width
    if rows < 1 or columns < 1:
        raise SourceError(f"{name}: tiles or strips must not be empty, got {rows} x {columns} px.")
    subfile = number("subfile", 1 if number("old_subfile", 1) == 2 else 0)
    page = _Page(
        *(directory, height, width, samples, dtype, compression, photometric, planar),
        *(number("predictor", 1), number("fill_order", 1)),
        extra_samples=directory.fields.get("extra_samples", (0, 0, 0))[1],
        **{"tiled": tiled, "rows": rows, "columns": columns, "subfile": subfile},
    )
    _check_colour(page, number("depth", 1))
    return page


def _one_value(directory: _Directory, tag: str, default: int) -> int:
    """A tag with one value per band, all equal."""
    values = directory.array(tag, 1 << 16)
    if values is None or not len(values):
        return default
    if values.dtype.kind not in "iu" or (values != values[0]).any():
        raise SourceError(
            f"{directory.file.name}: {tag} must be the same integer for all bands, "
            f"got {values[:8].tolist()}."
        )
    return int(values[0])


def _check_colour(page: _Page, depth: int) -> None:
    """Photometric, predictor, depth and codec must fit together."""
    name, kind = page.directory.file.name, page.photometric
    jpeg = page.compression == _JPEG
    if kind not in _PHOTOMETRIC:
        raise SourceError(
            f"{name}: the TIFF colours must be one of {', '.join(_PHOTOMETRIC.values())}, "
            f"got {_OTHER_PHOTOMETRIC.get(kind, kind)}; convert the file to RGB."
        )
    unsigned_bytes = page.dtype == np.dtype(np.uint8)
    rules = (
        (depth == 1, "one slice deep", f"{depth} slices"),
        (kind != 2 or page.samples >= 3, "RGB of 3 bands or more", f"{page.samples}"),
        (kind != 3 or (page.samples == 1 and unsigned_bytes), "palette of 8 bits", str(page.dtype)),
        (
            kind != 6 or (jpeg and page.samples == 3 and not page.planar),
            "YCbCr as interleaved JPEG of 3 bands",
            f"{_COMPRESSIONS[page.compression][0]} of {page.samples} bands",
        ),
        (
            not jpeg or (unsigned_bytes and page.plane_samples in (1, 3, 4)),
            "JPEG of 8 bits and 1, 3 or 4 bands",
            f"{page.dtype}, {page.samples} bands",
        ),
        (
            page.compression not in (2, 3, 4) or page.dtype.kind == "b",
            "fax compression of 1 bit",
            str(page.dtype),
        ),
        (
            page.predictor in ((1, 3) if page.dtype.kind == "f" else (1, 2))
            or (page.predictor == 2 and page.dtype.itemsize in (4, 8)),
            "predictor 1, 2 (integers) or 3 (floats)",
            f"{page.predictor} for {page.dtype}",
        ),
        (page.fill_order in (1, 2), "fill order 1 or 2", f"{page.fill_order}"),
    )
    for holds, expected, found in rules:
        if not holds:
            raise SourceError(f"{name}: TIFF must be {expected}, got {found}.")


def _check_segments(page: _Page, level: int) -> None:
    """Load offsets and byte counts, and hold them against the file; nothing is decoded.

    Works on counts before arrays, and on arrays before data, so that a header that claims millions of tiles
    costs no more than the bytes it really has.
    """
    directory, name = page.directory, page.directory.file.name
    what = "tile" if page.tiled else "strip"
    expected = page.planes * page.down * page.across
    grid = f"{page.height:,} x {page.width:,} px in {what}s of {page.rows:,} x {page.columns:,}"
    for tag in (f"{what}_offsets", f"{what}_counts"):
        found = directory.fields.get(tag, (0, 0, 0))[1]
        if found != expected:
            raise SourceError(
                f"{name}: level {level} ({grid}, {page.planes} planes) needs {expected:,} "
                f"{tag.replace('_', ' ')}, found {found:,}."
            )
    if expected > MAX_SEGMENTS:
        raise SourceError(
            f"{name}: level {level} must have at most {MAX_SEGMENTS:,} {what}s, got {expected:,}."
        )
    if not page.in_rows and page.segment_bytes(page.rows) > MAX_SEGMENT_BYTES:
        raise SourceError(
            f"{name}: one {what} of level {level} ({page.rows:,} x {page.columns:,} px) decodes to "
            f"{page.segment_bytes(page.rows):,} bytes, expected at most {MAX_SEGMENT_BYTES:,}; "
            f"rewrite it as a tiled TIFF."
        )
    loaded = [directory.array(f"{what}_{part}", MAX_SEGMENTS) for part in ("offsets", "counts")]
    for values in loaded:
        if values is None or values.dtype.kind not in "iu":
            raise SourceError(
                f"{name}: {what} offsets and counts of level {level} must be integers."
            )
    # uint64 also makes a negative number too large, which the next check refuses.
    offsets, counts = (values.astype(np.uint64) for values in loaded if values is not None)
    size = np.uint64(directory.file.size)
    wrong = (counts > size) | (offsets > size - np.minimum(counts, size))
    if wrong.any():
        at = int(wrong.argmax())
        raise SourceError(
            f"{name}: {what} {at:,} of level {level} must lie inside the {int(size):,} bytes of the file, "
            f"got {int(counts[at]):,} bytes at {int(offsets[at]):,}."
        )
    sparse = (counts == 0) & (offsets == 0)
    if sparse.any():
        page.fill = _sparse_fill(page, level, what, int(sparse.argmax()))
    _check_counts(page, level, what, counts, sparse)
    page.offsets, page.counts = offsets, counts


def _sparse_fill(page: _Page, level: int, what: str, at: int) -> Any:
    """The nodata value of a sparse file, or an error: an absent tile is never made up."""
    text = page.directory.text("nodata").strip()
    try:
        return np.array([float(text)]).astype(page.dtype, casting="unsafe")[0]
    except ValueError:
        raise SourceError(
            f"{page.directory.file.name}: {what} {at:,} of level {level} must be stored, found none and no "
            f'nodata value that could stand for it; backend="rasterio" reads such tiles as zeros.'
        ) from None


def _check_counts(
    page: _Page, level: int, what: str, counts: np.ndarray[Any, Any], sparse: np.ndarray[Any, Any]
) -> None:
    """Every byte count must be able to hold its tile or strip, and must not be absurdly large."""
    codec, ratio = _COMPRESSIONS[page.compression]
    full = page.segment_bytes(page.rows)
    last_rows = page.rows if page.tiled else page.height - (page.down - 1) * page.rows
    slack = 0 if ratio == 1 else 64
    shape = (page.planes, page.down, page.across)
    counts, sparse = counts.reshape(shape), sparse.reshape(shape)
    for part, needed in (
        (np.s_[:, :-1], full),
        (np.s_[:, -1:], page.segment_bytes(last_rows)),
    ):
        least = max(1, -(-needed // ratio) - slack)
        # Codecs may grow data that does not compress; 64 KiB more for headers.
        most = page.directory.file.size if page.in_rows else 2 * full + (1 << 16)
        wrong = ((counts[part] < least) | (counts[part] > most)) & ~sparse[part]
        if wrong.any():
            plane, row, column = (int(i) for i in np.argwhere(wrong)[0])
            row = row if part[1] != np.s_[-1:] else page.down - 1
            at = (plane * page.down + row) * page.across + column
            raise SourceError(
                f"{page.directory.file.name}: {what} {at:,} of level {level} must have {least:,} to "
                f"{most:,} bytes of {codec} to hold {needed:,} bytes of pixels, "
                f"got {int(counts[plane, row, column]):,}."
            )


def _is_level(base: _Page, page: _Page, is_sub_ifd: bool) -> bool:
    """Whether a page shows the image of `base`, smaller by the same factor in both directions."""
    if (page.samples, page.dtype) != (base.samples, base.dtype) or page.subfile & 4:
        return False
    marked = is_sub_ifd or bool(page.subfile & 1) or (base.tiled and page.tiled)
    smaller = page.height < base.height or page.width < base.width
    fits = page.height <= base.height and page.width <= base.width
    # One pixel of rounding in either size.
    skew = abs(page.height * base.width - page.width * base.height)
    return marked and smaller and fits and skew <= base.width + base.height


class _TileCache:
    """Decoded tiles, the most recently used kept within a byte budget; each is decoded once at a time."""

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._lock = threading.Lock()
        self._tiles: OrderedDict[tuple[int, int], Future[np.ndarray[Any, Any]]] = OrderedDict()
        self._bytes = 0

    def get(
        self, key: tuple[int, int], decode: Callable[[], np.ndarray[Any, Any]]
    ) -> np.ndarray[Any, Any]:
        """The tile of `key`; threads that ask for a tile in the making wait for it."""
        with self._lock:
            future = self._tiles.get(key)
            mine = future is None
            if future is None:
                future = self._tiles[key] = Future()
            self._tiles.move_to_end(key)
        if not mine:
            return future.result()
        try:
            tile = decode()
        except BaseException as error:
            with self._lock:
                self._tiles.pop(key, None)
            future.set_exception(error)
            raise
        future.set_result(tile)
        with self._lock:
            self._bytes += tile.nbytes
            for old in list(self._tiles):
                if self._bytes <= self._budget:
                    break
                if old != key and self._tiles[old].done():
                    self._bytes -= self._tiles.pop(old).result().nbytes
        return tile


class _TiffSource(ImageSource):
    """TIFF and BigTIFF: tiles or strips, interleaved or planar, with pyramid levels."""

    def __init__(self, path: str) -> None:
        self.name = path
        self._file = _File(path)
        self._cache = _TileCache(CACHE_BYTES)
        try:
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
        except BaseException:
            self._file.close()
            raise

    @property
    def bytes_read(self) -> int:
        return self._file.bytes_read

    def _read(
        self, top: int, left: int, height: int, width: int, level: int
    ) -> np.ndarray[Any, Any]:
        self._file.check_unchanged()
        page = self._pages[level]
        window = (top, left, height, width)
        if page.in_rows:
            out = self._read_rows(page, window)
        else:
            out = self._read_tiles(page, level, window)
        if self._palette is not None:
            return self._palette[:, out[0, :, :, 0]]
        bands = _bands_first(out)
        if page.dtype.kind == "b":
            bands = bands.astype(np.uint8) * np.uint8(255)
        else:
            bands = bands.astype(self.dtype, copy=False)
        return ~bands if page.photometric == 0 and self.dtype.kind == "u" else bands

    def _read_rows(self, page: _Page, window: tuple[int, int, int, int]) -> np.ndarray[Any, Any]:
        offsets = page.offsets
        assert offsets is not None
        row_bytes = page.segment_bytes(1)

        def place(plane: int, row: int) -> tuple[int, int]:
            strip, inside = divmod(row, page.rows)
            offset = int(offsets[plane * page.down + strip])
            return offset + inside * row_bytes, page.rows - inside

        layout = (page.planes, page.width, page.plane_samples)
        if page.fill is not None:
            raise SourceError(f"{self.name}: sparse strips without compression are not supported.")
        return _read_rows(self._file, place, layout, page.dtype, window)

    def _read_tiles(
        self, page: _Page, level: int, window: tuple[int, int, int, int]
    ) -> np.ndarray[Any, Any]:
        top, left, height, width = window
        dtype = page.dtype.newbyteorder("=")
        out = np.empty((page.planes, height, width, page.plane_samples), dtype)
        for plane in range(page.planes):
            for row in range(top // page.rows, (top + height - 1) // page.rows + 1):
                for column in range(left // page.columns, (left + width - 1) // page.columns + 1):
                    index = (plane * page.down + row) * page.across + column
                    tile = self._cache.get((level, index), lambda i=index: self._tile(level, i))
                    y, x = row * page.rows, column * page.columns  # of the tile in the image
                    y0, x0 = max(top, y), max(left, x)
                    y1 = min(top + height, y + page.rows)
                    x1 = min(left + width, x + page.columns)
                    out[plane, y0 - top : y1 - top, x0 - left : x1 - left] = tile[
                        y0 - y : y1 - y, x0 - x : x1 - x
                    ]
        return out

    def _tile(self, level: int, index: int) -> np.ndarray[Any, Any]:
        """One decoded tile or strip, `[rows, columns, samples]`, native byte order."""
        page = self._pages[level]
        assert page.offsets is not None and page.counts is not None
        offset, count = int(page.offsets[index]), int(page.counts[index])
        row, column = divmod(index % (page.down * page.across), page.across)
        # What of the segment lies in the image; strips end there, tiles are filled up.
        rows_left = min(page.rows, page.height - row * page.rows)
        columns_left = min(page.columns, page.width - column * page.columns)
        if not count:
            shape = (rows_left, columns_left, page.plane_samples)
            return np.full(shape, page.fill, page.dtype.newbyteorder("="))
        data = bytes(self._file.pread(offset, count))
        try:
            rows, columns = (page.rows if page.tiled else rows_left), page.columns
            jfif = False
            if page.compression == _JPEG:
                rows, columns = _jpeg_frame(data, (rows, columns), (rows_left, columns_left))
                jfif = data[6:10] == b"JFIF"
            decode = _segment_decoder(*_decoder_key(page), rows, columns, jfif)
            return decode(data, page.jpeg_tables)
        except MemoryError:
            raise
        except Exception as error:
            what = "tile" if page.tiled else "strip"
            raise SourceError(
                f"{self.name}: {what} {index} (row {row}, column {column}) of level {level}, {count:,} bytes "
                f"at byte {offset:,}, is damaged: {_reason(error)}"
            ) from error

    def close(self) -> None:
        super().close()
        self._file.close()
        self._cache = _TileCache(0)


def _tiff_levels(file: _File) -> tuple[list[_Page], int]:
    """The pages of the pyramid, largest first, all checked; and the number of other pages."""
    chain = _walk_tiff(file)
    first = next(chain)
    base = _parse_page(first)
    _check_segments(base, 0)
    sub_offsets = first.array("sub_ifds", MAX_SUB_IFDS)
    order, big, _ = _tiff_header(file)
    candidates = [
        (_read_directory(file, order, big, int(offset))[0], True)
        for offset in ([] if sub_offsets is None else sub_offsets)
    ]
    candidates += [(directory, False) for directory in chain]
    levels: dict[tuple[int, int], _Page] = {}
    others = 0
    for directory, is_sub_ifd in candidates:
        try:
            page = _parse_page(directory)
        except SourceError:  # a thumbnail or label in a form we do not read
            others += 1
            continue
        size = (page.height, page.width)
        same = size == (base.height, base.width) and page.samples == base.samples
        if same and page.dtype == base.dtype and not page.subfile & 5:
            raise SourceError(
                f"{file.name}: expected one image with smaller pages as levels, found a stack: a second page "
                f"of {page.height} x {page.width} px; split it into files, or pass an array."
            )
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


def _palette(page: _Page) -> np.ndarray[Any, Any]:
    """Colour map, uint8 `[3, 256]`."""
    values = page.directory.array("palette", 3 * 256)
    if values is None or values.dtype.itemsize != 2 or len(values) != 3 * 256:
        raise SourceError(
            f"{page.directory.file.name}: a palette image needs 3 x 256 16-bit colours."
        )
    values = values.astype(np.uint16).reshape(3, 256)
    # Some writers store 8-bit colours in the 16-bit fields.
    return (values >> (8 if values.max() > 255 else 0)).astype(np.uint8)


def _jpeg_frame(
    data: bytes, largest: tuple[int, int], smallest: tuple[int, int]
) -> tuple[int, int]:
    """Rows and columns that a JPEG stream claims, before it is decoded; it must start and end as one.

    A stream that is cut off or overwritten decodes to grey without an error, hence the end marker.
    """
    if not data.startswith(b"\xff\xd8") or not data.rstrip(b"\0").endswith(b"\xff\xd9"):
        raise ValueError("the JPEG stream has no start or no end marker")
    at = 2
    while at + 9 <= len(data):
        if data[at] != 0xFF:
            raise ValueError(f"expected a JPEG marker {at} bytes into the stream")
        marker = data[at + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            rows, columns = struct.unpack(">HH", data[at + 5 : at + 9])
            if not (smallest[0] <= rows <= largest[0] and smallest[1] <= columns <= largest[1]):
                raise ValueError(
                    f"expected {largest[0]} x {largest[1]} px, found a JPEG of {rows} x {columns}"
                )
            return rows, columns
        # Fill bytes and restart markers stand alone; the others carry their length.
        alone = marker in (0x01, 0xFF) or 0xD0 <= marker <= 0xD7
        at += (1 if marker == 0xFF else 2) if alone else 2 + int.from_bytes(data[at + 2 : at + 4])
    raise ValueError("the JPEG stream has no frame header")


def _decoder_key(page: _Page) -> tuple[Any, ...]:
    bits = 1 if page.dtype.kind == "b" else 8 * page.dtype.itemsize
    kind = {"b": 1, "u": 1, "i": 2, "f": 3}[page.dtype.kind]
    photometric = 1 if page.planar else page.photometric
    extra = 0 if page.planar else page.extra_samples
    return (
        *(page.directory.order, page.compression, photometric, page.predictor, page.fill_order),
        *(bits, kind, page.plane_samples, extra),
    )


@lru_cache(maxsize=256)
def _segment_decoder(
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
) -> Callable[[bytes, bytes | None], np.ndarray[Any, Any]]:
    """tifffile's decoder for one tile or strip, seen as the only strip of a small TIFF.

    tifffile gets a header that is written here from checked numbers, never the header of the file.
    """
    import tifffile

    start = b"\xff\xd8\xff\xe0\0\x10JFIF\0" if jfif else bytes(11)  # tifffile looks for JFIF there
    tags = [(256, columns), (257, rows), (258, bits), (259, compression), (262, photometric)]
    tags += [(266, fill_order), (273, 8), (277, samples), (278, rows), (279, len(start))]
    tags += [(284, 1), (317, predictor), *([(338, 0)] if extra else []), (339, kind)]
    header = struct.pack(order + "2sHI", b"II" if order == "<" else b"MM", 42, 8 + len(start) + 1)
    body = b"".join(struct.pack(order + "HHII", tag, 4, 1, value) for tag, value in tags)
    directory = struct.pack(order + "H", len(tags)) + body + bytes(4)
    with tifffile.TiffFile(io.BytesIO(header + start + b"\0" + directory)) as small:
        decode = small.pages[0].decode

    def decode_segment(data: bytes, jpeg_tables: bytes | None) -> np.ndarray[Any, Any]:
        tile: np.ndarray[Any, Any] = decode(data, 0, jpegtables=jpeg_tables)[0][0]
        return tile

    return decode_segment


# ------------------------------------------------------------------------------- TIFF metadata


def _tiff_metadata(directory: _Directory) -> dict[str, Any]:
    """Georeference, microns per pixel, nodata, orientation: whatever the first page tells."""
    found: dict[str, Any] = {}
    if directory.number("orientation", 1) != 1:
        found["orientation"] = directory.number("orientation", 1)
    nodata = directory.text("nodata").strip()
    if nodata:
        found["nodata"] = _json_number(nodata)
    description = directory.text("description")
    names = set(re.findall(r'FileName="([^"]*)"', description)) if "<OME" in description else set()
    if len(names) > 1:
        raise SourceError(
            f"{directory.file.name}: expected one image, found an OME-TIFF that refers to "
            f"{len(names)} files ({', '.join(sorted(names)[:3])})."
        )
    mpp = _microns_per_pixel(directory, description)
    if mpp:
        found["mpp"] = mpp
    transform = _geo_transform(directory) or _world_file(directory.file.name)
    if transform:
        found["transform"] = transform
    found.update(_geo_crs(directory))
    return found


def _json_number(text: str) -> float | str:
    """A finite number as a number, anything else as its text."""
    try:
        value = float(text)
    except ValueError:
        return text
    return value if math.isfinite(value) else text


def _microns_per_pixel(directory: _Directory, description: str) -> list[float] | None:
    """[y, x]: from OME-XML, from Aperio's text, or from resolution tags finer than 10 microns.

    Coarser resolution tags tell how a page prints (72 dpi is 353 microns), not how large things are.
    """
    units = {"µm": 1.0, "um": 1.0, "nm": 1e-3, "mm": 1e3, "cm": 1e4, "Å": 1e-4}
    sizes = []
    for axis in "YX":
        size = re.search(rf'PhysicalSize{axis}="([0-9.eE+-]+)"', description)
        unit = re.search(rf'PhysicalSize{axis}Unit="([^"]+)"', description)
        scale = units.get(unit.group(1) if unit else "µm")
        if size and scale:
            sizes.append(float(size.group(1)) * scale)
    aperio = re.search(r"\bMPP\s*=\s*([0-9.]+)", description)
    if len(sizes) < 2 and aperio:
        sizes = [float(aperio.group(1))] * 2
    unit_microns = {2: 25_400.0, 3: 10_000.0}.get(directory.number("resolution_unit", 2))
    if len(sizes) < 2 and unit_microns:
        for tag in ("y_resolution", "x_resolution"):
            ratio = directory.array(tag, 1)
            if ratio is not None and ratio.shape == (1, 2) and ratio.all():
                sizes.append(unit_microns * float(ratio[0, 1]) / float(ratio[0, 0]))
        sizes = sizes if all(size < 10 for size in sizes) else []
    valid = len(sizes) == 2 and all(0 < size < math.inf for size in sizes)
    return sizes if valid else None


def _geo_transform(directory: _Directory) -> list[float] | None:
    """Six affine numbers to the upper left corner of pixel (0, 0), as GDAL has them."""
    matrix, scale = directory.array("geo_matrix", 16), directory.array("geo_scale", 3)
    tiepoint = directory.array("geo_tiepoint", 1 << 16)
    if matrix is not None and len(matrix) == 16:
        a, b, c, d, e, f = (float(matrix[i]) for i in (0, 1, 3, 4, 5, 7))
    elif scale is not None and len(scale) >= 2 and tiepoint is not None and len(tiepoint) >= 6:
        column, row, _, x, y = (float(value) for value in tiepoint[:5])
        a, b, d, e = float(scale[0]), 0.0, 0.0, -float(scale[1])
        c, f = x - column * a, y - row * e
    else:
        if tiepoint is not None and len(tiepoint) > 6:
            warnings.warn(
                f"{directory.file.name}: ground control points are not turned into a transform.",
                stacklevel=2,
            )
        return None
    if _geo_keys(directory).get(1025) == 2:  # the numbers are for pixel centres
        c, f = c - (a + b) / 2, f - (d + e) / 2
    return [a, b, c, d, e, f]


def _geo_keys(directory: _Directory) -> dict[int, int]:
    """GeoKeys whose value is a short number."""
    values = directory.array("geo_keys", 1 << 14)
    if values is None or len(values) < 4 or values.dtype.itemsize != 2:
        return {}
    table = values[4 : 4 + (len(values) - 4) // 4 * 4].reshape(-1, 4)
    return {int(key): int(value) for key, place, _, value in table if place == 0}


def _geo_crs(directory: _Directory) -> dict[str, Any]:
    """`crs` as an EPSG code, or as WKT by rasterio where the file defines its own."""
    if "geo_keys" not in directory.fields:
        return {}
    keys = _geo_keys(directory)
    model = keys.get(1024)
    code = keys.get(3072 if model == 1 else 2048, 32767)
    vertical = keys.get(4096)
    if 1024 <= code < 32767 and vertical != 32767:
        return {"crs": f"EPSG:{code}" + (f"+{vertical}" if vertical else "")}
    if model not in (1, 2, 3):
        return {}
    try:
        import rasterio

        with rasterio.open(directory.file.name) as dataset:
            return {"crs": dataset.crs.to_wkt()} if dataset.crs else {}
    except ImportError:
        warnings.warn(
            f"{directory.file.name}: its coordinate system has no EPSG code and is left out; "
            f"pip install 'xt-kernels[geo]' to read it.",
            stacklevel=2,
        )
        return {}


def _world_file(path: str) -> list[float] | None:
    """The transform of a world file (`.tfw`, `.pgw`, `.jgw`, `.wld`) beside an image, if there is one."""
    suffix = Path(path).suffix
    for end in (f".{suffix[1:2]}{suffix[-1:]}w", f"{suffix}w", ".wld"):
        beside = Path(path).with_suffix(end)
        if suffix and beside.is_file() and beside.stat().st_size < 4096:
            try:
                a, d, b, e, c, f = (float(word) for word in beside.read_text().split()[:6])
            except ValueError as error:
                raise SourceError(f"{beside}: expected six numbers: {_reason(error)}") from error
            # World files place the centre of pixel (0, 0).
            return [a, b, c - (a + b) / 2, d, e, f - (d + e) / 2]
    return None


# ---------------------------------------------------------------------------------- PNG and JPEG

# Pillow mode -> bands; what is not here is converted to RGB.
_PILLOW_BANDS = {"1": 1, "L": 1, "I;16": 1, "LA": 2, "RGB": 3, "RGBA": 4}


class _PillowSource(ImageSource):
    """PNG or JPEG. The first read decodes the whole image and keeps it: there is no random access."""

    def __init__(self, path: str) -> None:
        self.name = path
        self._lock = threading.Lock()
        self._pixels: np.ndarray[Any, Any] | None = None
        self._bytes_read = 0
        with _File(path) as file:
            size, head = file.size, bytes(file.pread(0, min(26, file.size)))
        # A colour PNG of 16 bits becomes 8 bits in Pillow, so imagecodecs decodes it.
        self._deep_colour = head[12:16] == b"IHDR" and head[24] == 16 and head[25] != 0
        with self._open() as image:
            width, height = image.size
            mode, form = image.mode, image.format
            self._turn = image.getexif().get(0x0112, 1) if form == "JPEG" else 1
            self._alpha = mode in ("P", "PA") and ("transparency" in image.info or mode == "PA")
        pixels = height * width
        ratio = 1032 * 8 if form == "PNG" else 2048
        if pixels > MAX_PILLOW_PIXELS:
            raise SourceError(
                f"{path}: {form} is decoded whole, so at most {MAX_PILLOW_PIXELS:,} px are read, "
                f"got {height:,} x {width:,}; convert the file to a tiled TIFF."
            )
        if pixels > ratio * size:
            raise SourceError(
                f"{path}: the header claims {height:,} x {width:,} px, more than {size:,} bytes of "
                f"{form} can hold."
            )
        if self._turn in (5, 6, 7, 8):
            height, width = width, height
        bands = 4 if self._alpha else _PILLOW_BANDS.get(mode, 3)
        dtype = np.uint16 if mode == "I;16" or self._deep_colour else np.uint8
        if self._deep_colour:
            bands = {2: 3, 4: 2, 6: 4}[head[25]]
        self._set_size([(height, width)], bands, np.dtype(dtype))
        self.block = (height, width)
        self.metadata = {
            "format": form.lower(),
            "compression": "deflate" if form == "PNG" else "jpeg",
        }
        transform = _world_file(path)
        if transform:
            self.metadata["transform"] = transform

    def _open(self) -> Any:
        """The Pillow image, header only; the class is called by name to pass Pillow's own pixel limit."""
        from PIL import JpegImagePlugin, PngImagePlugin

        with open(self.name, "rb") as stream:
            is_png = stream.read(4) == b"\x89PNG"
        kind = PngImagePlugin.PngImageFile if is_png else JpegImagePlugin.JpegImageFile
        return kind(self.name)

    @property
    def bytes_read(self) -> int:
        return self._bytes_read

    def _read(
        self, top: int, left: int, height: int, width: int, level: int
    ) -> np.ndarray[Any, Any]:
        with self._lock:
            if self._pixels is None:
                self._pixels = self._decode()
            pixels = self._pixels
        return np.moveaxis(pixels[top : top + height, left : left + width].copy(), -1, 0)

    def _decode(self) -> np.ndarray[Any, Any]:
        """The whole image, `[H, W, bands]`."""
        if self._deep_colour:
            import imagecodecs

            pixels = np.asarray(imagecodecs.png_decode(Path(self.name).read_bytes()))
        else:
            from PIL import ImageOps

            with self._open() as image:
                image.load()
                if self._turn != 1:
                    image = ImageOps.exif_transpose(image)
                if image.mode == "1":
                    image = image.convert("L")
                elif image.mode not in _PILLOW_BANDS:
                    image = image.convert("RGBA" if self._alpha else "RGB")
                pixels = np.asarray(image)
        pixels = pixels.reshape(*pixels.shape[:2], -1)
        if pixels.shape != (self.height, self.width, self.bands) or pixels.dtype != self.dtype:
            raise SourceError(
                f"{self.name}: expected {self.height} x {self.width} px, {self.bands} bands, found "
                f"{list(pixels.shape)} when it was decoded."
            )
        self._bytes_read = os.stat(self.name).st_size
        return pixels

    def close(self) -> None:
        super().close()
        self._pixels = None


# ------------------------------------------------------------------- rasterio and openslide


class _HandleSource(ImageSource):
    """A file behind a library whose handles belong to one thread: each thread opens its own."""

    _handles: dict[tuple[int, int, int], Any]

    def _start(self, path: str, package: str, extra: str) -> Any:
        self.name = path
        self._bytes_read = 0
        self._handles = {}
        self._lock = threading.Lock()
        if os.path.isfile(path):
            _File(path).close()  # an empty or unreadable file gets our words
        else:
            raise SourceError(f"{path}: expected an image file, found none.")
        try:
            return __import__(package)
        except ImportError as error:
            raise SourceError(
                f"{path}: reading it needs {package}: pip install 'xt-kernels[{extra}]'."
            ) from error

    @abstractmethod
    def _open(self, level: int) -> Any: ...

    def _handle(self, level: int) -> Any:
        # The process id keeps a forked child from sharing file positions with its parent.
        key = (os.getpid(), threading.get_ident(), level)
        with self._lock:
            handle = self._handles.get(key)
        if handle is None:
            handle = self._open(level)
            with self._lock:
                self._handles[key] = handle
        return handle

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
    """Anything that GDAL reads; overviews are levels. Palette images keep their indices."""

    def __init__(self, path: str) -> None:
        rasterio = self._start(path, "rasterio", "geo")
        try:
            dataset = self._handle(0)
            if not dataset.count:
                raise SourceError(
                    f"{path}: expected one image, found a container of {len(dataset.subdatasets)} images: "
                    f"{', '.join(dataset.subdatasets[:4])}."
                )
            if len(set(dataset.dtypes)) != 1:
                raise SourceError(
                    f"{path}: all bands must have one data type, got {dataset.dtypes}."
                )
            if dataset.dtypes[0].startswith("complex"):
                raise SourceError(
                    f"{path}: the data type must be {_DTYPES}, got {dataset.dtypes[0]}."
                )
            sizes = [(dataset.height, dataset.width)]
            for level in range(1, len(dataset.overviews(1)) + 1):
                sizes.append(self._handle(level).shape)
            self._set_size(sizes, dataset.count, np.dtype(dataset.dtypes[0]))
            self.block = tuple(dataset.block_shapes[0])
            compression = dataset.compression
            self.metadata = {
                "format": dataset.driver.lower(),
                "compression": compression.value.lower() if compression else "none",
            }
            if dataset.crs:
                code = dataset.crs.to_epsg()
                self.metadata["crs"] = f"EPSG:{code}" if code else dataset.crs.to_wkt()
            if dataset.transform != rasterio.Affine.identity():
                self.metadata["transform"] = [float(value) for value in dataset.transform[:6]]
            if dataset.nodata is not None:
                self.metadata["nodata"] = _json_number(str(dataset.nodata))
        except BaseException:
            self.close()
            raise

    def _open(self, level: int) -> Any:
        import rasterio

        options = {"overview_level": level - 1} if level else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
            return rasterio.open(self.name, **options)

    def _read(
        self, top: int, left: int, height: int, width: int, level: int
    ) -> np.ndarray[Any, Any]:
        from rasterio.windows import Window

        window = self._handle(level).read(window=Window(left, top, width, height))
        with self._lock:
            self._bytes_read += window.nbytes
        return np.asarray(window)


class _OpenSlideSource(_HandleSource):
    """A whole-slide image: RGB uint8, transparent places filled with the slide's background colour.

    Windows of lower levels start at whole pixels of level 0, so where a level is not smaller by a whole
    factor, openslide shifts them by less than one of its pixels.
    """

    def __init__(self, path: str) -> None:
        self._start(path, "openslide", "wsi")
        try:
            slide = self._handle(0)
            properties = dict(slide.properties)
            self._set_size(
                [(height, width) for width, height in slide.level_dimensions], 3, np.dtype(np.uint8)
            )
            self._downsamples = tuple(slide.level_downsamples)
            colour = properties.get("openslide.background-color", "FFFFFF")
            self._background = np.frombuffer(bytes.fromhex(colour), np.uint8).astype(np.uint16)
            tile = [
                properties.get(f"openslide.level[0].tile-{side}") for side in ("height", "width")
            ]
            self.block = (int(tile[0] or 1), int(tile[1] or self.width))
            self.metadata = {"format": properties.get("openslide.vendor", "openslide")}
            self.metadata["compression"] = "unknown"
            mpp = [properties.get(f"openslide.mpp-{axis}") for axis in "yx"]
            if all(mpp):
                self.metadata["mpp"] = [float(value) for value in mpp if value]
        except BaseException:
            self.close()
            raise

    def _open(self, level: int) -> Any:
        import openslide

        return openslide.OpenSlide(self.name)

    def _read(
        self, top: int, left: int, height: int, width: int, level: int
    ) -> np.ndarray[Any, Any]:
        factor = self._downsamples[level]
        place = (round(left * factor), round(top * factor))
        rgba = np.asarray(self._handle(0).read_region(place, level, (width, height)))
        with self._lock:
            self._bytes_read += 3 * height * width
        rgb, alpha = rgba[..., :3], rgba[..., 3:]
        if alpha.min() < 255:
            blend = rgb * alpha.astype(np.uint16) + self._background * (255 - alpha)
            rgb = ((blend + 127) // 255).astype(np.uint8)
        return np.moveaxis(np.array(rgb), -1, 0)


_BACKENDS: dict[str, Callable[..., ImageSource]] = {
    "tiff": _TiffSource,
    "pillow": _PillowSource,
    "npy": _NpySource,
    "zarr": _open_zarr,
    "rasterio": _RasterioSource,
    "openslide": _OpenSlideSource,
}
