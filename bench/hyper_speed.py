"""Time of `hyper_attention` at one length, beside the published algorithm and exact attention.

    python bench/hyper_speed.py [--length 32768] [--heads 6] [--head-dim 128] [--out RECORD.json]

Forms run in turns; prints the median of the rounds. Exact attention, the slowest, runs once.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial
from pathlib import Path

import torch
from baselines import published_hyper_attention
from measure import DEVICE, DTYPE, script_row, seconds, write_record

import xt_kernels as xk


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=32_768, help="tokens")
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="where to write the record, JSON")
    options = parser.parse_args()
    shape = (1, options.heads, options.length, options.head_dim)
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator).to(DEVICE, DTYPE) for _ in range(3)]
    forms = {
        "hyper_attention": partial(xk.hyper_attention, *tensors),
        'hyper_attention(residual="mean")': partial(xk.hyper_attention, *tensors, residual="mean"),
        'hyper_attention(window="cluster", residual="mean")': partial(
            xk.hyper_attention, *tensors, window="cluster", residual="mean"
        ),
        "published": partial(published_hyper_attention, *tensors),
    }
    times: dict[str, list[float]] = {name: [] for name in forms}
    for form in forms.values():
        form()
    for _ in range(options.rounds):
        for name, form in forms.items():
            times[name].append(seconds(form))
    exact = torch.nn.functional.scaled_dot_product_attention
    times["scaled_dot_product_attention"] = [seconds(partial(exact, *tensors))]
    for name, found in times.items():
        print(f"{statistics.median(found):9.4f} s  {name}")
    note = f"batch 1, {options.heads} heads of {options.head_dim}, {str(DTYPE)[6:]}, {DEVICE}"
    record = {
        "work": "hyper_speed",
        "title": "hyper_attention at one length, forward",
        "rows": [
            script_row(name, f"{options.length:,} tokens", found, "s", note)
            for name, found in times.items()
        ],
    }
    write_record(options.out, record)


if __name__ == "__main__":
    main()
