"""The walk of `XT.forward` over an image that does not fit: bounded memory, one direction.

Reader threads fetch the windows of the next batches; the main thread cuts them into regions,
encodes a batch, stitches its features into the token buffer of their chunk, and runs the context
encoder when the chunk is complete. Live at any time: the windows of `readers + 2` batches, one
batch of activations, the buffers of one or two chunks, and the memory of the context encoder. None
of them depends on the size of the image.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from xt_kernels.regions import RegionGrid

from .context_encoder import Memory
from .grid import Step
from .host import current_rss, peak_rss, reset_peak_rss
from .model import XT
from .source import ImageSource, SourceError, open_image


class ChunkTokens(NamedTuple):
    """One chunk out of the context encoder.

    regions: its region numbers. tokens: `[L, C]`, row-major over the chunk, on the model's device.
    summary: its part of the embedding, `[1, C]`. memory: what the next chunk will see, or None; a
    model with memory="kv" writes over it in the next chunks.
    """

    regions: tuple[int, ...]
    tokens: torch.Tensor
    summary: torch.Tensor
    memory: Memory | None


@dataclass(frozen=True)
class StreamStats:
    """What a run cost, in bytes and seconds. Memory is resident memory of the process; the base is
    that before the first window was read, with the model loaded.
    """

    regions: int
    tokens: int
    chunks: int
    seconds: float
    bytes_read: int
    base_memory: int
    peak_memory: int

    @property
    def regions_per_s(self) -> float:
        """Regions encoded a second, reading, context and writing included."""
        return self.regions / self.seconds


@dataclass(frozen=True)
class StreamResult:
    """embedding `[C]` and logits `[classes]` or None, float32; stats; out: folder or None."""

    embedding: np.ndarray[Any, np.dtype[np.float32]]
    logits: np.ndarray[Any, np.dtype[np.float32]] | None
    stats: StreamStats
    out: Path | None


def stream_chunks(
    model: XT,
    source: ImageSource,
    *,
    batch_size: int = 16,
    readers: int = 2,
    bands: Sequence[int] | None = None,
    fill: float | None = None,
    on_regions: Callable[[Sequence[int], torch.Tensor], None] | None = None,
) -> Iterator[ChunkTokens]:
    """Walks over the image and gives the tokens of each chunk as soon as they are there.

    model: in evaluation mode; its device and dtype are used.
    source: what `open_image` returns. bands: band numbers from 0, default all.
    batch_size: regions encoded at once. readers: threads that read ahead.
    fill: value for NaN and infinite pixels; None refuses them.
    on_regions: called with region numbers and normalised regions `[R, C, s, s]` of each batch, a
        buffer that the next batch fills again.

    The tokens do not depend on batch_size, readers or the order in which reads finish, beyond the
    rounding of the backbone's own batched arithmetic.
    Raises ValueError for numbers out of range or a wrong band count, SourceError for bad pixels.
    """
    chosen = check_bands(model, source, bands)
    for name, value in (("batch_size", batch_size), ("readers", readers)):
        if value < 1:
            raise ValueError(f"stream: {name} must be at least 1, got {value}.")
    grid = model.grid(source.height, source.width)
    steps = model.walk(grid)
    visits = [(k, region) for k, step in enumerate(steps) for region in step.regions]
    batches = [visits[i : i + batch_size] for i in range(0, len(visits), batch_size)]

    def read(batch: list[tuple[int, int]]) -> list[_Window]:
        regions = [region for _, region in batch]
        return [_read_run(source, grid, run, chosen, fill) for run in _runs(regions, grid)]

    device, dtype = next(model.parameters()).device, next(model.parameters()).dtype
    shape = min(batch_size, len(visits)), model.config.in_chans, grid.region, grid.region
    buffer = torch.empty(shape, device=device, dtype=dtype)
    pending: dict[int, _Chunk] = {}
    memory: Memory | None = None
    with torch.inference_mode(), _ReadAhead(read, batches, readers) as windows:
        for batch, parts in zip(batches, windows, strict=True):
            ids = [region for _, region in batch]
            regions, filled = buffer[: len(ids)], 0
            for w in parts:
                part = regions[filled : filled + len(w.regions)]
                model.extract(w.pixels.to(device), grid, w.regions, w.origin, out=part)
                filled += len(w.regions)
            if on_regions is not None:
                on_regions(ids, regions)
            features, raw = model.encode(regions)
            at = 0
            while at < len(batch):  # a batch may end one chunk and begin the next
                k = batch[at][0]
                end = at + sum(step == k for step, _ in batch[at:])
                chunk = pending.setdefault(k, _Chunk(model, grid, steps[k]))
                chunk.add(ids[at:end], features[at:end], None if raw is None else raw[at:end])
                at = end
                if chunk.missing:
                    continue
                del pending[k]
                tokens, summary, memory = model.mix(chunk.tokens, chunk.raw, memory)
                if steps[k].emit:
                    yield ChunkTokens(steps[k].regions, tokens[0], summary, memory)


def stream(
    model: XT,
    source: ImageSource | str | Path | Any,
    out: str | Path | None = None,
    *,
    batch_size: int = 16,
    readers: int = 2,
    bands: Sequence[int] | None = None,
    fill: float | None = None,
    preview: bool = True,
    progress: Callable[[int], None] | None = None,
) -> StreamResult:
    """Runs `model` over an image of any size in bounded memory and writes the results as they come.

    source: an `ImageSource`, or anything that `open_image` takes.
    out: folder to make, holding `tokens.zarr`, `embedding.json` and `preview.png`; must not exist.
        It appears under its name only when it is complete. None writes nothing.
    preview: make the picture. progress: called with the number of regions done since the last call.
    The other arguments are those of `stream_chunks`.

    Raises OSError for `out` and what `stream_chunks` raises; nothing is left then.
    """
    from .output import OutputFolder, Thumbnail, TokenMapWriter, write_embedding, write_preview

    opened = source if isinstance(source, ImageSource) else open_image(source)
    check_bands(model, opened, bands)
    if not opened.height or not opened.width:
        raise SourceError(f"{opened.name}: expected at least one pixel, found none.")
    grid = model.grid(opened.height, opened.width)
    was_training = model.training
    model.eval()
    reset_peak_rss()
    base = current_rss()
    read_before = opened.bytes_read
    start = time.perf_counter()
    num_chunks = 0
    total: torch.Tensor | None = None
    thumbnail = Thumbnail(grid, model, opened) if preview and out is not None else None

    def on_regions(ids: Sequence[int], regions: torch.Tensor) -> None:
        if thumbnail is not None:
            thumbnail.add(ids, regions)
        if progress is not None:
            progress(len(ids))

    try:
        with OutputFolder(out) as folder:
            writer = None
            if folder is not None:
                writer = TokenMapWriter(folder / "tokens.zarr", model, grid, opened)
            for chunk in stream_chunks(
                model,
                opened,
                batch_size=batch_size,
                readers=readers,
                bands=bands,
                fill=fill,
                on_regions=on_regions,
            ):
                if writer is not None:
                    writer.add(chunk.regions, chunk.tokens)
                total = chunk.summary if total is None else total + chunk.summary
                num_chunks += 1
            assert total is not None
            rows, cols = grid.token_shape(model.stride)
            with torch.inference_mode():
                embedding = model.embed(total, rows * cols)
                logits = (
                    None if model.head is None else model.head(embedding)[0].float().cpu().numpy()
                )
            vector = embedding[0].float().cpu().numpy()
            stats = StreamStats(
                regions=sum(len(step.regions) for step in model.walk(grid)),
                tokens=rows * cols,
                chunks=num_chunks,
                seconds=time.perf_counter() - start,
                bytes_read=opened.bytes_read - read_before,
                base_memory=base,
                peak_memory=peak_rss(),
            )
            if folder is not None and writer is not None:
                writer.close()
                write_embedding(folder / "embedding.json", model, opened, vector, logits, stats)
                if thumbnail is not None:
                    write_preview(
                        folder / "preview.png", folder / "tokens.zarr", thumbnail, model, opened
                    )
    finally:
        model.train(was_training)
        if opened is not source:
            opened.close()
    return StreamResult(vector, logits, stats, None if out is None else Path(out))


def check_bands(model: XT, source: ImageSource, bands: Sequence[int] | None) -> list[int] | None:
    """The bands to read, None for all. Raises ValueError unless they are what the model takes."""
    wanted = model.config.in_chans
    if bands is None:
        if source.bands != wanted:
            raise ValueError(
                f"{source.name} has {source.bands} bands and the model takes {wanted}: choose "
                f"{wanted} of them with bands (numbered from 0; --bands counts from 1)."
            )
        return None
    bad = [b for b in bands if not 0 <= b < source.bands]
    if bad or len(bands) != wanted:
        raise ValueError(
            f"stream: bands must be {wanted} numbers in [0, {source.bands}), got {list(bands)}."
        )
    return list(bands)


class _Window(NamedTuple):
    """Pixels `[C, h, w]` that hold `regions`, with the (row, column) of their top left corner."""

    regions: list[int]
    origin: tuple[int, int]
    pixels: torch.Tensor


def _runs(regions: list[int], grid: RegionGrid) -> Iterator[list[int]]:
    """Splits region numbers into runs of neighbours in one row, so that one read serves a run."""
    run: list[int] = []
    for region in regions:
        if run and (region // grid.cols != run[-1] // grid.cols or abs(region - run[-1]) != 1):
            yield run
            run = []
        run.append(region)
    if run:
        yield run


def _read_run(
    source: ImageSource,
    grid: RegionGrid,
    run: list[int],
    bands: list[int] | None,
    fill: float | None,
) -> _Window:
    top, left, height, _ = grid.box(min(run))
    _, last, _, width = grid.box(max(run))
    pixels = source.read(top, left, height, last + width - left)
    if bands is not None:
        pixels = pixels[bands]
    if pixels.dtype.kind == "f":
        finite = np.isfinite(pixels)
        if not finite.all():
            if fill is None:
                band, y, x = (int(i) for i in np.argwhere(~finite)[0])
                raise SourceError(
                    f"{source.name}: expected finite pixels, found {pixels[band, y, x]} at row "
                    f"{top + y}, column {left + x}, band {band + 1}; choose a value for such "
                    f"pixels with fill (--fill)."
                )
            pixels = np.where(finite, pixels, pixels.dtype.type(fill))
    return _Window(run, (top, left), torch.from_numpy(np.require(pixels, requirements=["C", "W"])))


class _Chunk:
    """Token buffers of one chunk, filled by regions in any number and order."""

    def __init__(self, model: XT, grid: RegionGrid, step: Step) -> None:
        self.model, self.grid, self.regions = model, grid, step.regions
        self.missing = len(step.regions)
        self._tokens: torch.Tensor | None = None
        self.raw: torch.Tensor | None = None

    @property
    def tokens(self) -> torch.Tensor:
        assert self._tokens is not None
        return self._tokens

    def add(self, ids: list[int], features: torch.Tensor, raw: torch.Tensor | None) -> None:
        self._tokens = self._put(self._tokens, ids, features, position=True)
        if raw is not None:
            self.raw = self._put(self.raw, ids, raw, position=False)
        self.missing -= len(ids)

    def _put(
        self, buffer: torch.Tensor | None, ids: list[int], features: torch.Tensor, *, position: bool
    ) -> torch.Tensor:
        if buffer is None:
            length = self.grid.placement(self.regions, self.model.stride).length
            buffer = features.new_empty(1, length, features.shape[-1])
        return self.model.stitch(
            features[None], self.grid, ids, self.regions, out=buffer, position=position
        )


class _ReadAhead:
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
