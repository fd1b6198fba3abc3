"""What a run leaves behind: token map (zarr), embedding and scores (JSON), preview (PNG)."""

from __future__ import annotations

import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
import torch.nn.functional as F

import xt_kernels
from xt_kernels.regions import RegionGrid

if TYPE_CHECKING:
    from .model import XT
    from .source import ImageSource

REGIONS_PER_BLOCK = 8
"""Regions of one row in a block of the token map: 64 tokens wide at 256 px and stride 32, 1.5 MB at
768 float32 channels, 1,470 files for 29,000 x 25,000 px."""

PREVIEW_SIDE = 1024
"""Pixels that the longer side of the preview's thumbnail has at most (more if tokens demand it)."""


@contextmanager
def OutputFolder(out: str | Path | None) -> Iterator[Path | None]:
    """A folder to fill, `<out>.part`, that becomes `out` at the end or vanishes on any failure.

    Raises FileExistsError if `out` or `<out>.part` exists, FileNotFoundError without a parent
    folder, PermissionError where it cannot be made.
    """
    if out is None:
        yield None
        return
    final = Path(out)
    part = check_output(final)
    part.mkdir()
    try:
        yield part
        os.rename(part, final)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def check_output(out: str | Path) -> Path:
    """The `.part` folder beside `out`. Raises as `OutputFolder` does, and makes nothing."""
    final = Path(out)
    part = final.with_name(final.name + ".part")
    if final.exists() or final.is_symlink():
        raise FileExistsError(f"Output {final} exists already: name another, or remove it.")
    if part.exists():
        raise FileExistsError(
            f"{part} exists: another run is writing to it or was killed; remove it if none runs."
        )
    parent = final.absolute().parent
    if not parent.is_dir():
        raise FileNotFoundError(f"Output folder {parent} does not exist: make it first.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise PermissionError(f"Output folder {parent} cannot be written to.")
    return part


class WriteBehind:
    """Runs calls in order on one thread, at most `depth` behind; on CUDA on a stream of its own,
    each after what was queued before it. Nobody may write over what a call reads, and it must be on
    the CPU when the call ends. What a call raised, every later `submit` and `wait` raises; nothing
    runs after it, also of what was queued before anybody knew.
    """

    def __init__(self, device: torch.device, depth: int = 4) -> None:
        is_cuda = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if is_cuda else None  # type: ignore[no-untyped-call]
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="xt-writer")
        self._queue: deque[Future[None]] = deque()
        self._depth = depth
        self._error: BaseException | None = None

    def submit(self, job: Callable[..., None], *args: Any) -> None:
        """Queues `job(*args)`; waits while the queue is full."""
        while len(self._queue) > self._depth or (self._queue and self._queue[0].done()):
            self._queue.popleft().result()
        if self._error is not None:
            raise self._error
        now = None
        if self._stream is not None:
            now = torch.cuda.current_stream(self._stream.device).record_event()
        self._queue.append(self._pool.submit(self._run, now, job, *args))

    def _run(self, after: torch.cuda.Event | None, job: Callable[..., None], *args: Any) -> None:
        if self._error is not None:
            raise self._error
        try:
            with torch.cuda.stream(self._stream):  # nothing where there is none
                if self._stream is not None and after is not None:
                    self._stream.wait_event(after)
                job(*args)
        except BaseException as error:
            self._error = error
            raise

    def wait(self) -> None:
        """Waits until all is done."""
        while self._queue:
            self._queue.popleft().result()
        if self._error is not None:
            raise self._error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


class MapWriter:
    """Writes a map as the zarr array `[rows, cols, C]`, block by block as regions arrive.

    A block holds `REGIONS_PER_BLOCK` neighbours of one region row; it is written once, when its
    last region has come, so a row-major or zig-zag walk keeps at most three blocks in memory.

    stride: pixels a cell. empty: value where there is none. attributes: of the array.
    written: files since the caller last emptied it. blocks: what `blocks` was when an earlier
    writer of the same files stopped; None starts a new map.
    """

    def __init__(
        self,
        path: Path,
        grid: RegionGrid,
        stride: int,
        channels: int,
        dtype: str,
        empty: float,
        attributes: dict[str, Any],
        blocks: dict[str, Any] | None = None,
    ) -> None:
        import zarr
        from zarr.codecs import BloscCodec

        self._path, self._grid, self._empty = path, grid, empty
        self._side = grid.region // stride
        self._blocks: dict[tuple[int, int], tuple[np.ndarray[Any, Any], int]] = {}
        self.written: list[Path] = []
        # A block of nothing but the fill value is a file all the same: the journal names it.
        with zarr.config.set({"array.write_empty_chunks": True}):
            if blocks is not None:
                self._array = zarr.open_array(str(path), mode="r+")
                for key, (block, missing) in blocks.items():
                    row, col = (int(n) for n in key.split(","))
                    self._blocks[row, col] = block.numpy(), missing
                return
            self._array = zarr.create_array(
                str(path),
                shape=(*grid.token_shape(stride), channels),
                chunks=(self._side, self._side * REGIONS_PER_BLOCK, channels),
                dtype=dtype,
                fill_value=empty,
                # A 1.5 MB block of tokens on one core (AMD EPYC, Zen 5): 2.3 ms and 0.89 of its
                # size; with zarr's default 3.6 ms and 0.92, with none 1.2 ms.
                compressors=BloscCodec(cname="lz4", clevel=1, shuffle="shuffle"),
                attributes=attributes,
            )
        self.written.append(path / "zarr.json")

    @property
    def blocks(self) -> dict[str, Any]:
        """The unfinished blocks as plain values and tensors."""
        return {
            f"{row},{col}": (torch.from_numpy(block), missing)
            for (row, col), (block, missing) in self._blocks.items()
        }

    def leave_out(self, regions: Iterable[int]) -> None:
        """Marks regions that have no values."""
        for region in regions:
            self.put(region, None)

    def put(self, region: int, values: np.ndarray[Any, Any] | None) -> None:
        """values: `[h, w, C]` of a region; what lies past the image's edge is not kept."""
        rows, cols, _ = self._array.shape
        row, col = (n * self._side for n in divmod(region, self._grid.cols))
        height, width = min(self._side, rows - row), min(self._side, cols - col)
        key = (region // self._grid.cols, region % self._grid.cols // REGIONS_PER_BLOCK)
        block, missing = self._blocks.get(key) or self._new_block(key)
        top, left = key[0] * self._side, key[1] * self._side * REGIONS_PER_BLOCK
        block[row - top : row - top + height, col - left : col - left + width] = (
            self._empty if values is None else values[:height, :width]
        )
        if missing > 1:
            self._blocks[key] = block, missing - 1
            return
        self._array[top : top + block.shape[0], left : left + block.shape[1]] = block
        self._blocks.pop(key, None)
        self.written.append(self._path / "c" / str(key[0]) / str(key[1]) / "0")

    def close(self) -> None:
        """Checks that every block is there: a reader takes one that is not for empty."""
        missing = self._array.nchunks - self._array.nchunks_initialized
        if missing or self._blocks:
            raise RuntimeError(
                f"{self._path.name}: {missing} of {self._array.nchunks} blocks were never written."
            )

    def _new_block(self, key: tuple[int, int]) -> tuple[np.ndarray[Any, Any], int]:
        rows, cols, channels = self._array.shape
        top, left = key[0] * self._side, key[1] * self._side * REGIONS_PER_BLOCK
        shape = (
            min(self._side, rows - top),
            min(self._side * REGIONS_PER_BLOCK, cols - left),
            channels,
        )
        members = min(REGIONS_PER_BLOCK, self._grid.cols - key[1] * REGIONS_PER_BLOCK)
        return np.empty(shape, dtype=self._array.dtype), members


class TokenMapWriter(MapWriter):
    """Writes tokens as the zarr array `[rows, cols, C]`, float32, NaN where there are none.

    Tokens of one chunk come at a time, row-major over the chunk.
    """

    def __init__(
        self,
        path: Path,
        model: XT,
        grid: RegionGrid,
        source: ImageSource,
        blocks: dict[str, Any] | None = None,
    ) -> None:
        attributes = map_attributes(model, source, model.stride)
        width = model.num_features
        super().__init__(path, grid, model.stride, width, "float32", np.nan, attributes, blocks)
        self._stride = model.stride

    def add(self, regions: Sequence[int], tokens: torch.Tensor) -> None:
        """tokens: `[L, C]`, those of `regions` in row order."""
        values = tokens.detach().float().cpu()
        for region, part in region_tokens(values, self._grid, regions, self._stride):
            self.put(region, part.numpy())


def region_tokens(
    tokens: torch.Tensor, grid: RegionGrid, regions: Sequence[int], stride: int
) -> Iterator[tuple[int, torch.Tensor]]:
    """(region, view `[h, w, C]`) of tokens `[L, C]`, those of `regions` in row order."""
    tokens = tokens.contiguous()
    channels = tokens.shape[1]
    placement = grid.placement(tuple(regions), stride)
    for region, slot in placement.slots.items():
        start, pitch, height, width, _, _ = placement.table[slot].tolist()
        yield (
            region,
            tokens.as_strided(
                (height, width, channels),
                (pitch * channels, channels, 1),
                tokens.storage_offset() + start * channels,
            ),
        )


def map_attributes(model: XT, source: ImageSource, stride: int) -> dict[str, Any]:
    """Where a map lies: cell (i, j) covers pixels [i * stride, (i + 1) * stride) down and the same
    across, from `origin`. `transform` (6 affine numbers) and `mpp` are those of the map.
    """
    out: dict[str, Any] = {
        "stride": stride,
        "origin": [0, 0],
        "image": source.name,
        "image_size": [source.height, source.width],
        "xt_kernels": xt_kernels.__version__,
        "config": asdict(model.config),
    }
    if "crs" in source.metadata:
        out["crs"] = source.metadata["crs"]
    if "transform" in source.metadata:
        a, b, c, d, e, f = source.metadata["transform"]
        out["transform"] = [a * stride, b * stride, c, d * stride, e * stride, f]
    if "mpp" in source.metadata:
        out["mpp"] = [v * stride for v in source.metadata["mpp"]]
    return out


def write_embedding(
    path: Path,
    model: XT,
    source: ImageSource,
    embedding: np.ndarray[Any, Any],
    logits: np.ndarray[Any, Any] | None,
    heads: Mapping[str, np.ndarray[Any, Any]],
) -> None:
    """Writes the image embedding, the class scores, and those of further heads as JSON."""
    record: dict[str, Any] = {
        "image": source.name,
        "image_size": [source.height, source.width],
        "config": asdict(model.config),
        "embedding": embedding.tolist(),
    }
    if logits is not None:
        record |= {"logits": logits.tolist()}
        record |= class_scores(logits, model.class_names.get("head", ()))
    if heads:
        record["heads"] = {
            name: {"scores": scores.tolist()} | named_classes(model.class_names.get(name, ()))
            for name, scores in heads.items()
        }
    path.write_text(json.dumps(record, indent=1))


def named_classes(names: Sequence[str]) -> dict[str, Any]:
    """The names of classes for a record, where they are known."""
    return {"classes": list(names)} if names else {}


def class_scores(logits: np.ndarray[Any, Any], names: Sequence[str] = ()) -> dict[str, Any]:
    """Softmax scores of all classes, and the five best as [class, score]: its name, or its number
    where names are not known."""
    scores = torch.from_numpy(logits).double().softmax(0)
    best = scores.topk(min(5, len(scores)))
    top = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return {
        **named_classes(names),
        "scores": scores.tolist(),
        "top": [[names[i] if names else i, score] for i, score in top],
    }


class Thumbnail:
    """A small picture of the image, averaged from the regions as they pass by.

    One pixel covers `cell` x `cell` image pixels; `cell` divides the encoder's stride. uint8 images
    keep their colours; others are stretched from the 1st to the 99th percentile.

    path: a file that holds the pixels, so that a run that goes on finds those of regions before.
    """

    def __init__(self, grid: RegionGrid, model: XT, source: ImageSource, path: Path) -> None:
        longer, stride = max(grid.height, grid.width), model.stride
        divisors = [d for d in range(1, stride + 1) if stride % d == 0]
        self.cell = next((d for d in divisors if longer <= d * PREVIEW_SIDE), stride)
        self._grid = grid
        self._is_uint8 = source.dtype == np.uint8
        mean, std = model.normalization(torch.uint8 if source.dtype.kind == "u" else torch.float32)
        self._mean = torch.tensor(mean or [0.0])[:3, None, None]
        self._std = torch.tensor(std or [1.0])[:3, None, None]
        height, width = (-(-n // self.cell) for n in (grid.height, grid.width))
        bands = min(model.config.in_chans, 3)
        size = bands * height * width
        self._file = path.open("a+b")
        # A page that the disk has no room for would end the process, not the call.
        os.posix_fallocate(self._file.fileno(), 0, 4 * size)
        self.pixels = torch.from_file(str(path), shared=True, size=size).view(bands, height, width)

    def sync(self) -> None:
        """Makes what was shown so far outlast a power cut."""
        os.fsync(self._file.fileno())

    def shrink(self, regions: torch.Tensor) -> torch.Tensor:
        """What `put` takes of regions `[R, C, s, s]`, normalised; the first three bands."""
        return F.avg_pool2d(regions[:, :3].float(), self.cell)

    def put(self, ids: Sequence[int], small: torch.Tensor) -> None:
        """Shows regions, `small` as `shrink` returned it."""
        small = small.cpu() * self._std + self._mean
        side = self._grid.region // self.cell
        for index, part in zip(ids, small, strict=True):
            top, left = (index // self._grid.cols * side, index % self._grid.cols * side)
            place = self.pixels[:, top : top + side, left : left + side]
            place.copy_(part[:, : place.shape[1], : place.shape[2]])

    def repeat(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Shows the second region of each pair, which passed by, in the place of the first too."""
        side, cols = self._grid.region // self.cell, self._grid.cols
        for region, twin in pairs:
            top, left = (n * side for n in divmod(region, cols))
            y, x = (n * side for n in divmod(twin, cols))
            place = self.pixels[:, top : top + side, left : left + side]
            place.copy_(self.pixels[:, y : y + place.shape[1], x : x + place.shape[2]])

    def rgb(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The picture, `[h, w, 3]`: one band shows as grey, two as red and green."""
        values = self.pixels.numpy()
        if len(values) < 3:
            blank = values[:1] if len(values) == 1 else np.zeros_like(values[:1])
            values = np.concatenate([values, *[blank] * (3 - len(values))])
        values = values.transpose(1, 2, 0)
        if self._is_uint8:
            return (values.clip(0, 1) * 255).round().astype(np.uint8)
        return _stretch(values, (0, 1, 2))


def write_preview(
    path: Path, tokens: Path, thumbnail: Thumbnail, model: XT, source: ImageSource
) -> None:
    """Writes the thumbnail and, right of it, the first three principal components as RGB.

    The components are found on at most 4,096 tokens spread over the map, then the map is projected
    row block by row block. Tokens that were left out are black.
    """
    from io import BytesIO

    import zarr
    from PIL import Image

    array = zarr.open_array(str(tokens), mode="r")
    rows, cols, channels = array.shape
    step = array.chunks[0]
    every = max(1, int(np.ceil((rows * cols / 4096) ** 0.5)))

    def band(top: int) -> np.ndarray[Any, Any]:
        return np.asarray(array[top : top + step])

    sample = np.concatenate(
        [
            band(top)[(-top) % every :: every, ::every].reshape(-1, channels)
            for top in range(0, rows, step)
        ]
    ).astype(np.float64)
    sample = sample[np.isfinite(sample[:, 0])]
    mean = sample.mean(0) if len(sample) else np.zeros(channels)
    with _one_thread():
        covariance = torch.from_numpy((sample - mean).T @ (sample - mean))
        vectors = torch.linalg.eigh(covariance).eigenvectors.numpy()
    axes = vectors[:, ::-1][:, :3]
    # An eigenvector has no sign of its own: the largest entry is made positive.
    axes = axes * np.sign(axes[np.abs(axes).argmax(0), np.arange(axes.shape[1])])
    projected = np.concatenate(
        [
            (band(top) - mean.astype(np.float32)) @ axes.astype(np.float32)
            for top in range(0, rows, step)
        ]
    )
    projected = np.pad(projected, ((0, 0), (0, 0), (0, 3 - projected.shape[2])))
    left = thumbnail.rgb()
    side = model.stride // thumbnail.cell
    right = (
        _stretch(projected, (0, 1))
        .repeat(side, 0)
        .repeat(side, 1)[: left.shape[0], : left.shape[1]]
    )
    gap = np.full((left.shape[0], 8, 3), 255, dtype=np.uint8)
    # Pillow, writing to a file itself, does not say why it could not: a full disk has no errno.
    buffer = BytesIO()
    Image.fromarray(np.concatenate([left, gap, right], axis=1)).save(buffer, format="png")
    path.write_bytes(buffer.getbuffer())


@contextmanager
def _one_thread() -> Iterator[None]:
    """LAPACK's threads meet thousands of times: beside another process (two cores, AMD EPYC, Zen 5)
    the eigenvectors of 768 x 768 take two threads 10 s and one 0.1 s."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


FIELD_DECADES = 8
"""Powers of ten below its peak that the picture of a receptive field tells apart."""

_RAMP = np.array([
    [68, 1, 84], [71, 45, 123], [59, 82, 139], [44, 114, 142], [33, 145, 140],
    [40, 174, 128], [94, 201, 98], [173, 220, 48], [253, 231, 37],
])  # fmt: skip
"""Nine even steps of viridis (matplotlib, CC0), which is perceptually uniform."""


def write_receptive_fields(
    path: Path,
    fields: Mapping[str, np.ndarray[Any, np.dtype[np.float32]]],
    box: tuple[int, int, int, int],
) -> None:
    """Draws maps `[H, W]` side by side under their names, a white frame around `box`.

    box: (top, left, height, width) of the token's region, pixels. Colour is the logarithm of the
        gradient, over `FIELD_DECADES` below the peak of each map; black is no gradient at all.
    """
    from PIL import Image, ImageDraw, ImageFont

    gap, bar = 8, 28
    height, width = next(iter(fields.values())).shape
    size = (len(fields) * (width + gap) - gap, bar + height + 2 * bar)
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(16)
    top, left, rows, cols = box
    for i, (name, field) in enumerate(fields.items()):
        x = i * (width + gap)
        picture.paste(Image.fromarray(_field_colours(field)), (x, bar))
        frame = (x + left, bar + top, x + left + cols - 1, bar + top + rows - 1)
        draw.rectangle(frame, outline="white", width=2)
        draw.text((x + 4, 4), name, fill="black", font=font)
    legend = np.logspace(-FIELD_DECADES, 0, min(size[0], 256), dtype=np.float32)
    picture.paste(Image.fromarray(_field_colours(np.tile(legend, (12, 1)))), (0, bar + height + 8))
    text = f"1e-{FIELD_DECADES} to 1 of the peak; black: none"
    draw.text((0, 2 * bar + height + 2), text, fill="black", font=font)
    picture.save(path)


def _field_colours(
    field: np.ndarray[Any, np.dtype[np.float32]],
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    with np.errstate(divide="ignore"):
        decades = np.log10(field / field.max())  # -inf where there is none
    at = (decades / FIELD_DECADES + 1).clip(0, 1) * (len(_RAMP) - 1)
    low = at.astype(int).clip(0, len(_RAMP) - 2)
    colours = _RAMP[low] + (at - low)[..., None] * (_RAMP[low + 1] - _RAMP[low])
    return np.where(field[..., None] > 0, colours.round(), 0).astype(np.uint8)


def _stretch(
    values: np.ndarray[Any, Any], axes: tuple[int, ...]
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    low, high = np.nanpercentile(values, [1, 99], axis=axes, keepdims=True)
    scaled = np.nan_to_num((values - low) / np.maximum(high - low, 1e-12))
    return np.asarray((scaled.clip(0, 1) * 255).round(), dtype=np.uint8)
