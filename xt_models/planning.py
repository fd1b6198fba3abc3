"""What a run will take, before it runs: regions, tokens, chunks, memory, time, disk.

Time and memory come from a trial: the first batches and chunks of this image through this model, as
`stream` runs them, a few seconds long. How many regions will be reused is counted on a sample.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from xt_kernels.regions import RegionGrid

from .context_encoder import Memory
from .encoding import BatchEncoder, Features, Seen, rows_of_a_batch
from .group_walk import REGIONS_AT_ONCE
from .host import available_memory, current_rss, free_disk, peak_rss, reset_peak_rss
from .mamba import MambaContextEncoder
from .model import XT
from .output import PREVIEW_SIDE, REGIONS_PER_BLOCK
from .profiling import Profile
from .reading import Key, LeftOut, Reader, region_pixels
from .source import ImageSource
from .streaming import (
    Precision,
    Visit,
    check_bands,
    check_options,
    default_batch_size,
    drop_value,
    is_compiled,
    region_bytes,
    stream_chunks,
)

PROBE_TOKENS = 1024
"""Longest sequence that the probe of a context encoder runs; longer ones are worked out."""

PROBE_SIDE = 4
"""Regions a side of the largest group that a head is tried on; larger ones are worked out."""

TRIAL_SECONDS = 5.0
"""A trial ends after this time if it has seen two chunks, after three times as long in any case."""

SAMPLED_REGIONS, SAMPLE_SECONDS = 1024, 3.0
"""Regions that are read to estimate how many are equal, and the time to stop at."""


@dataclass(frozen=True)
class Plan:
    """Sizes in pixels, regions and tokens; bytes; seconds. `memory` is above the loaded model.

    reused: share of the visits that take the features of an equal region, estimated.
    """

    height: int
    width: int
    region: int
    rows: int
    cols: int
    visits: int
    reused: float
    tokens: int
    chunks: int
    chunk_tokens: int
    seconds: float
    memory: int
    memory_available: int
    output_bytes: int
    disk_free: int

    @property
    def regions(self) -> int:
        """Regions in the image; `visits` counts more where a first pass fills the memory."""
        return self.rows * self.cols

    @property
    def fits(self) -> bool:
        """Whether memory and disk suffice."""
        return self.memory <= self.memory_available and self.output_bytes <= self.disk_free


def plan(
    model: XT,
    source: ImageSource,
    *,
    batch_size: int | None = None,
    readers: int = 2,
    bands: Sequence[int] | None = None,
    fill: float | None = None,
    reuse: bool = True,
    drop: Any = None,
    on_bad_tile: Literal["stop", "mask"] = "stop",
    precision: Precision | None = None,
    compile: bool | None = None,
    heads: bool = True,
    out: str | Path = ".",
) -> Plan:
    """Tells what `stream` with the same arguments will take, with the model's heads; takes a few
    seconds itself. The candidates for boxes, which a run keeps to its end, are not counted: their
    number is in the image.

    On CUDA the memory is that of the device and its allocator; on CPU resident memory.
    """
    device = next(model.parameters()).device
    batch_size = default_batch_size(model) if batch_size is None else batch_size
    check_options(batch_size=batch_size, readers=readers, fill=fill, drop=drop)
    check_options(on_bad_tile=on_bad_tile, precision=precision)
    chosen = check_bands(model, source, bands)
    grid = model.grid(source.height, source.width)
    steps = model.walk(grid)
    rows, cols = grid.token_shape(model.stride)
    visits = sum(len(step.regions) for step in steps)
    longest = next(step for step in steps if step.emit)  # later chunks may end at the image's edge
    chunk_tokens = grid.placement(longest.regions, model.stride).length
    dtype = next(model.parameters()).dtype

    options: dict[str, Any] = {"bands": bands, "fill": fill, "reuse": reuse, "drop": drop}
    options |= {"precision": precision, "compile": compile, "on_bad_tile": on_bad_tile}
    reused = 0.0
    if reuse or drop is not None:
        value, mask = drop_value(source, drop), on_bad_tile == "mask"
        reader = Reader(source, grid, chosen, 0.0, keys=reuse, drop=value, mask_damage=mask)
        reused = _equal_share(
            reader,
            Seen(
                region_bytes(
                    model, source, dtype if precision is None else getattr(torch, precision)
                )
            ),
        )
    heads = heads and len(model.group_heads) > 0
    trial = _Trial(model, source, heads, batch_size=batch_size, readers=readers, **options)
    seconds = trial.warm_up + visits * trial.visit_seconds
    seconds += (1 - reused) * visits / trial.batch_size * trial.encode_seconds
    memory = trial.memory
    if model.context is not None and model.config.chunk_regions is None:
        held, per_chunk, mix_memory = _chunk_cost(model, grid, device)
        seconds += len(steps) * per_chunk
        memory = max(memory, mix_memory) + held
    if device.type != "cuda":
        side = grid.region // model.stride
        block = side * side * REGIONS_PER_BLOCK * model.num_features * 4
        memory += 4 * block + min(grid.height * grid.width, PREVIEW_SIDE**2) * 4 * 3
    if heads:
        heads_seconds, heads_memory = _heads_cost(model, grid, device, dtype)
        seconds, memory = seconds + heads_seconds, memory + heads_memory
    return Plan(
        height=source.height,
        width=source.width,
        region=grid.region,
        rows=grid.rows,
        cols=grid.cols,
        visits=visits,
        reused=reused,
        tokens=rows * cols,
        chunks=sum(step.emit for step in steps),
        chunk_tokens=chunk_tokens,
        seconds=seconds,
        memory=int(memory),
        memory_available=(
            torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
        ),
        output_bytes=rows * cols * model.num_features * 4,
        disk_free=free_disk(Path(out)),
    )


def choose_precision(model: XT) -> tuple[Precision, dict[str, float]]:
    """bfloat16 where it encodes 1.2 times as fast, else float32; and regions/s of both."""
    regions_per_s: dict[str, float] = {}
    for name in ("float32", "bfloat16"):
        encoder = BatchEncoder(model, 4, getattr(torch, name))
        seconds, _ = _measure(encoder.encode, encoder.regions.device)
        regions_per_s[name] = 4 / seconds
    faster = regions_per_s["bfloat16"] >= 1.2 * regions_per_s["float32"]
    return "bfloat16" if faster else "float32", regions_per_s


class BatchChoice(NamedTuple):
    """A batch size; seconds a region of each one that was tried; bytes that the run takes above the
    model, estimated."""

    size: int
    tried: dict[int, float]
    memory: int


def choose_batch_size(
    model: XT,
    source: ImageSource,
    *,
    readers: int = 2,
    memory: int | None = None,
    precision: Precision | None = None,
    heads: bool = True,
) -> BatchChoice:
    """The smallest batch size within 5 % of the fastest of those that fit, which is judged before
    they run, by what smaller ones took.

    memory: bytes that the run may take above the model; default half of what is free. Where the
        context encoder or the heads alone need more, no batch size holds it: `BatchChoice.memory`
        then is more.
    Raises ValueError if not even one region fits.
    """
    device = next(model.parameters()).device
    if memory is None:
        on_device = device.type == "cuda"
        memory = (torch.cuda.mem_get_info(device)[0] if on_device else available_memory()) // 2
    window = source.bands * model.config.region**2 * source.dtype.itemsize * (readers + 2)
    tried: dict[int, float] = {}
    needs: dict[int, int] = {}
    size, start = 1, time.perf_counter()
    while size <= (256 if device.type == "cuda" else 32):
        if _next_need(needs) + _FIXED_BYTES > memory:
            break
        encoder = BatchEncoder(model, size, precision and getattr(torch, precision))
        try:
            seconds, taken = _measure(encoder.encode, device)
        except torch.OutOfMemoryError:
            break
        if encoder.rows < size:  # it had to halve the batch
            break
        needs[size] = taken + encoder.regions.nbytes + size * window
        if needs[size] + _FIXED_BYTES > memory:
            break
        tried[size] = seconds / size
        if time.perf_counter() - start > 2 * TRIAL_SECONDS:
            break
        size *= 2
    if not tried:
        raise ValueError(
            f"choose_batch_size: memory must hold one region's activations and "
            f"{_FIXED_BYTES >> 20} MiB, got {memory >> 20} MiB."
        )
    best = min(tried.values())
    size = next(size for size, each in tried.items() if each <= 1.05 * best)
    grid = model.grid(source.height, source.width)
    held, peak = 0, 0
    if model.context is not None:
        held, _, peak = _chunk_cost(model, grid, device)
    if heads and model.group_heads:
        peak = max(peak, _heads_cost(model, grid, device, next(model.parameters()).dtype)[1])
    # Neither runs while a batch is encoded, but its pixels stay.
    rest = needs[size] - size * window
    return BatchChoice(size, tried, _FIXED_BYTES + size * window + held + max(rest, peak))


def _next_need(needs: dict[int, int]) -> int:
    """Bytes of the next size, twice the last: on the line through the last two, or the origin."""
    *before, last = [0, *needs.values()]
    return 3 * last - 2 * before[-1] if len(needs) > 1 else 2 * last


_FIXED_BYTES = 96 << 20
"""What a run takes besides its batch: kept regions and tiles, blocks of the map, the preview."""


class _Enough(Exception):
    """The trial has seen what it needs."""


class _Trial:
    """The beginning of a run, timed; of its heads only what they ask of the region encoder.

    encode_seconds: of one batch. visit_seconds: all else, a visit. warm_up: what the first batch
    took longer. memory: the peak, bytes above the loaded model.
    """

    def __init__(
        self,
        model: XT,
        source: ImageSource,
        heads: bool,
        *,
        batch_size: int,
        **options: Any,
    ) -> None:
        device = next(model.parameters()).device
        grid = model.grid(source.height, source.width)
        steps = model.walk(grid)
        order = sum(len(step.regions) for step in steps)
        compiled = is_compiled(device, options["compile"])
        self.batch_size = rows_of_a_batch(order, batch_size, compiled)
        whole = model.config.chunk_regions is None
        wanted = 64 if whole else 2 * len(steps[0].regions)
        profile = Profile(device)
        marks: list[tuple[float, int, int]] = []  # time, batches begun, visits done
        visits = 0

        def mark(batches: int) -> None:
            now = time.perf_counter() - start - profile.seconds["compile"]
            before = marks[-1][1] if marks else 0
            marks.append((now, before + batches, visits))
            enough = now > TRIAL_SECONDS and len(marks) > 2 and visits >= wanted
            if enough or (visits and now > 3 * TRIAL_SECONDS):
                raise _Enough

        def on_visits(group: Sequence[Visit]) -> None:
            nonlocal visits
            visits += len(group)
            mark(0)

        reset_peak_rss()
        base = current_rss()
        if device.type == "cuda":
            base = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
        start = time.perf_counter()
        try:
            for _ in stream_chunks(
                model,
                source,
                batch_size=batch_size,
                spans=profile,
                on_regions=lambda *_: mark(1),
                on_visits=on_visits,
                stages=heads,
                **options,
            ):
                pass
        except _Enough:
            pass
        profile.finish()
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_rss()
        self.memory = max(peak - base, 0)
        lengths = profile.lengths("encode")
        self.encode_seconds = float(np.mean(lengths[1:] or lengths))
        # From the first batch's end on, whose visits are the first to be marked, all is steady.
        steady = next((m for m in marks if m[2]), marks[-1])
        last = marks[-1]
        rest = (last[0] - steady[0]) - (last[1] - steady[1]) * self.encode_seconds
        begun, done = (steady, last) if last[2] > steady[2] else ((0.0, 0, 0), last)
        if begun is not steady:
            rest = last[0] - sum(lengths)
        self.visit_seconds = max(rest, 0.0) / max(done[2] - begun[2], 1)
        self.warm_up = max(
            steady[0] - steady[1] * self.encode_seconds - steady[2] * self.visit_seconds, 0.0
        )
        self.warm_up += profile.seconds["compile"]


def _equal_share(reader: Reader, seen: Seen) -> float:
    """Share of the regions that a run does not encode, from reading some, spread over the image.

    seen: as the run has it, so that it forgets as much.
    """
    grid = reader.grid
    every = max(grid.num_regions // SAMPLED_REGIONS, 1)
    count = spared = 0
    start = time.perf_counter()
    for first in range(0, grid.num_regions, every * REGIONS_PER_BLOCK):
        regions = range(first, min(first + REGIONS_PER_BLOCK, grid.num_regions))
        for window in reader.read(regions):
            for region, key in zip(window.regions, window.keys, strict=True):
                count += 1
                if isinstance(key, LeftOut):
                    spared += 1
                elif isinstance(key, Key):
                    pixels = region_pixels(window.pixels.numpy(), grid, window.origin, region)
                    if seen.find(key, pixels) is not None:
                        spared += 1
                    else:
                        seen.add(key, pixels, Features(region))
        if time.perf_counter() - start > SAMPLE_SECONDS:
            break
    return spared / count


def _heads_cost(
    model: XT, grid: RegionGrid, device: torch.device, dtype: torch.dtype
) -> tuple[float, int]:
    """(seconds, bytes) of the heads on maps over a whole image: what waits for their groups, and
    the largest call of one, tried on groups of at most `PROBE_SIDE` regions a side."""
    seconds, waiting, largest = 0.0, 0, 0
    encoder = model.region_encoder
    maps = [(model.stride, model.num_features)]
    maps += [(int(encoder.strides[i]), int(encoder.channels[i])) for i in model.stages]
    region_bytes = sum((grid.region // s) ** 2 * c for s, c in maps) * dtype.itemsize
    for head in model.group_heads.values():
        groups = head.groups(grid)
        rows, cols = groups[0].rows, groups[0].cols
        at_once = max(REGIONS_AT_ONCE // (rows * cols), 1)
        calls = -(-len(groups) // at_once)
        tried = min(rows, PROBE_SIDE), min(cols, PROBE_SIDE)

        def zeros(stride: int, width: int, n: int = at_once, t: Any = tried) -> torch.Tensor:
            side = grid.region // stride
            return torch.zeros(n, width, t[0] * side, t[1] * side, device=device, dtype=dtype)

        tokens = zeros(*maps[0])
        stages = {i: zeros(encoder.strides[i], encoder.channels[i]) for i in head.stages}
        each, memory = _measure(partial(head, tokens, stages), device)
        share = rows * cols / (tried[0] * tried[1])
        seconds += calls * each * share
        given = sum(t.nbytes for t in (tokens, *stages.values()))
        largest = max(largest, int((memory + given) * share))
        if rows * cols > 1:
            waiting = max(waiting, rows * grid.cols * region_bytes)
    return seconds, waiting + largest


def _chunk_cost(model: XT, grid: RegionGrid, device: torch.device) -> tuple[int, float, int]:
    """(bytes of its tokens and of the memory beside them, seconds, bytes to mix) of a chunk."""
    assert model.context is not None
    step = next(step for step in model.walk(grid) if step.emit)
    tokens = grid.placement(step.regions, model.stride).length
    dtype = next(model.parameters()).dtype
    seconds, peak = _long_mix_cost(model, tokens, device, dtype)
    width = model.config.dim + (model.num_features if model.output_proj is not None else 0)
    held = tokens * width * dtype.itemsize
    if model.config.chunk_regions is None:  # the writer has the whole map in hand
        return held + tokens * model.num_features * 4, seconds, peak
    if not isinstance(model.context, MambaContextEncoder) and model.context.memory_chunks:
        length = model.context.memory_chunks * tokens
        held += math.prod(model.context.state_shape(1, length)) * dtype.itemsize
    return held, seconds, peak


def _long_mix_cost(
    model: XT, tokens: int, device: torch.device, dtype: torch.dtype
) -> tuple[float, int]:
    """(seconds, bytes) of a chunk of any length."""
    short = _mix_cost(model, min(tokens, PROBE_TOKENS), device, dtype)
    if tokens <= PROBE_TOKENS:
        return short
    # Attention is quadratic in the tokens and the rest linear: two lengths tell them apart.
    half = _mix_cost(model, PROBE_TOKENS // 2, device, dtype)
    quadratic = max(short[0] - 2 * half[0], 0.0) * 2 / PROBE_TOKENS**2
    linear = max(short[0] / PROBE_TOKENS - quadratic * PROBE_TOKENS, 0.0)
    return quadratic * tokens**2 + linear * tokens, short[1] * tokens // PROBE_TOKENS


def _mix_cost(
    model: XT, tokens: int, device: torch.device, dtype: torch.dtype
) -> tuple[float, int]:
    """(seconds, bytes) of one chunk of `tokens` with full memory behind it."""
    assert model.context is not None
    chunk = torch.zeros(1, tokens, model.config.dim, device=device, dtype=dtype)
    raw = None
    if model.output_proj is not None:
        raw = chunk.new_zeros(1, tokens, model.num_features)
    memory = None
    kept = model.context.memory_chunks
    if isinstance(model.context, MambaContextEncoder):
        with torch.inference_mode():
            memory = model.context(chunk[:, :1])[1]  # as large as any
    elif kept:
        states = chunk.new_zeros(model.context.state_shape(1, kept * tokens))
        memory = Memory(states, (tokens,) * kept, kept)
    return _measure(lambda: model.mix(chunk, raw, memory), device)


def _measure(run: Callable[[], Any], device: torch.device) -> tuple[float, int]:
    """(seconds, peak bytes above what was there) of `run`, after one run to warm up."""
    with torch.inference_mode():
        base = current_rss()
        reset_peak_rss()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            base = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
        run()
        start = _now(device)
        run()
        seconds = _now(device) - start
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_rss()
    return seconds, max(peak - base, 0)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
