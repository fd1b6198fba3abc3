"""Kills runs with `kill -9` at random moments, goes on, and compares every byte.

    python scripts/kill_stress.py --kills 200 [--out RECORD.json]

Each round starts a run in a process of its own, kills it, kills the run that goes on with even
chance, lets one go on to the end, and compares the folder with that of a run that nobody stopped.
Ends with status 1 at the first difference or leftover file.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import tifffile
import torch

import xt_models as xm
from xt_models.journal import verify
from xt_models.registry import RandomWeightsWarning


def make_model() -> xm.XT:
    """A tiny model with XL memory of two chunks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RandomWeightsWarning)
        return xm.create_model(
            "convnext_atto", region=64, dim=32, depth=2, num_heads=2, chunk_regions=3,
            memory_chunks=2, num_classes=3,
        )  # fmt: skip


def write_page(path: Path) -> None:
    """A tiled TIFF of 6 x 9 regions, most of them paper."""
    rng = np.random.default_rng(0)
    pixels = np.full((370, 570, 3), 250, np.uint8)
    for _ in range(20):
        top, left = rng.integers(0, 300), rng.integers(0, 500)
        pixels[top : top + 60, left : left + 60] = rng.integers(0, 255, (60, 60, 3))[
            : 370 - top, : 570 - left
        ]
    tifffile.imwrite(path, pixels, tile=(64, 64), compression="deflate", photometric="rgb")


def start(model: xm.XT, image: Path, out: Path) -> int:
    """A process that runs `stream` and ends with status 0 if all went well; its id."""
    child = os.fork()
    if child:
        return child
    try:
        xm.stream(model, image, out, batch_size=4, checkpoint_seconds=0)
        os._exit(0)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)


def kill(child: int, seconds: float) -> bool:
    """Kills a child after so long; whether it was still running."""
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of an output but what the run cost."""
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and p.name != "run.json"
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="where to write the record, JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)  # and nothing runs before the forks: a child has no pool of threads
    chance = random.Random(args.seed)
    model = make_model()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        image, out = folder / "page.tif", folder / "out"
        write_page(image)
        begin = time.monotonic()
        assert os.waitpid(start(model, image, folder / "whole"), 0)[1] == 0
        length = time.monotonic() - begin
        expected = contents(folder / "whole")
        kills = rounds = resumed = 0
        while kills < args.kills:
            rounds += 1
            while not out.exists() and (kill(start(model, image, out), chance.random() * length)):
                kills += 1
                if chance.random() < 0.5 or kills >= args.kills:
                    break
            resumed += (folder / "out.part" / "journal" / "log").exists()
            if not out.exists() and os.waitpid(start(model, image, out), 0)[1]:
                raise SystemExit(f"round {rounds}: the run could not go on")
            if contents(out) != expected or verify(out):
                raise SystemExit(f"round {rounds}: other bytes than without a kill")
            left = {p.name for p in folder.iterdir()} - {"page.tif", "whole", "out"}
            if left:
                raise SystemExit(f"round {rounds}: left over {left}")
            shutil.rmtree(out)
            print(f"{kills} kills, {resumed} runs went on", file=sys.stderr, flush=True)
    print(
        f"{kills} kills in {rounds} runs, {resumed} of them went on from a checkpoint: "
        f"all outputs identical, no leftover file"
    )
    if args.out is not None:
        sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))
        from measure import script_row, write_record

        note = f"{rounds} runs, {resumed} of them went on from a checkpoint"
        rows = [
            script_row("outputs with other bytes", f"{kills} kills", 0.0, "", note),
            script_row("leftover files", f"{kills} kills", 0.0, "", note),
        ]
        title = "runs killed at random moments (kill -9), then taken up again"
        write_record(args.out, {"work": "kill_stress", "title": title, "rows": rows})


if __name__ == "__main__":
    main()
