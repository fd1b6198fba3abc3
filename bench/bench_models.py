"""Streaming a file against the region encoder alone on the same batches already in memory.

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
    "encoder, context, side", [("swinv2_tiny", "xl", 1024), ("convnext_atto", None, 4096)]
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

    benchmark.pedantic(both, rounds=9, iterations=1, warmup_rounds=1)
    source.close()
    if benchmark.disabled:
        return
    # The first round warms up.
    times, work = ({n: t[1:] for n, t in clock.items()} for clock in (wall, processor))
    alone_over_stream = spread(
        [a / b for a, b in zip(times["encoder alone"], times["stream"], strict=True)]
    )
    benchmark.extra_info |= {
        "schema": SCHEMA,
        "device": DEVICE,
        "dtype": "float32",
        "op": "streaming a deflate TIFF",
        "variant": f"{encoder}, {context or 'no context'}",
        "side_px": side,
        "regions": grid.num_regions,
        "first": "stream",
        "seconds": {name: spread(values) for name, values in times.items()},
        "ratio": {"encoder alone": alone_over_stream},
        "units_per_s": {
            "what": "regions",
            "value": grid.num_regions / statistics.median(times["stream"]),
        },
        "processor_seconds": {name: spread(values) for name, values in work.items()},
    }
