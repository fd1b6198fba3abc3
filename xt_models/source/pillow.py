"""PNG and JPEG files, decoded whole: they have no random access."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from .base import MAX_PILLOW_PIXELS, Array, Empty, ImageSource, Window, expect
from .files import File
from .metadata import world_file

# Pillow mode -> bands; other modes are converted to RGB.
_MODE_BANDS = {"1": 1, "L": 1, "I;16": 1, "LA": 2, "RGB": 3, "RGBA": 4}
# PNG colour type -> bands, of 16-bit images that Pillow would read as 8 bits.
_DEEP_BANDS = {2: 3, 4: 2, 6: 4}
_EXIF_ORIENTATION = 0x0112


class PillowSource(ImageSource):
    """PNG or JPEG. The first read decodes the whole image and keeps it; any window is then fast."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self._pixels: Array | None = None
        with File(path) as file:
            size, head = file.size, file.pread(0, min(26, file.size))
        self._is_png = head[:4] == b"\x89PNG"
        depth, colour = (head[24], head[25]) if self._is_png and len(head) == 26 else (0, 0)
        # imagecodecs decodes what Pillow would cut to 8 bits.
        self._is_deep_colour = depth == 16 and colour != 0
        with self._open() as image:
            (width, height), mode = image.size, image.mode
            self._turn = 1 if self._is_png else image.getexif().get(_EXIF_ORIENTATION, 1)
            self._has_alpha = mode == "P" and "transparency" in image.info
        self._check_claim(height, width, size)
        if self._is_deep_colour:
            bands = _DEEP_BANDS[colour]
        else:
            bands = 4 if self._has_alpha else _MODE_BANDS.get(mode, 3)
        dtype = np.uint16 if mode == "I;16" or self._is_deep_colour else np.uint8
        is_sideways = self._turn in (5, 6, 7, 8)
        shape = (width, height) if is_sideways else (height, width)
        self._set_size([shape], bands, np.dtype(dtype))
        self.block = (self.height, self.width)
        kinds = ("png", "deflate") if self._is_png else ("jpeg", "jpeg")
        self.metadata = dict(zip(("format", "compression"), kinds, strict=True))
        transform = world_file(path)
        if transform:
            self.metadata["transform"] = transform

    def _check_claim(self, height: int, width: int, size: int) -> None:
        """Pixels must stay within the limit, and within what `size` bytes can hold."""
        limit = f"at most {MAX_PILLOW_PIXELS:,} px in a file that is decoded whole"
        found = f"{height:,} x {width:,} px; convert it to a tiled TIFF"
        expect(height * width <= MAX_PILLOW_PIXELS, self.name, limit, found)
        # The densest a stream can be: deflate 1032 to 1 at 1 bit per pixel, JPEG 2 bits a block.
        room = size * (1032 * 8 if self._is_png else 2048)
        limit = f"at most {room:,} px in {size:,} bytes"
        expect(height * width <= room, self.name, limit, f"a claim of {height:,} x {width:,}")

    def _open(self) -> Any:
        """The Pillow image; its class is named, to pass by Pillow's own, lower pixel limit."""
        from PIL import JpegImagePlugin, PngImagePlugin

        if self._is_png:
            return PngImagePlugin.PngImageFile(self.name)
        return JpegImagePlugin.JpegImageFile(self.name)

    def _read(self, window: Window, level: int, empty: Empty) -> Array:
        with self._lock:
            if self._pixels is None:
                with self.spans("decode"):
                    self._pixels = self._decode()
                self._bytes_read = os.stat(self.name).st_size
            pixels = self._pixels
        top, left, height, width = window
        return np.moveaxis(pixels[top : top + height, left : left + width].copy(), -1, 0)

    def _decode(self) -> Array:
        """The whole image, `[H, W, bands]`."""
        pixels = self._decode_deep() if self._is_deep_colour else self._decode_plain()
        pixels = pixels.reshape(*pixels.shape[:2], -1)
        same = pixels.shape == (self.height, self.width, self.bands) and pixels.dtype == self.dtype
        expect(same, self.name, repr(self), f"{pixels.dtype} {list(pixels.shape)} when decoded")
        return pixels

    def _decode_deep(self) -> Array:
        import imagecodecs

        return np.asarray(imagecodecs.png_decode(Path(self.name).read_bytes()))

    def _decode_plain(self) -> Array:
        from PIL import ImageOps

        with self._open() as image:
            width, height = image.size
            opened = f"{self.height} x {self.width} px as when it was opened"
            same = height * width == self.height * self.width  # before memory is taken for it
            expect(same, self.name, opened, f"{height} x {width}")
            image.load()
            turned = ImageOps.exif_transpose(image) if self._turn != 1 else image
            if turned.mode == "1":
                turned = turned.convert("L")
            elif turned.mode not in _MODE_BANDS:
                turned = turned.convert("RGBA" if self._has_alpha else "RGB")
            return np.asarray(turned)

    def close(self) -> None:
        super().close()
        self._pixels = None
