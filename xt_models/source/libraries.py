"""Files that rasterio (GDAL) or openslide read, both optional and imported when one is opened."""

from __future__ import annotations

import os
import threading
from abc import abstractmethod
from importlib import import_module
from typing import Any

import numpy as np

from .base import DTYPES, Array, Empty, ImageSource, SourceError, Window, expect
from .files import File
from .metadata import json_number


class HandleSource(ImageSource):
    """A file behind a library whose handles belong to one thread: each thread opens its own."""

    def __init__(self, path: str, package: str, extra: str) -> None:
        super().__init__(path)
        self._handles: dict[tuple[int, int, int], Any] = {}
        File(path).close()  # a missing, empty or unreadable file gets our words
        try:
            import_module(package)
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

    def close(self) -> None:
        super().close()
        with self._lock:
            for handle in self._handles.values():
                handle.close()
            self._handles.clear()


class RasterioSource(HandleSource):
    """Whatever GDAL reads; overviews are levels. Palette images keep their indices.

    GDAL keeps decoded blocks in a cache of its own; windows aligned to `block` are the fast ones.
    """

    def __init__(self, path: str) -> None:
        super().__init__(path, "rasterio", "geo")
        data = self._handle(0)
        parts = f"{len(data.subdatasets)} images: {', '.join(data.subdatasets[:4])}"
        expect(data.count, path, "one image", parts)
        plain = len(set(data.dtypes)) == 1 and not data.dtypes[0].startswith("complex")
        expect(plain, path, f"one data type of {DTYPES}", ", ".join(data.dtypes))
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
            self.metadata["nodata"] = json_number(str(data.nodata))

    def _open(self, level: int) -> Any:
        import rasterio

        return rasterio.open(self.name, **({"overview_level": level - 1} if level else {}))

    def _read(self, window: Window, level: int, empty: Empty) -> Array:
        top, left, height, width = window
        place = (top, top + height), (left, left + width)
        pixels: Array = self._handle(level).read(window=place)
        self._count(pixels.nbytes)
        return pixels


class OpenSlideSource(HandleSource):
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

    def _read(self, window: Window, level: int, empty: Empty) -> Array:
        top, left, height, width = window
        place = tuple(round(start * self._downsamples[level]) for start in (left, top))
        # One handle of a thread reads all levels.
        rgba = np.asarray(self._handle(0).read_region(place, level, (width, height)))
        self._count(3 * height * width)
        rgb, alpha = rgba[..., :3], rgba[..., 3:].astype(np.uint16)
        if alpha.min() < 255:
            rgb = ((rgb * alpha + self._background * (255 - alpha) + 127) // 255).astype(np.uint8)
        return np.moveaxis(np.array(rgb), -1, 0)
