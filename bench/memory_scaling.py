"""Peak memory and speed of streaming from 4,096 px to 29,000 x 25,000 px, one child process a size.

    python bench/memory_scaling.py --out bench/results/<machine>/memory_scaling.json

Writes each image as a tiled BigTIFF (kept in --scratch, made once), runs `xt_models.stream` with a
tiny region encoder, and records peak resident memory above the loaded model. Flat means: the
largest value is at most 10 % above the smallest.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

SIZES = ("4096x4096", "8192x8192", "16384x16384", "29000x25000")


def write_image(path: Path, height: int, width: int, compression: str) -> None:
    """Writes a tiled BigTIFF of photograph crops, one tile in memory at a time."""
    import numpy as np
    import tifffile
    from PIL import Image

    import xt_models

    photo = Path(xt_models.__file__).parent / "assets" / "hubble_deep_field.jpg"
    pixels = np.asarray(Image.open(photo).convert("RGB"))
    rng = np.random.default_rng(0)
    tile = 512
    count = -(-height // tile) * -(-width // tile)

    def tiles():
        for _ in range(count):
            top, left = (
                rng.integers(0, pixels.shape[0] - tile),
                rng.integers(0, pixels.shape[1] - tile),
            )
            yield np.ascontiguousarray(pixels[top : top + tile, left : left + tile])

    part = path.with_suffix(".part")
    tifffile.imwrite(
        part, tiles(), shape=(height, width, 3), dtype=np.uint8, tile=(tile, tile), bigtiff=True,
        photometric="rgb", compression=compression, metadata=None,
    )  # fmt: skip
    part.rename(path)


def run_one(path: str, encoder: str, context: str, out: str | None) -> None:
    """Runs in the child: prints the stats as one line of JSON."""
    from xt_models.host import keep_memory_flat

    keep_memory_flat()  # before torch loads, as the command line does

    import warnings

    import xt_models as xm
    from xt_models.registry import RandomWeightsWarning

    warnings.simplefilter("ignore", RandomWeightsWarning)
    with xm.open_image(path) as source:
        model = xm.create_model(encoder, context=context, in_chans=source.bands)
        stats = xm.stream(model, source, out).stats
    print(json.dumps(asdict(stats) | {"regions_per_s": stats.regions_per_s}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default=",".join(SIZES), help="HxW,HxW,...")
    parser.add_argument("--compression", default="deflate", choices=["deflate", "jpeg"])
    parser.add_argument("--encoder", default="convnext_atto")
    parser.add_argument("--context", default="xl")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "xt-scaling")
    parser.add_argument("--out", type=Path, help="JSON to write; default is the screen")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
            run_one(args.child, args.encoder, args.context, f"{folder}/out")
        return

    import torch
    import triton

    from xt_models.host import cpu_name, num_cpus

    args.scratch.mkdir(parents=True, exist_ok=True)
    rows = []
    for size in args.sizes.split(","):
        height, width = (int(n) for n in size.split("x"))
        path = args.scratch / f"{size}.{args.compression}.tif"
        if not path.exists():
            write_image(path, height, width, args.compression)
        command = [sys.executable, __file__, "--child", str(path), "--encoder", args.encoder]
        command += ["--context", args.context, "--scratch", str(args.scratch)]
        child = subprocess.run(command, capture_output=True, text=True)
        if child.returncode:
            raise SystemExit(f"{size}: {child.stderr.strip().splitlines()[-1]}")
        stats = json.loads(child.stdout.splitlines()[-1])
        above = stats["peak_memory"] - stats["base_memory"]
        rows.append({"height": height, "width": width, "above_model": above} | stats)
        print(
            f"{size:>12}  {stats['regions']:>6} regions  {above / 2**20:7.1f} MiB above the model  "
            f"{stats['regions_per_s']:6.1f} regions/s",
            flush=True,
        )
    values = [row["above_model"] for row in rows]
    record = {
        "what": "streaming, peak resident memory above the loaded model",
        "command": " ".join(["python", "bench/memory_scaling.py", *sys.argv[1:]]),
        "encoder": args.encoder,
        "context": args.context,
        "compression": args.compression,
        "cpu": cpu_name(),
        "cores": num_cpus(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
        ).stdout.strip(),
        "largest_over_smallest": max(values) / min(values),
        "rows": rows,
    }
    print(f"largest / smallest: {record['largest_over_smallest']:.3f}")
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
