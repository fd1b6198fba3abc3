"""The walk of `XT.forward` over an image that does not fit: bounded memory, one direction.

Reader threads fetch the windows of the next batches; the main thread cuts them into regions,
encodes full batches of regions that are new, stitches features into the token buffer of their
chunk in visiting order, and runs the context encoder when the chunk is complete; a writer thread
takes results to the CPU and to the disk. On CUDA the main thread only queues work: copies on a
stream of their own, results on another, all else on the current one; it waits where the device or
the writer is too far behind. Live at any time: the windows of `readers + 2` batches, one batch of
activations, the regions kept for reuse, the buffer of one chunk, and the memory of the context
encoder. None of them depends on the size of the image.
"""

from __future__ import annotations

import json
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import asdict, dataclass
from numbers import Integral, Real
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch

from xt_kernels.regions import RegionGrid

from .context_encoder import Memory
from .encoding import BatchEncoder, Features, Seen, rows_of_a_batch
from .grid import Step
from .group_walk import Piece
from .heads.boxes import BoxHead
from .heads.classification import Classifier
from .heads.xview3 import XView3Head
from .host import current_rss, peak_rss, reset_peak_rss
from .journal import Run, identity_of, open_run
from .model import XT, Encoded
from .output import Thumbnail, TokenMapWriter, WriteBehind, write_embedding, write_preview
from .predictions import HeadOutputs, MapFormat, Maps, read_boxes, read_points
from .profiling import Profile, Spans, no_spans
from .reading import Buffers, Key, LeftOut, ReadAhead, Reader, Window, region_pixels
from .source import ImageSource, SourceError, open_image

Precision = Literal["float32", "bfloat16", "float16"]

BATCHES_QUEUED = 2
"""Batches that a CUDA device may have to do beside the one that was queued last: it never runs dry,
and what waits for it is bounded."""

MAX_WAITING = 1024
"""Visits that may wait for a batch to fill. They hold no memory of their own: what stands behind
the first of them is either in the same batch or kept for reuse anyway."""


class ChunkTokens(NamedTuple):
    """One chunk out of the context encoder.

    step: its place in `model.walk`. regions: its region numbers, less those left out. tokens:
    `[L, C]`, row-major over them, on the model's device. summary: its part of the embedding,
    `[1, C]`. memory: what the next chunk will see, or None; a model with memory="kv" writes over it
    in the next chunks. left_out: why the other regions of the chunk have no tokens. stages: earlier
    stages that heads use, region -> number -> map `[s_i, s_i, C_i]`. first, rows: the visit whose
    batch the next chunk needs first, and the regions encoded at once by now.
    """

    step: int
    regions: tuple[int, ...]
    tokens: torch.Tensor
    summary: torch.Tensor
    memory: Memory | None
    left_out: dict[int, str]
    stages: dict[int, dict[int, torch.Tensor]]
    first: int
    rows: int


class Visit(NamedTuple):
    """One region as the walk passes by. twin: the region whose features it takes, itself where they
    were encoded for this visit or an earlier one; None if it is left out. reused: not for this one.
    """

    region: int
    twin: int | None
    reused: bool


@dataclass(frozen=True)
class StreamStats:
    """What a run cost, in bytes and seconds. Memory is resident memory of the process; the base is
    that before the first window was read, with the model loaded.

    regions: visits, those of a first pass included; of these, `reused` had the pixels of a region
    before them and `left_out` have no tokens. resumed: times that the run was taken up again; the
    other numbers cover all its parts, but for memory.
    """

    regions: int
    reused: int
    left_out: int
    tokens: int
    chunks: int
    seconds: float
    bytes_read: int
    base_memory: int
    peak_memory: int
    resumed: int

    @property
    def regions_per_s(self) -> float:
        """Regions visited a second, reading, context and writing included."""
        return self.regions / self.seconds


@dataclass(frozen=True)
class StreamResult:
    """embedding `[C]` and logits `[classes]` or None, float32; stats; out: folder or None; heads,
    by name: scores `[classes]`; boxes, scores, labels; or points; maps are in files only.
    """

    embedding: np.ndarray[Any, np.dtype[np.float32]]
    logits: np.ndarray[Any, np.dtype[np.float32]] | None
    stats: StreamStats
    out: Path | None
    heads: dict[str, Any]


def stream_chunks(
    model: XT,
    source: ImageSource,
    *,
    batch_size: int | None = None,
    readers: int = 2,
    bands: Sequence[int] | None = None,
    fill: float | None = None,
    reuse: bool = True,
    drop: float | Literal["nodata"] | None = None,
    on_bad_tile: Literal["stop", "mask"] = "stop",
    precision: Precision | None = None,
    compile: bool | None = None,
    stages: bool = False,
    on_regions: Callable[[Sequence[int], torch.Tensor], None] | None = None,
    on_visits: Callable[[Sequence[Visit]], None] | None = None,
    spans: Spans = no_spans,
    start: int = 0,
    memory: Memory | None = None,
    first: int = 0,
    rows: int | None = None,
) -> Iterator[ChunkTokens]:
    """Walks over the image and gives the tokens of each chunk as soon as they are there.

    model: in evaluation mode; its device and dtype are used.
    source: what `open_image` returns. bands: band numbers from 0, default all.
    batch_size: regions encoded at once; None is 16, of SwinV2 on a CPU 8. readers: threads that
        read ahead.
    fill: value for NaN and infinite pixels; None refuses them.
    reuse: encode regions with identical pixels once; no bit of the result changes by it.
    drop: leave out the tokens of regions that hold nothing but this value, or but the image's own
        nodata value. This changes the result: no other token sees them.
    on_bad_tile: "stop" raises for a tile that does not decode; "mask" leaves out its regions.
    precision: of the region encoder; the context encoder, which is a small part of the work, keeps
        the model's. None is the model's for both.
    compile: run the region encoder under torch.compile; None is on CUDA only, where graphs replay
        it. Compiled once for all images: every batch then has `batch_size` regions. The context
        encoder is not compiled: the lengths of its sequences change with the image.
    stages: give the earlier stages that heads use.
    on_regions: called with region numbers and normalised regions `[R, C, s, s]` of each batch, a
        buffer that the next batch fills again. Regions that are reused are not among them.
    on_visits: called with the visits that are done, in the order of the walk.
    spans: takes the times of what the main thread does.
    start, memory, first, rows: begin with this step of `model.walk`, and what the chunk before it
        gave: no region then changes its slot in a batch, nor the batch its shape.

    The tokens do not depend on batch_size, readers or the order in which reads finish, beyond the
    rounding of the backbone's own batched arithmetic.
    Raises ValueError for numbers out of range or a wrong band count, SourceError for bad pixels.
    """
    device = next(model.parameters()).device
    batch_size = default_batch_size(model) if batch_size is None else batch_size
    check_options(batch_size=batch_size, readers=readers, fill=fill, drop=drop)
    check_options(on_bad_tile=on_bad_tile, precision=precision)
    chosen = check_bands(model, source, bands)
    grid = model.grid(source.height, source.width)
    steps = model.walk(grid)
    order = [region for step in steps for region in step.regions]
    compiled = is_compiled(device, compile)
    batch_size = rows_of_a_batch(len(order), batch_size, compiled)
    batches = [order[i : i + batch_size] for i in range(first, len(order), batch_size)]
    dropped, mask = drop_value(source, drop), on_bad_tile == "mask"
    is_cuda = device.type == "cuda"
    reader = Reader(source, grid, chosen, fill, reuse, dropped, mask, is_cuda, Buffers())
    dtype = precision and getattr(torch, precision)
    encoder = BatchEncoder(model, batch_size, dtype, stages, compiled)
    encoder.rows = rows or batch_size
    walk = _Walk(model, source, grid, steps, encoder, on_regions, on_visits, spans)
    walk.begin([k for k, step in enumerate(steps) for _ in step.regions], start, memory, first)
    with torch.inference_mode(), ReadAhead(reader.read, batches, readers) as results:
        if compiled:
            with spans("compile"):
                encoder.warm_up()
        for _ in batches:
            with spans("idle"):
                windows = next(results)
            for window in windows:
                yield from walk.take(window)
        yield from walk.finish()


def default_batch_size(model: XT) -> int:
    """Regions encoded at once where nobody says: 16, of SwinV2 on a CPU 8. Window attention takes
    scratch for the whole batch: on one thread of an AMD EPYC (Zen 5), 346 MiB above the model and
    not 626, at no less speed. ConvNeXt is a third faster in batches of 16.
    """
    on_cpu = next(model.parameters()).device.type == "cpu"
    return 8 if on_cpu and model.config.encoder.startswith("swin") else 16


def is_compiled(device: torch.device, compile: bool | None) -> bool:
    """What `compile` means on a device."""
    return device.type == "cuda" if compile is None else compile


class _Waiting(NamedTuple):
    """A visit whose features may not be there yet, or a region that is left out. first: the visit
    that its batch began with."""

    step: int
    region: int
    features: Features | LeftOut
    reused: bool
    first: int

    @property
    def is_ready(self) -> bool:
        return isinstance(self.features, LeftOut) or self.features.batch is not None


class _Walk:
    """What is between the windows that come in and the chunks that go out."""

    def __init__(
        self,
        model: XT,
        source: ImageSource,
        grid: RegionGrid,
        steps: list[Step],
        encoder: BatchEncoder,
        on_regions: Callable[[Sequence[int], torch.Tensor], None] | None,
        on_visits: Callable[[Sequence[Visit]], None] | None,
        spans: Spans,
    ) -> None:
        self._spans = spans
        self._model, self._grid, self._steps, self._encoder = model, grid, steps, encoder
        self._on_regions, self._on_visits = on_regions, on_visits
        self._seen = Seen(region_bytes(model, source, encoder.regions.dtype))
        device = encoder.regions.device
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._queued: deque[torch.cuda.Event] = deque()
        self._batch: list[Features] = []
        self._waiting: deque[_Waiting] = deque()
        self._chunk: _Chunk | None = None

    def begin(self, steps: list[int], start: int, memory: Memory | None, first: int) -> None:
        """steps: the step of each visit. first: the visit to come; those before step `start` are
        only encoded."""
        self._step_of_visit, self._start, self._memory = steps, start, memory
        self._visits = self._first = first  # visits taken; that with which the batch began

    def take(self, window: Window) -> Iterator[ChunkTokens]:
        """Puts the regions of a window in their batch; chunks that are complete come out."""
        fresh: list[int] = []
        for region, key in zip(window.regions, window.keys, strict=True):
            if not self._batch:
                self._first = self._visits
            features = key if isinstance(key, LeftOut) else self._reused(window, region, key)
            reused = isinstance(features, Features)
            if features is None:
                features = Features(region)
                if isinstance(key, Key):
                    self._seen.add(key, self._pixels(window, region), features)
                self._batch.append(features)
                fresh.append(region)
            step = self._step_of_visit[self._visits]
            self._visits += 1
            self._waiting.append(_Waiting(step, region, features, reused, self._first))
            is_full = len(self._batch) == len(self._encoder.regions)
            if is_full or (self._batch and self._visits - self._first >= MAX_WAITING):
                self._extract(window, fresh)
                fresh = []
                self._encode()
                yield from self._done()
        self._extract(window, fresh)
        yield from self._done()

    def finish(self) -> Iterator[ChunkTokens]:
        """The chunks that still wait for a batch to fill."""
        self._encode()
        yield from self._done()

    def _pixels(self, window: Window, region: int) -> np.ndarray[Any, np.dtype[Any]]:
        return region_pixels(window.pixels.numpy(), self._grid, window.origin, region)

    def _reused(self, window: Window, region: int, key: Key | None) -> Features | None:
        """The features of an earlier region with the same pixels, if any can be had."""
        if key is None:
            return None
        features = self._seen.find(key, self._pixels(window, region))
        return features if features is not None and self._encoder.slots_agree() else None

    def _extract(self, window: Window, regions: list[int]) -> None:
        """Cuts regions, the last ones that the batch took, into its buffer."""
        if not regions:
            return
        buffer, end = self._encoder.regions, len(self._batch)
        part = buffer[end - len(regions) : end]
        with self._spans("copy"):
            pixels = self._on_device(window.pixels)
            self._model.extract(pixels, self._grid, regions, window.origin, out=part)

    def _on_device(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels on the model's device; on CUDA copied beside what is computed."""
        device = self._encoder.regions.device
        if self._copies is None:
            return pixels.to(device)
        with torch.cuda.stream(self._copies):
            pixels = pixels.to(device, non_blocking=True)
        computing = torch.cuda.current_stream(device)
        computing.wait_stream(self._copies)
        pixels.record_stream(computing)
        return pixels

    def _encode(self) -> None:
        if not self._batch:
            return
        if self._on_regions is not None:
            ids = [features.region for features in self._batch]
            self._on_regions(ids, self._encoder.regions[: len(ids)])
        with self._spans("encode"):
            batch = self._encoder.encode()
        for index, features in enumerate(self._batch):
            features.settle(batch, index)
        self._batch.clear()
        if self._copies is not None:
            self._queued.append(torch.cuda.current_stream(self._copies.device).record_event())
            if len(self._queued) > BATCHES_QUEUED:
                self._queued.popleft().synchronize()

    def _done(self) -> Iterator[ChunkTokens]:
        """Stitches the visits that are ready, in the order of the walk."""
        while self._waiting and self._waiting[0].is_ready:
            k = self._waiting[0].step
            group = []
            while self._waiting and self._waiting[0].step == k and self._waiting[0].is_ready:
                group.append(self._waiting.popleft())
            if k < self._start:
                continue
            if self._chunk is None:
                self._chunk = _Chunk(self._model, self._grid, self._steps[k])
            with self._spans("stitch"):
                self._chunk.add(group)
            if self._on_visits is not None:
                self._on_visits([_visit(waiting) for waiting in group])
            if not self._chunk.missing:
                chunk, self._chunk = self._chunk, None
                with self._spans("context"):
                    mixed = self._mix(k, chunk)
                if self._steps[k].emit:
                    yield mixed

    def _mix(self, step: int, chunk: _Chunk) -> ChunkTokens:
        left_out = chunk.left_out
        regions = tuple(region for region in chunk.regions if region not in left_out)
        if regions:
            tokens, summary, self._memory = self._model.mix(chunk.tokens, chunk.raw, self._memory)
        else:
            tokens = self._encoder.regions.new_zeros(1, 0, self._model.num_features)
            summary = tokens.sum(1)
        first = self._waiting[0].first if self._waiting else self._visits
        return ChunkTokens(
            step, regions, tokens[0], summary, self._memory, left_out, chunk.stages, first,
            self._encoder.rows,
        )  # fmt: skip


def region_bytes(model: XT, source: ImageSource, dtype: torch.dtype) -> int:
    """Bytes of the pixels and the features of one region."""
    side, encoder = model.config.region, model.region_encoder
    width = model.num_features + (model.config.dim if model.output_proj is not None else 0)
    floats = (side // model.stride) ** 2 * width
    floats += sum((side // encoder.strides[i]) ** 2 * encoder.channels[i] for i in model.stages)
    return source.bands * side**2 * source.dtype.itemsize + floats * dtype.itemsize


def _visit(waiting: _Waiting) -> Visit:
    features = waiting.features
    twin = None if isinstance(features, LeftOut) else features.region
    return Visit(waiting.region, twin, waiting.reused)


class _Chunk:
    """Token buffers of one chunk, filled by regions in any number and order."""

    def __init__(self, model: XT, grid: RegionGrid, step: Step) -> None:
        self._model, self._grid, self.regions = model, grid, step.regions
        self.missing = len(step.regions)
        self.left_out: dict[int, str] = {}
        self.stages: dict[int, dict[int, torch.Tensor]] = {}
        self._tokens: torch.Tensor | None = None
        self._raw: torch.Tensor | None = None

    @property
    def tokens(self) -> torch.Tensor:
        """`[1, L, C]`, without the places of regions that are left out."""
        assert self._tokens is not None
        return self._kept(self._tokens)

    @property
    def raw(self) -> torch.Tensor | None:
        """`[1, L, D]` where the residual form needs them."""
        return None if self._raw is None else self._kept(self._raw)

    def add(self, group: list[_Waiting]) -> None:
        """Stitches regions whose features are there, and notes those that are left out."""
        self.missing -= len(group)
        ids: list[int] = []
        found: list[Features] = []
        for waiting in group:
            if isinstance(waiting.features, LeftOut):
                self.left_out[waiting.region] = waiting.features.reason
            else:
                ids.append(waiting.region)
                found.append(waiting.features)
                self.stages[waiting.region] = waiting.features.stages()
        if not ids:
            return
        rows = list(_rows(found))
        self._tokens = self._put(self._tokens, ids, [r.features for r in rows], position=True)
        raws = [r.raw for r in rows if r.raw is not None]
        if raws:
            self._raw = self._put(self._raw, ids, raws, position=False)

    def _put(
        self,
        buffer: torch.Tensor | None,
        ids: list[int],
        parts: list[torch.Tensor],
        *,
        position: bool,
    ) -> torch.Tensor:
        features = parts[0] if len(parts) == 1 else torch.cat(parts)
        if buffer is None:
            length = self._grid.placement(self.regions, self._model.stride).length
            buffer = features.new_empty(1, length, features.shape[-1])
        return self._model.stitch(
            features[None], self._grid, ids, self.regions, out=buffer, position=position
        )

    def _kept(self, tokens: torch.Tensor) -> torch.Tensor:
        if not self.left_out:
            return tokens
        placement = self._grid.placement(self.regions, self._model.stride)
        keep = torch.ones(placement.length, dtype=torch.bool)
        for region in self.left_out:
            start, pitch, height, width, _, _ = placement.table[placement.slots[region]].tolist()
            keep.as_strided((height, width), (pitch, 1), start).zero_()
        places = keep.nonzero()[:, 0]
        if tokens.is_cuda:  # neither a mask's count nor a copy then makes the host wait
            places = places.pin_memory().to(tokens.device, non_blocking=True)
        return tokens.index_select(1, places)


def _rows(found: list[Features]) -> Iterator[Encoded]:
    """Rows of batches in order, neighbours in one batch as one slice."""
    first = 0
    for i, features in enumerate(found):
        after = found[i + 1] if i + 1 < len(found) else None
        if (
            after is not None
            and after.batch is features.batch
            and after.index == features.index + 1
        ):
            continue
        assert features.batch is not None
        rows = slice(found[first].index, features.index + 1)
        first = i + 1
        yield features.batch.map(itemgetter(rows))


def stream(
    model: XT,
    source: ImageSource | str | Path | Any,
    out: str | Path | None = None,
    *,
    batch_size: int | None = None,
    readers: int = 2,
    bands: Sequence[int] | None = None,
    fill: float | None = None,
    reuse: bool = True,
    drop: float | Literal["nodata"] | None = None,
    on_bad_tile: Literal["stop", "mask"] = "stop",
    precision: Precision | None = None,
    compile: bool | None = None,
    tokens: bool = True,
    preview: bool = True,
    heads: bool = True,
    maps: Maps = "prediction",
    map_format: MapFormat = "tif",
    checkpoint_seconds: float = 10.0,
    progress: Callable[[int], None] | None = None,
    profile: Profile | None = None,
) -> StreamResult:
    """Runs `model` over an image of any size in bounded memory and writes the results as they come.

    source: an `ImageSource`, or anything that `open_image` takes.
    out: folder to make, holding `tokens.zarr`, `embedding.json`, `preview.png` and `run.json`, and
        the files of heads; must not exist. It appears under its name only when it is complete. None
        writes nothing.
    tokens: write the token map. preview: make the picture, of the token map.
    heads: run the heads of `XTConfig.heads`; those that give maps only if there is an `out`.
    maps: "prediction", classes or scores, or "logits". map_format: "tif", a tiled BigTIFF (a
        cloud-optimised one where rasterio is installed), or "zarr".
    checkpoint_seconds: how often the state of the run is saved in `<out>.part`. The same call after
        a run that was stopped, in whatever way, goes on from there and gives the same bytes.
    progress: called with the number of regions done since the last call.
    profile: takes the times.
    The other arguments are those of `stream_chunks`.

    Raises OSError for `out`, ValueError if `<out>.part` is a run with another image, model or
    setting, and what `stream_chunks` raises. Nothing is left then if no state was saved yet.
    """
    opened = source if isinstance(source, ImageSource) else open_image(source)
    was_training = model.training
    model.eval()
    spans = no_spans if profile is None else profile
    opened.spans = spans
    device = next(model.parameters()).device
    options: dict[str, Any] = {
        "batch_size": default_batch_size(model) if batch_size is None else batch_size,
        "bands": bands,
        "fill": fill,
        "drop": drop,
        "precision": precision,
        "compile": is_compiled(device, compile),
    }
    try:
        check_bands(model, opened, bands)
        given: dict[str, Any] = {"readers": readers, "on_bad_tile": on_bad_tile, "maps": maps}
        given |= {"map_format": map_format, "checkpoint_seconds": checkpoint_seconds}
        checked = check_options(**options | given)
        options |= {name: checked[name] for name in options}
        if not opened.height or not opened.width:
            raise SourceError(f"{opened.name}: expected at least one pixel, found none.")
        files = _Files(tokens, preview and tokens, heads and len(model.heads) > 0, maps, map_format)
        streamed = _Streamed(model, opened, spans, files)
        with ExitStack() as stack:
            if out is not None:
                identity = identity_of(model, opened, options | asdict(files))
                streamed.open(stack.enter_context(open_run(out, identity)))
            if streamed.stats is None:
                options |= {"readers": readers, "reuse": reuse, "on_bad_tile": on_bad_tile}
                streamed.run(checkpoint_seconds, progress, **options)
    finally:
        model.train(was_training)
        opened.spans = no_spans
        if opened is not source:
            opened.close()
        if profile is not None:
            profile.finish()
    assert streamed.stats is not None
    where = None if out is None else Path(out)
    return StreamResult(streamed.embedding, streamed.logits, streamed.stats, where, streamed.heads)


@dataclass(frozen=True)
class _Files:
    """What a run writes; part of what its bytes depend on."""

    tokens: bool
    preview: bool
    heads: bool
    maps: Maps
    map_format: MapFormat


class _Streamed:
    """One call of `stream`: sums over the chunks, and what is written of them."""

    def __init__(self, model: XT, source: ImageSource, spans: Spans, files: _Files) -> None:
        self._model, self._source, self._spans, self._files = model, source, spans, files
        self._grid = model.grid(source.height, source.width)
        self._run: Run | None = None
        self._map: TokenMapWriter | None = None
        self._thumbnail: Thumbnail | None = None
        self._outputs: HeadOutputs | None = None
        self._state: dict[str, Any] = {
            "step": -1, "memory": None, "total": None, "visits": 0, "reused": 0, "chunks": 0,
            "left_out": {}, "seconds": 0.0, "bytes_read": 0, "resumed": 0, "held": {},
            "first": 0, "rows": None,
        }  # fmt: skip
        self._new: list[Path] = []
        """Files that are whole and that no checkpoint knows yet."""
        self.stats: StreamStats | None = None
        self.embedding: np.ndarray[Any, np.dtype[np.float32]]
        self.logits: np.ndarray[Any, np.dtype[np.float32]] | None = None
        self.heads: dict[str, Any] = {}

    def open(self, run: Run) -> None:
        """Takes up the run where it stands."""
        self._run = run
        if run.record is not None:  # all is written, and only the folder has not its name yet
            written = json.loads((run.part / "embedding.json").read_text())
            self.embedding = np.array(written["embedding"], dtype=np.float32)
            if "logits" in written:
                self.logits = np.array(written["logits"], dtype=np.float32)
            for name, head in self._model.heads.items() if self._files.heads else ():
                if isinstance(head, BoxHead):
                    self.heads[name] = read_boxes(run.part / f"{name}.json")
                elif isinstance(head, XView3Head):
                    self.heads[name] = read_points(run.part / f"{name}.csv")
                elif isinstance(head, Classifier):
                    scores = written["heads"][name]["scores"]
                    self.heads[name] = np.array(scores, dtype=np.float32)
            self.stats = StreamStats(**run.record["stats"])
            return
        blocks = saved = None
        if run.state is not None:
            device = next(self._model.parameters()).device
            self._state = run.state
            self._state["resumed"] += 1
            blocks, saved = self._state.pop("blocks"), self._state.pop("saved")
            for held in self._state["held"].values():
                held |= {name: value.to(device) for name, value in held.items()}
            for name in ("memory", "total"):
                if self._state[name] is not None:
                    self._state[name] = self._state[name].to(device)
        if self._files.preview:
            path = run.journal / "thumbnail"
            self._thumbnail = Thumbnail(self._grid, self._model, self._source, path)
        if self._files.tokens:
            path = run.part / "tokens.zarr"
            self._map = TokenMapWriter(path, self._model, self._grid, self._source, blocks)
        if self._files.heads:
            self._open_outputs(saved)

    def _open_outputs(self, saved: dict[str, Any] | None) -> None:
        run, state = self._run, self._state
        steps = self._model.walk(self._grid)[: state["step"] + 1]
        self._outputs = HeadOutputs(
            self._model,
            self._source,
            self._files.maps,
            self._files.map_format,
            None if run is None else run.part,
            None if run is None else run.journal / "maps",
            [region for step in steps if step.emit for region in step.regions],
            list(state["left_out"]),
            state["held"],
            saved,
        )

    def run(
        self, checkpoint_seconds: float, progress: Callable[[int], None] | None, **options: Any
    ) -> None:
        """The walk from where the run stands to its end."""
        if self._files.heads and self._run is None:
            self._open_outputs(None)
        state, before = self._state, dict(self._state)
        reset_peak_rss()
        base, read_before, start = current_rss(), self._source.bytes_read, time.perf_counter()
        saved = start
        if progress is not None and state["visits"]:
            progress(state["visits"])

        def on_visits(group: Sequence[Visit]) -> None:
            # Visits come before the chunk that they complete, so a chunk's state counts them all.
            state["visits"] += len(group)
            state["reused"] += sum(visit.reused for visit in group)
            pairs = [(v.region, v.twin) for v in group if v.twin not in (None, v.region)]
            if self._thumbnail is not None and pairs:
                writer.submit(self._thumbnail.repeat, pairs)
            if progress is not None:
                progress(len(group))

        def on_regions(ids: Sequence[int], regions: torch.Tensor) -> None:
            # Shrunk here, brought to the CPU by the writer: the device is not waited for.
            if self._thumbnail is not None:
                writer.submit(self._thumbnail.put, list(ids), self._thumbnail.shrink(regions))

        def count() -> None:
            state["seconds"] = before["seconds"] + time.perf_counter() - start
            state["bytes_read"] = before["bytes_read"] + self._source.bytes_read - read_before

        with WriteBehind(next(self._model.parameters()).device) as writer:
            for chunk in stream_chunks(
                self._model,
                self._source,
                on_regions=on_regions,
                on_visits=on_visits,
                stages=self._outputs is not None,
                spans=self._spans,
                start=state["step"] + 1,
                memory=state["memory"],
                first=state["first"],
                rows=state["rows"],
                **options,
            ):
                pieces: list[Piece] = []
                if self._outputs is not None:
                    with self._spans("heads"):
                        pieces = self._outputs.take(
                            chunk.regions, chunk.tokens, chunk.stages, list(chunk.left_out)
                        )
                if self._map is not None or pieces:
                    with self._spans("idle"):
                        writer.submit(self._write, chunk._replace(stages={}), pieces)
                total = state["total"]
                state["total"] = chunk.summary if total is None else total + chunk.summary
                for name in ("step", "memory", "first", "rows"):
                    state[name] = getattr(chunk, name)
                state["chunks"] += 1
                state["left_out"] |= chunk.left_out
                if self._run is not None and time.perf_counter() - saved >= checkpoint_seconds:
                    count()
                    with self._spans("idle"):
                        writer.submit(self._checkpoint, deepcopy(state))
                    saved = time.perf_counter()
            count()
            if self._run is not None:
                writer.submit(self._checkpoint, deepcopy(state))
            writer.wait()
        self._source.check_unchanged()
        with self._spans("write"):
            self._finish(base)

    def _write(self, chunk: ChunkTokens, pieces: list[Piece]) -> None:
        with self._spans("write"):
            if self._map is not None:
                self._map.add(chunk.regions, chunk.tokens)
                self._map.leave_out(chunk.left_out)
                self._new += self._map.written
                self._map.written.clear()
            if self._outputs is not None:
                self._new += self._outputs.write(pieces)

    def _checkpoint(self, state: dict[str, Any]) -> None:
        assert self._run is not None
        with self._spans("write"):
            if self._thumbnail is not None:
                self._thumbnail.sync()
            state["blocks"] = None if self._map is None else self._map.blocks
            state["saved"] = None if self._outputs is None else self._outputs.saved
            self._run.checkpoint(state, self._new)
            self._new.clear()

    def _finish(self, base: int) -> None:
        """Embedding, scores, stats, and the files that hold them."""
        state, model = self._state, self._model
        rows, cols = self._grid.token_shape(model.stride)
        tokens = rows * cols
        if state["left_out"]:
            sizes = self._grid.placement(None, model.stride).table[list(state["left_out"]), 2:4]
            tokens -= int(sizes.prod(1).sum())
        if not tokens:
            first = next(iter(state["left_out"].values()))
            raise SourceError(
                f"{self._source.name}: expected a region to encode, found all left out ({first})."
            )
        with torch.inference_mode():
            embedding = model.embed(state["total"], tokens)
            self.embedding = embedding[0].float().cpu().numpy()
            if model.head is not None:
                self.logits = model.head(embedding)[0].float().cpu().numpy()
            for name, head in model.heads.items() if self._files.heads else ():
                if isinstance(head, Classifier):
                    self.heads[name] = head.predict(head(embedding))[0].cpu().numpy()
        scores = dict(self.heads)
        files: list[Path] = []
        if self._map is not None:
            self._map.close()
        if self._outputs is not None:
            found, files = self._outputs.finish()
            self.heads |= found
        self.stats = StreamStats(
            regions=state["visits"],
            reused=state["reused"],
            left_out=len(state["left_out"]),
            tokens=tokens,
            chunks=state["chunks"],
            seconds=state["seconds"],
            bytes_read=state["bytes_read"],
            base_memory=base,
            peak_memory=peak_rss(),
            resumed=state["resumed"],
        )
        if self._run is None:
            return
        part = self._run.part
        files.append(part / "embedding.json")
        write_embedding(files[-1], model, self._source, self.embedding, self.logits, scores)
        if self._thumbnail is not None:
            files.append(part / "preview.png")
            write_preview(files[-1], part / "tokens.zarr", self._thumbnail, model, self._source)
        left_out = {str(region): why for region, why in sorted(state["left_out"].items())}
        self._run.finish({"stats": asdict(self.stats), "left_out": left_out}, files)


_CHOICES: dict[str, tuple[str, ...]] = {
    "on_bad_tile": ("stop", "mask"),
    "precision": get_args(Precision),
    "maps": get_args(Maps),
    "map_format": get_args(MapFormat),
}


def check_options(**options: Any) -> dict[str, Any]:
    """Options of `stream`, numbers as Python's own. Raises ValueError for one it cannot take."""
    for name, value in options.items():
        rule = _broken_rule(name, value)
        if rule:
            raise ValueError(f"stream: {name} must {rule}, got {value!r}.")
        if isinstance(value, Real):
            options[name] = int(value) if isinstance(value, Integral) else float(value)
    return options


def _broken_rule(name: str, value: Any) -> str:
    """What an option must, and does not; empty if all is well."""
    if name in _CHOICES:
        known = value in _CHOICES[name] or (value is None and name == "precision")
        return "" if known else f"be one of {', '.join(_CHOICES[name])}"
    if name in ("batch_size", "readers"):
        if not isinstance(value, Integral):
            return "be a whole number"
        return "" if int(value) >= 1 else "be at least 1"
    if name == "drop":
        known = value in (None, "nodata") or isinstance(value, Real)
        return "" if known else "be a number, 'nodata' or None"
    if name == "fill":
        known = value is None or (isinstance(value, Real) and math.isfinite(value))
        return "" if known else "be a finite number or None"
    if name == "checkpoint_seconds":
        known = isinstance(value, Real) and float(value) >= 0
        return "" if known else "be a number of at least 0"
    return ""


def drop_value(source: ImageSource, drop: float | str | None) -> float | None:
    """The value whose regions are left out. Raises ValueError for "nodata" without one."""
    if drop != "nodata":
        return None if drop is None else float(drop)
    value = source.metadata.get("nodata")
    if value is None:
        raise ValueError(
            f"{source.name} names no nodata value: give the value to leave out with drop (--drop)."
        )
    return float(value)


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
