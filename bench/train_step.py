"""A training step of an image of many regions: what context costs, what recompute saves.

    python bench/train_step.py --encoder swinv2_tiny --size 4096 --region 512

`context` and `none` are the step (forward, loss, backward) with and without the context encoder,
both with recompute, in turns in one process: processor seconds, and the ratio of each round. Memory
is the peak above the model, its gradients and the image, each case in a process of its own; `kept`
is `context` without recompute.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any


def make_step(case: str, args: argparse.Namespace) -> Callable[[], None]:
    """A step of a fresh model; gradients are there already when it runs."""
    import torch

    import xt_models as xm

    warnings.simplefilter("ignore")
    model = xm.create_model(
        args.encoder, context=None if case == "none" else "xl", region=args.region, num_classes=10,
        chunk_regions=args.chunk_regions,
    ).train()  # fmt: skip
    model.recompute = None if case == "kept" else args.recompute
    generator = torch.Generator().manual_seed(0)
    size = (1, 3, args.size, args.size)
    image = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
    label = torch.tensor([3])
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def step() -> None:
        loss = model.head.loss(model(image).logits, label)
        loss.backward()
        assert loss.isfinite()

    return step


def run_one(case: str, args: argparse.Namespace) -> None:
    """Runs in the child: prints the peak as one line of JSON."""
    from xt_models.host import current_rss, keep_memory_flat, peak_rss, reset_peak_rss

    keep_memory_flat()
    step = make_step(case, args)
    reset_peak_rss()
    base = current_rss()
    step()
    print(json.dumps({"case": case, "peak": peak_rss() - base}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--encoder", default="swinv2_tiny")
    parser.add_argument("--size", type=int, default=4096, help="side of the image, pixels")
    parser.add_argument("--region", type=int, default=512)
    parser.add_argument("--chunk-regions", type=int, default=4)
    parser.add_argument("--recompute", type=int, default=1, help="regions encoded at a time")
    parser.add_argument("--rounds", type=int, default=3, help="0 leaves the times out")
    parser.add_argument("--memory", default="context,kept", help="cases; empty for none")
    parser.add_argument("--out", type=Path, help="JSON to write; default is the screen")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        run_one(args.child, args)
        return

    import torch
    from measure import write_record

    names = ("encoder", "size", "region", "chunk_regions", "recompute")
    record: dict[str, Any] = {
        "what": "forward, loss and backward of one image; peak resident memory of it",
        **{name: getattr(args, name) for name in names},
    }
    if args.rounds:
        steps = {case: make_step(case, args) for case in ("context", "none")}
        seconds: dict[str, list[float]] = {case: [] for case in steps}
        for _ in range(args.rounds):
            for case, step in steps.items():
                start = time.process_time()
                step()
                seconds[case].append(time.process_time() - start)
        rounds = zip(seconds["context"], seconds["none"], strict=True)
        record |= {"processor_seconds": seconds, "ratios": [a / b for a, b in rounds]}
        record["ratio"] = statistics.median(record["ratios"])
        print(f"context / none, processor time: {record['ratio']:.3f} of {record['ratios']}")
    peaks = {}
    for case in filter(None, args.memory.split(",")):
        command = [sys.executable, __file__, "--child", case]
        for name in names:
            command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
        child = subprocess.run(command, capture_output=True, text=True)
        if child.returncode:
            said = child.stderr.strip().splitlines()
            raise SystemExit(f"{case}: exit code {child.returncode}, {said[-1:]}")
        peaks[case] = json.loads(child.stdout.splitlines()[-1])["peak"]
        print(f"{case:>8}: peak {peaks[case] / 2**20:8.1f} MiB", flush=True)
    if {"context", "kept"} <= set(peaks):
        record["peak_ratio"] = peaks["context"] / peaks["kept"]
        print(f"recompute / kept, peak memory: {record['peak_ratio']:.3f}")
    write_record(args.out, record | {"peaks": peaks, "threads": torch.get_num_threads()})


if __name__ == "__main__":
    main()
