"""Streaming a file against the region encoder alone on the same batches already in memory, and a
page that is mostly paper with and without reuse of equal regions.

The two run side by side in one process, in turns; the ratio of each round is what the engine, the
reading and the context encoder cost.
"""

from __future__ import annotations

from xt_models.host import keep_memory_flat

keep_memory_flat()  # before torch loads: both sides run as the command line does

# ruff: noqa: E402
import statistics
import time
import warnings

import numpy as np
import pytest
import tifffile
import torch
import zarr
from measure import DEVICE, SCHEMA, spread

import xt_models as xm
from xt_models.demo import write_scene
from xt_models.registry import RandomWeightsWarning

BATCH = 16


def make_image(path, side):
    """A tiled deflate TIFF of side x side px cut from the demo's scene."""
    scene = path.with_name("scene.tif")
    write_scene(scene)
    with xm.open_image(scene) as source:
        pixels = source.read(0, 0, side, side).transpose(1, 2, 0)
    tifffile.imwrite(path, pixels, tile=(256, 256), compression="deflate", photometric="rgb")
    return pixels


@pytest.mark.parametrize(
    "encoder, context, side", [("swinv2_tiny", "xl", 1024), ("convnext_atto", None, 3072)]
)
def test_streaming_against_encoder_only(benchmark, tmp_path, encoder, context, side):
    if benchmark.disabled:
        side = 512  # enough to see that it runs
    pixels = make_image(tmp_path / "image.tif", side)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RandomWeightsWarning)
        model = xm.create_model(encoder, context=context)
    if torch.cuda.is_available():
        model = model.cuda()
    device = next(model.parameters()).device
    source = xm.open_image(tmp_path / "image.tif")
    grid = model.grid(side, side)
    regions = model.extract(torch.from_numpy(pixels).movedim(-1, 0).to(device), grid)
    batches = regions.split(BATCH)

    def encoder_only():
        with torch.inference_mode():
            for batch in batches:
                model.region_encoder(batch)
        if device.type == "cuda":
            torch.cuda.synchronize()

    runs = iter(range(1000))

    def stream():
        out = tmp_path / f"out{next(runs)}"
        return out, xm.stream(model, source, out, batch_size=BATCH, preview=False)

    out, _ = stream()  # warms up, and is checked
    with torch.inference_mode():
        expected = model(torch.from_numpy(pixels).movedim(-1, 0).to(device)).tokens[0].cpu()
    ours = torch.from_numpy(zarr.open_array(str(out / "tokens.zarr"), mode="r")[:]).flatten(0, 1)
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)

    wall = {"stream": [], "encoder alone": []}
    processor = {"stream": [], "encoder alone": []}

    def both():
        for name, run in (("encoder alone", encoder_only), ("stream", stream)):
            start, work = time.perf_counter(), time.process_time()
            run()
            wall[name].append(time.perf_counter() - start)
            processor[name].append(time.process_time() - work)

    benchmark.pedantic(both, rounds=5, iterations=1, warmup_rounds=1)
    source.close()
    note(
        benchmark, wall, processor, op="streaming a deflate TIFF",
        variant=f"{encoder}, {context or 'no context'}", side_px=side, regions=grid.num_regions,
    )  # fmt: skip


def note(benchmark, wall, processor, *, regions, **facts):
    """What `xt report` reads; the first form is ours, and the first round warms up."""
    if benchmark.disabled:
        return
    times, work = ({n: t[1:] for n, t in clock.items()} for clock in (wall, processor))
    first, *others = times
    benchmark.extra_info |= {
        "schema": SCHEMA,
        "device": DEVICE,
        "dtype": "float32",
        "regions": regions,
        "first": first,
        "seconds": {name: spread(values) for name, values in times.items()},
        "ratio": {
            name: spread([a / b for a, b in zip(times[name], times[first], strict=True)])
            for name in others
        },
        "units_per_s": {"what": "regions", "value": regions / statistics.median(times[first])},
        "processor_seconds": {name: spread(values) for name, values in work.items()},
        **facts,
    }


def make_page(path, rows, cols, printed):
    """A deflate TIFF of rows x cols regions of white paper, `printed` of them in a block of text:
    photograph crops, none like another."""
    scene = path.with_name("photo.tif")
    write_scene(scene)
    pixels = np.full((rows * 256, cols * 256, 3), 255, np.uint8)
    with xm.open_image(scene) as source:
        for k in range(printed):
            top, left = k // (cols - 4) * 256 + 512, k % (cols - 4) * 256 + 512
            crop = source.read(k // 26 * 256 + 11, k % 26 * 256 + 7, 256, 256)
            pixels[top : top + 256, left : left + 256] = crop.transpose(1, 2, 0)
    tifffile.imwrite(path, pixels, tile=(256, 256), compression="deflate", photometric="rgb")


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("encoder", "context"),
    [("convnext_atto", "xl"), pytest.param("swinv2_tiny", "xl", marks=pytest.mark.full)],
)
def test_a_page_of_70_percent_paper(benchmark, tmp_path, encoder, context):
    """20 x 14 regions of 256 px, 84 of them printed."""
    make_page(tmp_path / "page.tif", 20, 14, 84)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RandomWeightsWarning)
        model = xm.create_model(encoder, context=context)
    source = xm.open_image(tmp_path / "page.tif")
    runs = iter(range(1000))
    wall, processor = ({"with reuse": [], "without": []} for _ in range(2))

    def stream(reuse):
        name = "with reuse" if reuse else "without"
        out = tmp_path / f"run{next(runs)}"
        start, work = time.perf_counter(), time.process_time()
        result = xm.stream(model, source, out, batch_size=BATCH, preview=False, reuse=reuse)
        wall[name].append(time.perf_counter() - start)
        processor[name].append(time.process_time() - work)
        return out, result

    def both():
        outs = []
        for reuse in (True, False):
            out, result = stream(reuse)
            outs.append(out)
            assert result.stats.reused == (195 if reuse else 0)
        blocks = sorted(p.relative_to(outs[0]) for p in (outs[0] / "tokens.zarr" / "c").rglob("0"))
        assert blocks
        for block in blocks:
            assert (outs[0] / block).is_dir() or (
                (outs[0] / block).read_bytes() == (outs[1] / block).read_bytes()
            ), block

    benchmark.pedantic(both, rounds=3, iterations=1)
    source.close()
    note(
        benchmark, wall, processor, op="a page, 70 % paper", variant=f"{encoder}, {context}",
        side_px=20 * 256, regions=280,
    )  # fmt: skip
