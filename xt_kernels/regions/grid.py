"""Pixel geometry of nested tokenization: which region covers which pixels, and where its tokens go.

An image of H x W pixels is cut into non-overlapping square regions of side s, numbered row-major
from the top left. The last row and column are zero-padded up to s. With an encoder of stride p each
region gives t x t tokens, t = s / p, and the image has ceil(H / p) x ceil(W / p) tokens that see at
least one real pixel; the others are pure padding and have no place in any sequence. Integers only.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch

Order = Literal["row", "tile"]


@dataclass(frozen=True)
class RegionGrid:
    """Regions of side `region` over an image of `height` x `width` pixels.

    Raises ValueError if any of the three is no integer of at least one.
    """

    height: int
    width: int
    region: int

    def __post_init__(self) -> None:
        for name in ("height", "width", "region"):
            value = getattr(self, name)
            try:
                whole = operator.index(value)
            except TypeError:
                message = f"RegionGrid: {name} must be an integer, got {value!r}."
                raise ValueError(message) from None
            if whole < 1:
                raise ValueError(f"RegionGrid: {name} must be at least 1 pixel, got {whole}.")
            # NumPy's integers wrap; Python's do not.
            object.__setattr__(self, name, whole)

    @property
    def rows(self) -> int:
        """Rows of regions."""
        return -(-self.height // self.region)

    @property
    def cols(self) -> int:
        """Columns of regions."""
        return -(-self.width // self.region)

    @property
    def num_regions(self) -> int:
        """Regions in the image, `rows * cols`."""
        return self.rows * self.cols

    def box(self, index: int) -> tuple[int, int, int, int]:
        """(top, left, height, width) in pixels of the part of region `index` inside the image."""
        if not 0 <= index < self.num_regions:
            raise ValueError(
                f"RegionGrid.box: index must be in [0, {self.num_regions}), got {index}."
            )
        top = index // self.cols * self.region
        left = index % self.cols * self.region
        return (
            top,
            left,
            min(self.region, self.height - top),
            min(self.region, self.width - left),
        )

    def token_shape(self, stride: int) -> tuple[int, int]:
        """(rows, columns) of the token map of the whole image for an encoder of `stride` pixels."""
        self._check_stride(stride)
        return -(-self.height // stride), -(-self.width // stride)

    def placement(
        self, chunk: Sequence[int] | None, stride: int, order: Order = "row"
    ) -> Placement:
        """Where the tokens of each region of `chunk` go in the chunk's token sequence.

        chunk: distinct region numbers in the order in which they are visited; None is all of them.
        stride: encoder stride in pixels; must divide the region side.
        order: "row" puts the chunk's tokens in row-major order of the image, "tile" puts them
            region after region in the order of `chunk`, row-major inside each region.
        """
        self._check_stride(stride)
        if order not in ("row", "tile"):
            raise ValueError(f"RegionGrid.placement: order must be 'row' or 'tile', got {order!r}.")
        key = None if chunk is None else tuple(int(i) for i in chunk)
        return _placement(self, key, stride, order)

    def _check_stride(self, stride: int) -> None:
        if stride < 1 or self.region % stride:
            raise ValueError(
                f"RegionGrid: stride must divide the region side {self.region}, got {stride}."
            )


@dataclass(frozen=True, eq=False)
class Placement:
    """Affine places of tokens: token (i, j) of region k of the chunk has sequence index
    `start[k] + i * pitch[k] + j` for i < height[k], j < width[k], and image position
    (`row[k] + i`, `col[k] + j`). Tokens with i >= height or j >= width are pure padding.

    table: int64 `[K, 6]` on CPU with columns start, pitch, height, width, row, col.
    length: tokens in the chunk.
    slots: region number -> row of `table`.
    """

    table: torch.Tensor
    length: int
    slots: dict[int, int]


@lru_cache(maxsize=64)
def _placement(
    grid: RegionGrid, chunk: tuple[int, ...] | None, stride: int, order: Order
) -> Placement:
    # NumPy, not torch: places are integers on the host, whatever the default device or mode is.
    ids = np.arange(grid.num_regions) if chunk is None else np.array(chunk, dtype=np.int64)
    if chunk is not None:
        bad = next((i for i in chunk if not 0 <= i < grid.num_regions), None)
        if bad is not None:
            raise ValueError(
                f"RegionGrid.placement: chunk must hold region numbers in [0, {grid.num_regions}), "
                f"got {bad}."
            )
        if len(set(chunk)) != len(chunk):
            twice = next(i for n, i in enumerate(chunk) if i in chunk[:n])
            raise ValueError(
                f"RegionGrid.placement: chunk must hold distinct region numbers, got {twice} twice."
            )
    side = grid.region // stride
    token_rows, token_cols = grid.token_shape(stride)
    row, col = ids // grid.cols * side, ids % grid.cols * side
    height = np.minimum(token_rows - row, side)
    width = np.minimum(token_cols - col, side)
    if order == "tile":
        start = (height * width).cumsum() - height * width
        pitch = width
    else:
        by_image = ids.argsort()
        # Regions of one row of the grid form a band: their token rows are interleaved.
        _, first, band = np.unique(row[by_image], return_index=True, return_inverse=True)
        w = width[by_image]
        band_width = np.bincount(band, weights=w, minlength=len(first)).astype(np.int64)
        band_size = height[by_image][first] * band_width
        band_start = band_size.cumsum() - band_size
        # Columns to the left inside the band: running sum of widths less that of the bands before.
        left = w.cumsum() - w - (band_width.cumsum() - band_width)[band]
        start, pitch = np.empty_like(ids), np.empty_like(ids)
        start[by_image] = band_start[band] + left
        pitch[by_image] = band_width[band]
    table = np.stack([start, pitch, height, width, row, col], axis=1)
    slots = {int(region): slot for slot, region in enumerate(ids)}
    return Placement(torch.from_numpy(table), int((height * width).sum()), slots)
