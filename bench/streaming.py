"""Streaming a file against what it could cost at least, in a process of its own: times as JSON.

    python bench/streaming.py --what file --encoder swinv2_tiny --context xl --side 1024

"file" streams a tiled deflate TIFF, beside the region encoder alone on the same batches in memory:
what differs is the engine, the reading and the context encoder. "page" streams 20 x 14 regions of
white paper, 84 of them printed, with and without reuse of equal regions. Both sides run in turns,
and the answer is checked: against the model in memory, or byte for byte against the other side.
"""

from __future__ import annotations

from xt_models.host import keep_memory_flat

keep_memory_flat()  # before torch loads, as the command line does

# ruff: noqa: E402
import argparse
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import torch
import zarr
from measure import DEVICE, seconds, yardstick

import xt_models as xm
from xt_models.demo import write_scene
from xt_models.registry import RandomWeightsWarning

BATCH = 16
PAGE = 20, 14  # regions
PRINTED = 84


class Clock:
    """Wall and processor seconds of each form, round by round."""

    def __init__(self) -> None:
        self.wall: dict[str, list[float]] = {}
        self.processor: dict[str, list[float]] = {}
        self.ticks: list[float] = []

    def run(self, name: str, work: Callable[[], Any]) -> Any:
        """What `work()` gives."""
        start, begun = time.perf_counter(), time.process_time()
        result = work()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        self.wall.setdefault(name, []).append(time.perf_counter() - start)
        self.processor.setdefault(name, []).append(time.process_time() - begun)
        self.ticks.append(seconds(yardstick(DEVICE)))
        return result


def write_file(path: Path, side: int) -> np.ndarray:
    """Cuts a tiled deflate TIFF of side x side px from the demo's scene; returns its pixels."""
    with scene(path) as source:
        pixels = source.read(0, 0, side, side).transpose(1, 2, 0)
    tifffile.imwrite(path, pixels, tile=(256, 256), compression="deflate", photometric="rgb")
    return pixels


def write_page(path: Path) -> None:
    """Writes the page: its print is a block of photograph crops, none like another."""
    rows, cols = PAGE
    pixels = np.full((rows * 256, cols * 256, 3), 255, np.uint8)
    with scene(path) as source:
        for k in range(PRINTED):
            top, left = k // (cols - 4) * 256 + 512, k % (cols - 4) * 256 + 512
            crop = source.read(k // 26 * 256 + 11, k % 26 * 256 + 7, 256, 256)
            pixels[top : top + 256, left : left + 256] = crop.transpose(1, 2, 0)
    tifffile.imwrite(path, pixels, tile=(256, 256), compression="deflate", photometric="rgb")


def scene(path: Path) -> Any:
    """The demo's photograph, as a source."""
    photograph = path.with_name("photograph.tif")
    write_scene(photograph)
    return xm.open_image(photograph)


def against_the_encoder(model: Any, folder: Path, side: int, rounds: int, clock: Clock) -> int:
    """Times both forms after one round unclocked; returns the number of regions."""
    pixels = write_file(folder / "image.tif", side)
    image = torch.from_numpy(pixels).movedim(-1, 0).to(DEVICE)
    grid = model.grid(side, side)
    batches = model.extract(image, grid).split(BATCH)
    outs = folders(folder)

    def encoder_only() -> None:
        with torch.inference_mode():
            for batch in batches:
                model.region_encoder(batch)

    def stream() -> Path:
        with xm.open_image(folder / "image.tif") as source:
            # Not compiled: nor is the encoder beside it.
            return xm.stream(
                model, source, next(outs), batch_size=BATCH, preview=False, compile=False
            ).out

    out = stream()
    with torch.inference_mode():
        expected = model(image).tokens[0].cpu()
    ours = torch.from_numpy(zarr.open_array(str(out / "tokens.zarr"), mode="r")[:]).flatten(0, 1)
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)
    encoder_only()
    for _ in range(rounds):
        clock.run("stream", stream)
        clock.run("encoder alone", encoder_only)
    return grid.num_regions


def with_reuse(model: Any, folder: Path, rounds: int, clock: Clock) -> int:
    """Times both forms after one round unclocked; returns the number of regions."""
    write_page(folder / "page.tif")
    count, outs = PAGE[0] * PAGE[1], folders(folder)

    def stream(reuse: bool) -> Path:
        with xm.open_image(folder / "page.tif") as source:
            result = xm.stream(
                model, source, next(outs), batch_size=BATCH, preview=False, reuse=reuse
            )
        # All blank regions but one.
        assert result.stats.reused == (count - PRINTED - 1 if reuse else 0)
        return result.out

    for number in range(rounds + 1):
        told = clock if number else Clock()
        ours = told.run("with reuse", lambda: stream(True))
        plain = told.run("without", lambda: stream(False))
        files = [p.relative_to(ours) for p in (ours / "tokens.zarr").rglob("*") if p.is_file()]
        assert len(files) > 1
        assert all((ours / f).read_bytes() == (plain / f).read_bytes() for f in files)
    return count


def folders(parent: Path) -> Iterator[Path]:
    """A new one for each run."""
    return (parent / f"run{n}" for n in range(1000))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--what", choices=["file", "page"], required=True)
    parser.add_argument("--encoder", default="swinv2_tiny")
    parser.add_argument("--context", default="xl")
    parser.add_argument("--side", type=int, default=1024, help="of the square image, pixels")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RandomWeightsWarning)
        context = None if args.context == "none" else args.context
        model = xm.create_model(args.encoder, context=context).to(DEVICE)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        if args.what == "file":
            regions = against_the_encoder(model, Path(folder), args.side, args.rounds, clock)
        else:
            regions = with_reuse(model, Path(folder), args.rounds, clock)
    row = {"wall": clock.wall, "processor": clock.processor, "regions": regions, "batch": BATCH}
    row["threads"] = torch.get_num_threads()
    if clock.ticks:
        row["yardstick"] = statistics.median(clock.ticks)
    print(json.dumps(row))


if __name__ == "__main__":
    main()
