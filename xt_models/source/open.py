"""`open_image`: which source reads a file or an array, and how it is made again from a pickle."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .arrays import NpySource, open_array, open_zarr
from .base import ImageSource, SourceError, expect, reason
from .files import File
from .libraries import OpenSlideSource, RasterioSource
from .pillow import PillowSource
from .tiff import TiffSource
from .tiff_directory import TIFF_MAGIC

_WSI_SUFFIXES = {".ndpi", ".mrxs", ".vms", ".vmu", ".scn", ".bif", ".svslide"}
_GEO_SUFFIXES = {".jp2", ".j2k", ".img", ".ntf", ".nitf", ".ecw", ".sid", ".hdf", ".h5", ".nc"}

_BACKENDS: dict[str, Callable[..., ImageSource]] = {
    "tiff": TiffSource,
    "pillow": PillowSource,
    "npy": NpySource,
    "zarr": open_zarr,
    "rasterio": RasterioSource,
    "openslide": OpenSlideSource,
}


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
    expect(axes in (None, "HW", "HWC", "CHW"), "open_image", "axes HW, HWC or CHW", repr(axes))
    known = backend is None or backend in _BACKENDS
    expect(known, "open_image", f"a backend of {', '.join(_BACKENDS)}", repr(backend))
    if not isinstance(image, str | os.PathLike):
        source = open_array(image, axes)
        source.recipe = _array_recipe(image, axes)
        return source
    path = os.fspath(image)
    backend = backend or _detect(path)
    has_axes = backend in ("npy", "zarr")
    expect(axes is None or has_axes, path, "axes only with arrays, .npy and zarr", backend)
    try:
        source = _BACKENDS[backend](path, axes) if has_axes else _BACKENDS[backend](path)
    except (SourceError, MemoryError):
        raise
    except Exception as error:
        raise SourceError(
            f"{path}: expected a file for {backend}, found {reason(error)}."
        ) from error
    source.recipe = _reopen, (os.path.abspath(path), backend, axes)
    return source


def _detect(path: str) -> str:
    """The backend for a path, by its first bytes, then by its suffix."""
    suffix = Path(path).suffix.lower()
    if os.path.isdir(path):
        names = ("zarr.json", ".zarray", ".zgroup")
        is_zarr = any(os.path.isfile(os.path.join(path, name)) for name in names)
        expect(is_zarr, path, "an image file or a zarr folder", "a folder without zarr metadata")
        return "zarr"
    with File(path) as file:
        head = file.pread(0, min(16, file.size))
    if suffix in _WSI_SUFFIXES:
        return "openslide"
    if head[:4] in TIFF_MAGIC:
        return "tiff"
    if head.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")):
        return "pillow"
    if head.startswith(b"\x93NUMPY"):
        return "npy"
    followed = 'backend="rasterio" to follow what a .vrt refers to'
    expect(suffix != ".vrt", path, followed, "no backend")
    images = 'TIFF, PNG, JPEG, .npy or zarr (others with backend="rasterio" or "openslide")'
    expect(suffix in _GEO_SUFFIXES, path, images, f"a file that starts with {head!r}")
    return "rasterio"


def _array_recipe(image: Any, axes: str | None) -> tuple[Any, ...]:
    """How a pickle brings an array: by its values, a memory map by its file name."""
    # Views keep the offset of their map, so only a whole map can be mapped again by name.
    if isinstance(image, np.memmap) and isinstance(image.base, mmap.mmap) and image.filename:
        order = "C" if image.flags.c_contiguous else "F"
        where = (str(image.filename), image.dtype, "r", image.offset, image.shape, order)
        return _reopen_memmap, (where, axes)
    return _reopen, (image, None, axes)


def _reopen(image: Any, backend: str | None, axes: str | None) -> ImageSource:
    return open_image(image, backend=backend, axes=axes)


def _reopen_memmap(where: tuple[Any, ...], axes: str | None) -> ImageSource:
    try:
        return open_image(np.memmap(*where), axes=axes)
    except (OSError, ValueError) as error:
        found = reason(error)
        raise SourceError(f"{where[0]}: expected the mapped file, found {found}.") from error
