"""Windows of pixels, read ahead by threads, each region with a key that tells equal ones apart.

A key is found where the window is read, on the reader's thread: what a region looks like (its size,
and the bytes of one pixel if all are the same, else those of a few hundred). Regions of different
keys differ; regions of one key are compared byte for byte by whoever wants to reuse one.
"""

from __future__ import annotations

import math
import mmap
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from xt_kernels.regions import RegionGrid

from .source import DamagedTileError, ImageSource, SourceError
from .source.base import Empty

Pixels = np.ndarray[Any, np.dtype[Any]]

_SAMPLES = 16
"""Rows and columns of a region whose pixels make its key, at most."""


class Key(NamedTuple):
    """uniform: all pixels have the same bytes, and `pixels` holds those of one of them."""

    uniform: bool
    height: int
    width: int
    pixels: bytes


class LeftOut(NamedTuple):
    """Stands in the place of a key for a region that is not encoded, and says why."""

    reason: str


class Window(NamedTuple):
    """Pixels `[C, h, w]` that hold `regions`, the (row, column) of their top left corner, and a key
    for each region, None where nobody asked. Regions that are left out may have no pixels.
    """

    regions: list[int]
    origin: tuple[int, int]
    pixels: torch.Tensor
    keys: list[Key | LeftOut | None]


class Buffers:
    """Gives memory as `np.empty` does, taken from arrays that nobody holds any more.

    Fresh memory costs a page fault for every 4 KiB: with it, streaming around an encoder that costs
    nothing takes 1.5 times the processor time (bench/engine_overhead.py, AMD EPYC, Zen 5). Sizes
    are rounded up to powers of two; of each, idle memory of at most `IDLE_BYTES` is kept.
    """

    IDLE_BYTES = 16 << 20

    def __init__(self) -> None:
        self._idle: dict[int, deque[mmap.mmap]] = {}

    def __call__(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Pixels:
        size = 1 << max(math.prod(shape) * dtype.itemsize - 1, 1).bit_length()
        idle = self._idle.setdefault(size, deque(maxlen=max(self.IDLE_BYTES // size, 1)))
        try:
            memory = idle.pop()
        except IndexError:
            memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        # Not memory of numpy's own: views would hold on to that and let the array go.
        array: Pixels = np.ndarray(shape, dtype, buffer=memory)
        weakref.finalize(array, idle.append, memory).atexit = False
        return array


@dataclass(frozen=True)
class Reader:
    """Reads runs of regions of one image; safe from any thread.

    bands: band numbers from 0, None for all. fill: value for NaN and infinite pixels; None refuses
    them. keys: whether to find keys. drop: leave out regions all of whose pixels have this value.
    mask_damage: leave out regions with a damaged tile instead of raising. pin: windows in
    page-locked memory, from which a copy to a CUDA device waits for nobody. empty: of
    `ImageSource.read`.
    """

    source: ImageSource
    grid: RegionGrid
    bands: list[int] | None = None
    fill: float | None = None
    keys: bool = True
    drop: float | None = None
    mask_damage: bool = False
    pin: bool = False
    empty: Empty = np.empty

    def read(self, regions: Sequence[int]) -> list[Window]:
        """The windows of `regions`, in their order. Raises SourceError for what cannot be read."""
        windows: list[Window] = []
        for run in runs(regions, self.grid):
            try:
                windows.append(self._read_run(run))
            except DamagedTileError as error:
                if not self.mask_damage:
                    raise
                # One by one, so that the good ones are read.
                windows += (
                    [self._damaged(run[0], error)]
                    if len(run) == 1
                    else [window for region in run for window in self.read([region])]
                )
        return windows

    def _damaged(self, region: int, error: DamagedTileError) -> Window:
        top, left, _, _ = self.grid.box(region)
        return Window([region], (top, left), torch.empty(0), [LeftOut(str(error))])

    def _read_run(self, run: list[int]) -> Window:
        top, left, height, _ = self.grid.box(min(run))
        _, last, _, width = self.grid.box(max(run))
        pixels = self.source.read(top, left, height, last + width - left, empty=self.empty)
        if self.bands is not None:
            pixels = pixels[self.bands]
        keys: list[Key | LeftOut | None] = [None] * len(run)
        if self.drop is not None:
            keys = [self._dropped(region_pixels(pixels, self.grid, (top, left), i)) for i in run]
        pixels = self._finite(pixels, top, left)
        if self.keys:
            keys = [
                known or region_key(_bits(region_pixels(pixels, self.grid, (top, left), i)))
                for i, known in zip(run, keys, strict=True)
            ]
        tensor = torch.from_numpy(np.require(pixels, requirements="W"))
        return Window(run, (top, left), tensor.pin_memory() if self.pin else tensor, keys)

    def _dropped(self, pixels: Pixels) -> LeftOut | None:
        """Whether a region, `[C, h, w]`, holds nothing but the value to drop."""
        value = self.drop
        for part in (pixels[:, ::_SAMPLES, ::_SAMPLES], pixels):
            if not (np.isnan(part) if value != value else part == value).all():
                return None
        if pixels.dtype.kind == "f":
            pixels[:] = 0  # nobody looks at it again, but what is not finite is refused
        return LeftOut("nodata")

    def _finite(self, pixels: Pixels, top: int, left: int) -> Pixels:
        if pixels.dtype.kind != "f":
            return pixels
        finite = np.isfinite(pixels)
        if finite.all():
            return pixels
        if self.fill is None:
            band, y, x = (int(i) for i in np.argwhere(~finite)[0])
            raise SourceError(
                f"{self.source.name}: expected finite pixels, found {pixels[band, y, x]} at row "
                f"{top + y}, column {left + x}, band {band + 1}; choose a value for such pixels "
                f"with fill (--fill)."
            )
        return np.where(finite, pixels, pixels.dtype.type(self.fill))


def region_pixels(pixels: Pixels, grid: RegionGrid, origin: tuple[int, int], region: int) -> Pixels:
    """View `[C, h, w]` of one region in a window."""
    top, left, height, width = grid.box(region)
    y, x = top - origin[0], left - origin[1]
    return pixels[:, y : y + height, x : x + width]


def same_bytes(pixels: Pixels, others: Pixels) -> bool:
    """Whether two regions have the same bytes, so that 0.0 is not -0.0."""
    return np.array_equal(_bits(pixels), _bits(others))


def _bits(pixels: Pixels) -> Pixels:
    return pixels.view(f"u{pixels.dtype.itemsize}")


def region_key(pixels: Pixels) -> Key:
    """The key of a region `[C, h, w]` of unsigned integers."""
    _, height, width = pixels.shape
    sample = pixels[:, :: -(-height // _SAMPLES), :: -(-width // _SAMPLES)]
    pixel = pixels[:, :1, :1]
    # Rows against their neighbours: against one pixel, numpy's inner loop is as short as a pixel.
    if (
        (sample == pixel).all()
        and np.array_equal(pixels[:, 1:], pixels[:, :-1])
        and (pixels[:, 0] == pixel[:, 0]).all()
    ):
        return Key(True, height, width, pixel.tobytes())
    return Key(False, height, width, sample.tobytes())


def runs(regions: Sequence[int], grid: RegionGrid) -> Iterator[list[int]]:
    """Splits region numbers into runs of neighbours in one row, so that one read serves a run."""
    run: list[int] = []
    for region in regions:
        if run and (region // grid.cols != run[-1] // grid.cols or abs(region - run[-1]) != 1):
            yield run
            run = []
        run.append(region)
    if run:
        yield run


class ReadAhead:
    """Results of `job` over `items` in order, computed by threads at most `readers + 1` ahead."""

    def __init__(self, job: Callable[[Any], Any], items: Sequence[Any], readers: int) -> None:
        self._job, self._items = job, iter(items)
        self._pool = ThreadPoolExecutor(readers, thread_name_prefix="xt-reader")
        self._queue: deque[Future[Any]] = deque()
        self._depth = readers + 1

    def __enter__(self) -> Iterator[Any]:
        return self._results()

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _results(self) -> Iterator[Any]:
        for item in self._items:
            self._queue.append(self._pool.submit(self._job, item))
            if len(self._queue) > self._depth:
                yield self._queue.popleft().result()
        while self._queue:
            yield self._queue.popleft().result()
