"""What a run will take, before it runs: regions, tokens, chunks, memory, time, disk.

Time and memory come from a short probe of this model on this machine: one batch of regions and one
chunk of tokens, each run once to warm up and once to measure.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .context_encoder import Memory
from .host import available_memory, current_rss, free_disk, peak_rss, reset_peak_rss
from .mamba import MambaContextEncoder
from .model import XT
from .source import ImageSource
from .streaming import check_bands

PROBE_TOKENS = 1024
"""Longest sequence that the probe of a context encoder runs; longer ones are worked out."""


@dataclass(frozen=True)
class Plan:
    """Sizes in pixels, regions and tokens; bytes; seconds. `memory` is above the loaded model."""

    height: int
    width: int
    region: int
    rows: int
    cols: int
    visits: int
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
    batch_size: int = 16,
    readers: int = 2,
    bands: Sequence[int] | None = None,
    out: str | Path = ".",
) -> Plan:
    """Tells what `stream` with the same arguments will take; takes a few seconds itself.

    On CUDA the memory is that of the device and its allocator; on CPU resident memory.
    """
    check_bands(model, source, bands)
    grid = model.grid(source.height, source.width)
    steps = model.walk(grid)
    rows, cols = grid.token_shape(model.stride)
    visits = sum(len(step.regions) for step in steps)
    batch_size = min(batch_size, visits)
    longest = next(step for step in steps if step.emit)  # later chunks may end at the image's edge
    chunk_tokens = grid.placement(longest.regions, model.stride).length
    device = next(model.parameters()).device
    dtype = next(model.parameters()).dtype
    side = grid.region

    regions = torch.zeros(batch_size, model.config.in_chans, side, side, device=device, dtype=dtype)
    encode_seconds, encode_memory = _measure(lambda: model.encode(regions), device)

    per_chunk, mix_memory = 0.0, 0
    if model.context is not None:
        short = _mix_cost(model, min(chunk_tokens, PROBE_TOKENS), device, dtype)
        if chunk_tokens <= PROBE_TOKENS:
            per_chunk, mix_memory = short
        else:
            # Attention is quadratic in the tokens and the rest linear: two lengths tell them apart.
            half = _mix_cost(model, PROBE_TOKENS // 2, device, dtype)
            quadratic = max(short[0] - 2 * half[0], 0.0) * 2 / PROBE_TOKENS**2
            linear = max(short[0] / PROBE_TOKENS - quadratic * PROBE_TOKENS, 0.0)
            per_chunk = quadratic * chunk_tokens**2 + linear * chunk_tokens
            mix_memory = short[1] * chunk_tokens // PROBE_TOKENS

    width = model.config.dim if model.context is not None else model.num_features
    token_bytes = chunk_tokens * width * dtype.itemsize
    pixel_bytes = side * side * source.dtype.itemsize * source.bands
    windows = (readers + 2) * batch_size * pixel_bytes
    normalised = regions.nbytes * 2
    writer = rows * cols * model.num_features * 4 if model.config.chunk_regions is None else 0
    return Plan(
        height=source.height,
        width=source.width,
        region=side,
        rows=grid.rows,
        cols=grid.cols,
        visits=visits,
        tokens=rows * cols,
        chunks=sum(step.emit for step in steps),
        chunk_tokens=chunk_tokens,
        seconds=visits / batch_size * encode_seconds + len(steps) * per_chunk,
        memory=int(
            max(encode_memory, mix_memory) + windows + normalised + 2 * token_bytes + writer
        ),
        memory_available=(
            torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
        ),
        output_bytes=rows * cols * model.num_features * 4,
        disk_free=free_disk(Path(out)),
    )


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
