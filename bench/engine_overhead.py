"""What the engine costs where the region encoder costs nothing: megapixels a second, in memory.

    python bench/engine_overhead.py [--out RECORD.json]

The encoder picks one pixel of each token, so what is left is reading windows, telling equal regions
apart, cutting and normalising, stitching, and the loop around them. Beside it the same pixels are
copied as the engine must at least: uint8 out of the image, float32 into a batch.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from pathlib import Path

from xt_models.host import keep_memory_flat

keep_memory_flat()  # before torch loads, as the command line does

import numpy as np  # noqa: E402
import torch  # noqa: E402
from measure import script_row, write_record  # noqa: E402

import xt_models as xm  # noqa: E402
from xt_models.registry import RandomWeightsWarning  # noqa: E402
from xt_models.streaming import stream_chunks  # noqa: E402

REGION = 256


class Pick(torch.nn.Module):
    """[R, C, s, s] -> [R, s / 32, s / 32, C]: every 32nd pixel."""

    def forward(self, regions: torch.Tensor) -> torch.Tensor:
        return regions[:, :, ::32, ::32].permute(0, 2, 3, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=8192)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--readers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7, help="at least 2")
    parser.add_argument("--out", type=Path, help="where to write the record, JSON")
    args = parser.parse_args()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RandomWeightsWarning)
        model = xm.create_model("convnext_atto", context=None)
    model.region_encoder.forward = Pick().forward
    model.region_encoder.num_features = 3
    model.num_features = 3
    side = args.side
    pixels = np.random.default_rng(0).integers(0, 255, (3, side, side), dtype=np.uint8)
    source = xm.open_image(pixels, axes="CHW")
    whole = torch.from_numpy(pixels)
    batch = torch.empty(3, REGION, side)
    times: dict[str, list[float]] = {"engine": [], "copy": []}
    work: dict[str, list[float]] = {"engine": [], "copy": []}

    def engine() -> None:
        options = {"batch_size": args.batch_size, "readers": args.readers}
        for _ in stream_chunks(model, source, **options):
            pass

    def copy() -> None:
        for top in range(0, side, REGION):
            batch.copy_(whole[:, top : top + REGION].clone())

    for _ in range(args.rounds):
        for name, run in (("engine", engine), ("copy", copy)):
            start, used = time.perf_counter(), time.process_time()
            run()
            times[name].append(time.perf_counter() - start)
            work[name].append(time.process_time() - used)
    megapixels = side * side / 1e6
    note = (
        f"batches of {args.batch_size}, {args.readers} readers, {torch.get_num_threads()} threads"
    )
    rows = []
    for name in times:
        # The first round warms up.
        for unit, found in (("Mpx/s", times[name]), ("Mpx/processor second", work[name])):
            speeds = [megapixels / seconds for seconds in found[1:]]
            rows.append(script_row(name, f"{side} x {side} px", speeds, unit, note))
            print(f"{statistics.median(speeds):9.1f} {unit}  {name}")
    record = {
        "work": "engine_overhead",
        "title": "streaming with an encoder that picks pixels, against copying the same pixels",
        "rows": rows,
    }
    write_record(args.out, record)


if __name__ == "__main__":
    main()
