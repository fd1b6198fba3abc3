"""Windows of image files as training crops: no more of a file is read than a crop needs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from ...source import ImageSource, SourceError, open_image


class Window(NamedTuple):
    """A rectangle of full-size pixels; it may reach beyond the image, which is zero there."""

    top: int
    left: int
    height: int
    width: int


def random_window(
    size: tuple[int, int],
    scale: tuple[float, float],
    ratio: tuple[float, float],
    rng: np.random.Generator,
) -> Window:
    """A window of a share `scale` of the area and a width by height in `ratio` (of a log-uniform
    draw), inside an image of `size` (height, width); the largest in its middle if ten draws do not
    fit (Szegedy et al. 2015, as torchvision draws it)."""
    rows, cols = size
    for _ in range(10):
        area = rows * cols * rng.uniform(*scale)
        shape = np.exp(rng.uniform(*np.log(ratio)))
        height, width = round((area / shape) ** 0.5), round((area * shape) ** 0.5)
        if 0 < height <= rows and 0 < width <= cols:
            top, left = rng.integers((rows - height + 1, cols - width + 1)).tolist()
            return Window(top, left, height, width)
    return middle_window(size, min(max(cols / rows, ratio[0]), ratio[1]))


def middle_window(size: tuple[int, int], ratio: float) -> Window:
    """The largest window of this width by height in the middle of an image."""
    rows, cols = size
    height, width = min(rows, round(cols / ratio)), min(cols, round(rows * ratio))
    return Window((rows - height) // 2, (cols - width) // 2, max(height, 1), max(width, 1))


def read_crop(
    image: str | Path | ImageSource,
    window: Window | None,
    shape: tuple[int, int] | None = None,
    *,
    bands: Sequence[int] = (),
    in_chans: int | None = None,
) -> torch.Tensor:
    """Pixels of a window (None: all), resized to `shape` where given, `[C, h, w]`; uint8 and uint16
    stay what they are, other types become float32.

    The smallest pyramid level that still has the resolution is read. Resizing is bilinear over the
    area of each output pixel (antialiased).

    bands: which, from 1; none for all. in_chans: bands that a model takes: grey images are then
        repeated, and a last band more (alpha) is left out.

    Raises SourceError for an image that cannot be read or has other bands.
    """
    source = open_image(image)
    try:
        window = window or Window(0, 0, source.height, source.width)
        level, window = _level(source, window, shape or window[2:])
        pixels = _tensor(_read(source, window, level))
        pixels = _select(pixels, bands, in_chans, source.name)
    finally:
        if source is not image:
            source.close()
    if shape is None or tuple(pixels.shape[1:]) == tuple(shape):
        return pixels
    out = F.interpolate(pixels[None].float(), shape, mode="bilinear", antialias=True)[0]
    return out if pixels.is_floating_point() else out.round().to(pixels.dtype)


def _level(source: ImageSource, window: Window, shape: tuple[int, int]) -> tuple[int, Window]:
    """The smallest level with at least `shape` pixels in the window, and the window there."""
    shrink = min(window.height / shape[0], window.width / shape[1])
    for level in range(len(source.level_sizes) - 1, 0, -1):
        rows, cols = source.level_sizes[level]
        y, x = rows / source.height, cols / source.width
        if shrink * min(y, x) >= 1:
            top, left = round(window.top * y), round(window.left * x)
            size = max(1, round(window.height * y)), max(1, round(window.width * x))
            return level, Window(top, left, *size)
    return 0, window


def _read(source: ImageSource, window: Window, level: int) -> np.ndarray[Any, Any]:
    """The window, with zeros where it lies beyond the image."""
    rows, cols = source.level_sizes[level]
    top, left = max(window.top, 0), max(window.left, 0)
    bottom, right = min(window.top + window.height, rows), min(window.left + window.width, cols)
    if (top, left, bottom - top, right - left) == window:
        return np.require(source.read(*window, level), requirements=["C", "W"])
    out = np.zeros((source.bands, window.height, window.width), source.dtype)
    if top < bottom and left < right:
        y, x = top - window.top, left - window.left
        inside = source.read(top, left, bottom - top, right - left, level)
        out[:, y : y + bottom - top, x : x + right - left] = inside
    return out


def _tensor(pixels: np.ndarray[Any, Any]) -> torch.Tensor:
    if pixels.dtype not in (np.uint8, np.uint16):
        pixels = pixels.astype(np.float32)
    return torch.from_numpy(pixels)


def _select(
    pixels: torch.Tensor, bands: Sequence[int], in_chans: int | None, name: str
) -> torch.Tensor:
    if bands:
        if max(bands) > len(pixels):
            raise SourceError(f"{name}: expected bands {list(bands)}, found {len(pixels)} bands.")
        pixels = pixels[[band - 1 for band in bands]]
    if in_chans is None or len(pixels) == in_chans:
        return pixels
    if len(pixels) == in_chans + 1 and in_chans in (1, 3):
        return pixels[:in_chans]
    if len(pixels) in (1, 2) and in_chans == 3 and not bands:
        return pixels[:1].expand(3, -1, -1).contiguous()
    raise SourceError(f"{name}: expected {in_chans} bands, found {len(pixels)}.")
