"""Arrays: numpy, memory maps, torch tensors, zarr, and `.npy` files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from .base import DTYPES, MAX_SEGMENT_BYTES, Array, Empty, ImageSource, SourceError, Window, expect
from .files import FileSource, bands_first, read_rows


def open_array(image: Any, axes: str | None) -> ImageSource:
    """A numpy array, memory map, zarr array or group, or tensor; `axes` as in `open_image`."""
    package = type(image).__module__.partition(".")[0]
    if package == "zarr":
        return _zarr_source("zarr", image, axes)
    if package == "torch" and hasattr(image, "detach"):
        expect(image.device.type == "cpu", "array", "a tensor on the CPU", image.device)
        try:
            image = image.detach().numpy()
        except TypeError as error:
            raise SourceError(
                f"array: expected a data type of {DTYPES}, found {image.dtype}."
            ) from error
        axes = axes or ("CHW" if image.ndim == 3 else None)
    kinds = "a path, an array, a zarr array or a CPU tensor"
    expect(isinstance(image, np.ndarray), "open_image", kinds, type(image).__name__)
    is_map = isinstance(image, np.memmap)
    name = str(image.filename) if is_map and image.filename else "array"
    metadata = {"format": "memmap" if is_map else "array", "compression": "none"}
    return ArraySource(name, [image], _dims(name, image.shape, axes), metadata)


def open_zarr(path: str, axes: str | None) -> ImageSource:
    """A folder with zarr metadata; `axes` as in `open_image`."""
    import zarr

    return _zarr_source(path, zarr.open(path, mode="r"), axes)


def _dims(name: str, shape: tuple[int, ...], axes: str | None) -> str:
    """The axes of an array as a word over "c", "y", "x"; the rule of `open_image`."""
    if axes is None:
        axes = "HW"
        if len(shape) == 3:
            last, first = shape[2] <= 16 < shape[0], shape[0] <= 16 < shape[2]
            clear = 'axes="HWC" or "CHW" where the shape does not tell the bands'
            expect(last or first, name, clear, list(shape))
            axes = "HWC" if last else "CHW"
    expect(len(axes) == len(shape), name, f"an array of {len(axes)} axes ({axes})", list(shape))
    return axes.translate(str.maketrans("HWC", "yxc"))


def _dims_size(dims: str, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(bands, height, width) of an array."""
    size = dict(zip(dims, shape, strict=True))
    return size.get("c", 1), size["y"], size["x"]


class ArraySource(ImageSource):
    """What slices like a numpy array: one array per pyramid level, all with the axes `dims`."""

    def __init__(
        self,
        name: str,
        levels: Sequence[Any],
        dims: str,
        metadata: dict[str, Any],
        chunks: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__(name)
        self.metadata = metadata
        self._levels, self._dims = tuple(levels), dims
        sizes = [_dims_size(dims, level.shape) for level in levels]
        dtype = np.dtype(levels[0].dtype)
        self._set_size([size[1:] for size in sizes], sizes[0][0], dtype)
        alike = all(size[0] == self.bands for size in sizes)
        alike = alike and all(np.dtype(level.dtype) == dtype for level in levels)
        expect(alike, name, "levels of the same bands and data type", "others")
        self.block = _dims_size(dims, chunks)[1:] if chunks else (1, self.width)

    def _read(self, window: Window, level: int, empty: Empty) -> Array:
        top, left, height, width = window
        part = {"y": slice(top, top + height), "x": slice(left, left + width), "c": slice(None)}
        index = tuple(part.get(dim, 0) for dim in self._dims)
        pixels = np.asarray(self._levels[level][index])
        kept = "".join(dim for dim in self._dims if dim in part)
        if "c" not in kept:
            pixels, kept = pixels[None], "c" + kept
        self._count(pixels.nbytes)
        out = empty(pixels.shape, self.dtype)
        if pixels.dtype.kind == "b":
            np.multiply(pixels, np.uint8(255), out=out)
        else:
            np.copyto(out, pixels)
        return out.transpose([kept.index(dim) for dim in "cyx"])

    def close(self) -> None:
        super().close()
        self._levels = ()


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
        expect(scales, name, "a zarr array or a group with multiscales", f"a group of {arrays}")
        levels = [node[item["path"]] for item in scales[0]["datasets"]]
        names = [a["name"] if isinstance(a, dict) else a for a in scales[0].get("axes", "tczyx")]
    dims = _zarr_dims(name, levels[0].shape, names, axes)
    for level in levels:
        shape = f"{dims} = {list(level.shape)}"
        flat = all(n == 1 for d, n in zip(dims, level.shape, strict=True) if d not in "cyx")
        expect(flat, name, "size 1 in all axes but c, y and x", shape)
        chunk = math.prod(level.chunks) * np.dtype(level.dtype).itemsize
        limit = f"chunks of at most {MAX_SEGMENT_BYTES:,} bytes"
        expect(chunk <= MAX_SEGMENT_BYTES, name, limit, f"{chunk:,} bytes ({level.chunks})")
    codecs = ", ".join(type(codec).__name__ for codec in levels[0].compressors) or "none"
    metadata = {"format": "zarr", "compression": codecs}
    return ArraySource(name, levels, dims, metadata, tuple(levels[0].chunks))


def _zarr_dims(name: str, shape: tuple[int, ...], names: Sequence[Any], axes: str | None) -> str:
    """Axes of a zarr array, a word over "tczyx": by its names if they are usable, else by shape."""
    short = {"band": "c", "channel": "c", "row": "y", "column": "x"}
    dims = "".join(short.get(str(item).lower(), str(item).lower()) for item in names)
    usable = len(dims) == len(set(dims)) == len(shape) and {"y", "x"} <= set(dims) <= set("tczyx")
    return dims if usable and not axes else _dims(name, shape, axes)


class NpySource(FileSource):
    """A `.npy` file in C order, read row by row."""

    def __init__(self, path: str, axes: str | None) -> None:
        super().__init__(path)
        formats = np.lib.format
        readers = {(1, 0): formats.read_array_header_1_0, (2, 0): formats.read_array_header_2_0}
        with open(self._file.fd, "rb", closefd=False) as stream:
            version = formats.read_magic(stream)
            expect(version in readers, path, ".npy of version 1.0 or 2.0", version)
            shape, fortran, self._stored = readers[version](stream)
            self._offset = stream.tell()
        dims = _dims(path, shape, axes)
        bands, height, width = _dims_size(dims, shape)
        self._set_size([(height, width)], bands, self._stored)
        order = "C order (np.ascontiguousarray)"
        expect(not fortran or max(shape) == 1, path, order, "Fortran order")
        claimed, held = math.prod(shape) * self._stored.itemsize, self._file.size - self._offset
        what = f"{claimed:,} bytes of {list(shape)} {self._stored}"
        expect(claimed <= held, path, what, f"{held:,} bytes")
        self.block = (1, width)
        self.metadata = {"format": "npy", "compression": "none"}
        self._layout = (bands, width, 1) if dims == "cyx" else (1, width, bands)

    def _read(self, window: Window, level: int, empty: Empty) -> Array:
        self._file.check_unchanged()
        row_bytes = self._layout[1] * self._layout[2] * self._stored.itemsize

        def place(plane: int, row: int) -> tuple[int, int]:
            return self._offset + (plane * self.height + row) * row_bytes, self.height - row

        # A byte of a damaged bool array may be neither 0 nor 1.
        is_bool = self._stored.kind == "b"
        dtype = np.dtype(np.uint8) if is_bool else self._stored
        out = bands_first(read_rows(self._file, place, self._layout, dtype, window, empty))
        if is_bool:
            return np.where(out != 0, np.uint8(255), np.uint8(0))
        return out.astype(self.dtype, copy=False)
