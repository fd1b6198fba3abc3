"""Peak memory and speed from 512 px to 29,000 x 25,000 px, one child process a size and form.

    python bench/memory_scaling.py --out bench/results/<machine>/memory_scaling.json
    python bench/memory_scaling.py --encoder swinv2_tiny --forms ours,naive,grown --sizes 512,1024

"ours" writes each image as a tiled BigTIFF (kept in --scratch, made once) and runs
`xt_models.stream`. "naive" and "grown" are the same Swin on the whole image (`whole_image.py`), a
square of as many pixels, its window kept or grown with the image. Memory is resident memory above
the loaded model, on CUDA that of PyTorch's allocator, and regions are encoded in bf16 there. On a
CPU a process may take 20 GiB; a point is "measured" or "out of memory". Flat means: from 4,096 px
on, where chunks are full, the largest value of ours is at most 10 % above the smallest.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

SIZES = "512,1024,2048,4096,8192,16384,29000x25000"
FORMS = {"ours": "", "naive": "naive", "grown": "naive, window grown"}
HERE = Path(__file__).parent


def parse_size(text: str) -> tuple[int, int]:
    """(height, width) of "HxW", or of "H" for a square."""
    sides = [int(side) if side.isdecimal() else 0 for side in text.split("x")]
    if not all(sides) or len(sides) > 2:
        raise argparse.ArgumentTypeError(f"a size must be HxW or H in pixels, got {text!r}")
    return sides[0], sides[-1]


def parse_sizes(text: str) -> list[tuple[int, int]]:
    return [parse_size(part) for part in text.split(",")]


def parse_forms(text: str) -> list[str]:
    forms = text.split(",")
    if unknown := [form for form in forms if form not in FORMS]:
        raise argparse.ArgumentTypeError(f"forms must be of {', '.join(FORMS)}, got {unknown[0]!r}")
    return forms


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


def run_one(path: str, encoder: str, context: str, device: str, scratch: Path) -> None:
    """Runs in the child: prints the stats as one line of JSON."""
    from xt_models.host import keep_memory_flat

    keep_memory_flat()  # before torch loads, as the command line does

    import warnings

    import torch

    import xt_models as xm
    from xt_models.registry import RandomWeightsWarning

    warnings.simplefilter("ignore", RandomWeightsWarning)
    with xm.open_image(path) as source, tempfile.TemporaryDirectory(dir=scratch) as folder:
        made = None if context == "none" else context
        model = xm.create_model(encoder, context=made, in_chans=source.bands).to(device)
        base = torch.cuda.memory_allocated() if device == "cuda" else 0
        precision: Any = "bfloat16" if device == "cuda" else None
        stats = xm.stream(model, source, Path(folder) / "out", precision=precision).stats
    above = stats.peak_memory - stats.base_memory
    if device == "cuda":
        above = torch.cuda.max_memory_allocated() - base
    row = asdict(stats) | {"regions_per_s": stats.regions_per_s, "above_model": above}
    print(json.dumps(row))


def measure_ours(height: int, width: int, args: argparse.Namespace) -> dict[str, Any]:
    from measure import run_child

    path = args.scratch / f"{height}x{width}.{args.compression}.tif"
    if not path.exists():
        write_image(path, height, width, args.compression)
    given = {name: getattr(args, name) for name in ("encoder", "context", "device", "scratch")}
    row = run_child(Path(__file__), {"child": path} | given, args.limit, timeout=6 * 3600)
    return {"height": height, "width": width} | row


def measure_naive(form: str, height: int, width: int, args: argparse.Namespace) -> dict[str, Any]:
    """The square of as many pixels, a multiple of 512."""
    from measure import run_child

    side = 512 * max(1, round(math.sqrt(height * width) / 512))
    given = {"form": FORMS[form], "encoder": args.encoder, "side": side, "rounds": 1}
    row = run_child(HERE / "whole_image.py", given, args.limit, timeout=6 * 3600)
    if row["outcome"] == "measured":
        row["seconds"], row["above_model"] = row["seconds"]["median"], row.pop("memory")
    return {"height": side, "width": side} | row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=parse_sizes, default=SIZES, help="HxW or H, ...")
    parser.add_argument("--forms", type=parse_forms, default="ours", help="of ours, naive, grown")
    parser.add_argument("--compression", default="deflate", choices=["deflate", "jpeg"])
    parser.add_argument("--encoder", default="convnext_atto", help="naive forms take a SwinV2")
    parser.add_argument("--context", default="xl", help='of ours; "none" for none')
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--limit-gib", type=float, default=20, help="of a process, on a CPU")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "xt-scaling")
    parser.add_argument("--out", type=Path, help="JSON to write; default is the screen")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        run_one(args.child, args.encoder, args.context, args.device, args.scratch)
        return
    if set(args.forms) & {"naive", "grown"} and not args.encoder.startswith("swinv2"):
        parser.error(f"--forms naive, grown take --encoder swinv2_..., got {args.encoder}")

    from measure import HAS_GPU, write_record

    if set(args.forms) - {"ours"} and HAS_GPU != (args.device == "cuda"):
        parser.error("--forms naive, grown run on CUDA where there is a device, and only there")
    args.limit = int(args.limit_gib * 2**30) if args.device == "cpu" else None
    args.scratch.mkdir(parents=True, exist_ok=True)
    rows = []
    for height, width in args.sizes:
        for form in args.forms:
            ours = form == "ours"
            row = {"form": FORMS[form] or form, "device": args.device, "encoder": args.encoder}
            row["context"] = args.context if ours else "none"
            row |= (
                measure_ours(height, width, args)
                if ours
                else measure_naive(form, height, width, args)
            )
            rows.append(row)
            told = row["outcome"]
            if told == "measured":
                told = (
                    f"{row['above_model'] / 2**20:7.1f} MiB above the model  "
                    f"{row['regions_per_s']:6.1f} regions/s"
                )
            print(f"{row['height']:>6} x {row['width']:<6} {row['form']:>20}  {told}", flush=True)
    full = [
        row["above_model"]
        for row in rows
        if row["form"] == "ours" and row["outcome"] == "measured"
        if row["height"] * row["width"] >= 4096**2
    ]
    record = {
        "what": "streaming, peak resident memory above the loaded model",
        "encoder": args.encoder,
        "context": args.context,
        "compression": args.compression,
        "dtype": "float32" if args.device == "cpu" else "bfloat16",
        "largest_over_smallest": max(full) / min(full) if full else None,
        "rows": rows,
    }
    if full:
        print(f"largest / smallest from 4,096 px on: {record['largest_over_smallest']:.3f}")
    write_record(args.out, record)


if __name__ == "__main__":
    main()
