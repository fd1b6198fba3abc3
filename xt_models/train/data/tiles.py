"""Places of crops on images of any size: at random for training, side by side for validation."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from .crops import Window


class Tiles:
    """Tiles of `shape` (height, width) that cover images of `sizes`; the last of a row or column
    reaches beyond the image. A pass over a training set takes as many crops."""

    def __init__(self, sizes: Sequence[tuple[int, int]], shape: tuple[int, int]) -> None:
        self.sizes, self.shape = sizes, shape
        counts = (self._rows(size) * self._cols(size) for size in sizes)
        self._ends = list(accumulate(counts))

    def __len__(self) -> int:
        return self._ends[-1]

    def image(self, index: int) -> int:
        """The image of a tile."""
        return bisect_right(self._ends, index)

    def __getitem__(self, index: int) -> tuple[int, Window]:
        image = self.image(index)
        row, col = divmod(index - (self._ends[image - 1] if image else 0), self._cols_of(image))
        return image, Window(row * self.shape[0], col * self.shape[1], *self.shape)

    def random(self, index: int, rng: np.random.Generator) -> tuple[int, Window]:
        """A window anywhere on the image of a tile; one that is smaller than a window starts it."""
        image = self.image(index)
        room = [max(n - s, 0) + 1 for n, s in zip(self.sizes[image], self.shape, strict=True)]
        top, left = rng.integers(room).tolist()
        return image, Window(top, left, *self.shape)

    def around(
        self, image: int, point: tuple[float, float], rng: np.random.Generator
    ) -> tuple[int, Window]:
        """A window of an image at random among those that hold the point (row, column)."""
        place: list[int] = []
        for n, s, at in zip(self.sizes[image], self.shape, point, strict=True):
            low, high = max(0, int(at) - s + 1), min(max(n - s, 0), int(at))
            place.append(int(rng.integers(low, max(low, high) + 1)))
        return image, Window(place[0], place[1], *self.shape)

    def _rows(self, size: tuple[int, int]) -> int:
        return -(-size[0] // self.shape[0])

    def _cols(self, size: tuple[int, int]) -> int:
        return -(-size[1] // self.shape[1])

    def _cols_of(self, image: int) -> int:
        return self._cols(self.sizes[image])
