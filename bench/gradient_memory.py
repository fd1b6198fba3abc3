"""Peak memory of training through many chunks, whose gradient goes through all of them.

    python bench/gradient_memory.py --out bench/results/<machine>/gradient_memory.json

Each case is a process of its own: `XLContextEncoder` over --chunks chunks of --tokens tokens, one
backward pass from the sum of all outputs. `boundary` is what "through" must keep of each chunk, its
tokens and the memory it leaves; `rest` is the peak above the model without it, and flat means that
`rest` is the same for many chunks as for few.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path


def run_one(gradient: str, count: int, tokens: int, dim: int, depth: int) -> None:
    """Runs in the child: prints its row as one line of JSON."""
    from xt_models.host import current_rss, keep_memory_flat, peak_rss, reset_peak_rss

    keep_memory_flat()
    import torch

    import xt_models as xm

    torch.manual_seed(0)
    encoder = xm.XLContextEncoder(dim, depth, dim // 64, gradient=gradient)
    generator = torch.Generator().manual_seed(1)

    def run(number: int) -> int:
        """Bytes of the boundaries."""
        loss, memory, boundary = torch.zeros(()), None, 0
        for _ in range(number):
            chunk = torch.randn(1, tokens, dim, generator=generator)
            out, memory = encoder(chunk, memory)
            loss = loss + out.square().mean()
            # The first layer's part of the memory is a copy of the chunk.
            boundary += chunk.nbytes + out.nbytes + memory.states.nbytes
        loss.backward()
        return boundary

    run(2)  # gradients of the weights, and what a first run allocates
    reset_peak_rss()
    base = current_rss()
    boundary = run(count)
    peak = peak_rss() - base
    row = {"gradient": gradient, "chunks": count, "peak": peak, "boundary": boundary}
    print(json.dumps(row | {"rest": peak - boundary}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gradients", default="through", help="also stop, truncated")
    parser.add_argument("--chunks", default="4,16,64")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--out", type=Path, help="JSON to write; default is the screen")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        run_one(args.child[0], int(args.child[1]), args.tokens, args.dim, args.depth)
        return

    from measure import write_record

    rows = []
    for gradient in args.gradients.split(","):
        for count in args.chunks.split(","):
            command = [sys.executable, __file__, "--child", gradient, count]
            for name in ("tokens", "dim", "depth"):
                command += [f"--{name}", str(getattr(args, name))]
            child = subprocess.run(command, capture_output=True, text=True)
            if child.returncode:
                raise SystemExit(f"{gradient} {count}: {child.stderr.strip().splitlines()[-1]}")
            rows.append(row := json.loads(child.stdout.splitlines()[-1]))
            sizes = "  ".join(
                f"{k} {row[k] / 2**20:7.1f} MiB" for k in ("peak", "boundary", "rest")
            )
            print(f"{gradient:>9} {count:>4} chunks  {sizes}", flush=True)
    through = [row["rest"] for row in rows if row["gradient"] == "through"]
    record = {
        "what": "forward and backward over chunks, peak resident memory above the model",
        "tokens": args.tokens,
        "dim": args.dim,
        "depth": args.depth,
        "largest_over_smallest": max(through) / min(through) if through else None,
        "rows": rows,
    }
    if through:
        print(f"rest, largest / smallest: {record['largest_over_smallest']:.3f}")
    write_record(args.out, record)


if __name__ == "__main__":
    main()
