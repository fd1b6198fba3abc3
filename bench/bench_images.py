"""xT against the same Swin on the whole image: regions a second and memory, by size of the image.

    pytest bench/bench_images.py --benchmark-only          # sizes, and encoders by contexts
    pytest bench/bench_images.py --benchmark-only --full   # all of both, 4,096 px, wider Swin

Each case is a process of its own (`whole_image.py`) that may take 20 GiB of memory on a CPU. Out of
memory is a result. The time that pytest-benchmark prints is that of the process; what was measured
in it is in `extra_info`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from measure import DEVICE, DTYPE, HAS_GPU, LIMIT, RECOMPUTED, SCHEMA, context_of, run_child

SCRIPT = Path(__file__).parent / "whole_image.py"
SIDES = (512, 1024, 2048)
CONTEXTS = ("xl", "hyper", "mamba", "vit", "none")
BATCH = 16  # regions at once
# (mode, encoder, form) -> (sides always measured, sides with --full). What runs out of memory does
# so within seconds.
Cases = dict[tuple[str, str, str], tuple[tuple[int, ...], tuple[int, ...]]]
# How long an image takes that grows, by whom.
SIZES: Cases = {
    ("inference", "swinv2_tiny", "xt xl"): (SIDES, (4096,)),
    ("inference", "swinv2_tiny", "regions"): (SIDES, (4096,)),
    ("inference", "swinv2_tiny", "naive"): (SIDES, (256, 4096)),
    ("inference", "swinv2_tiny", "naive, window grown"): (SIDES, ()),
    ("inference", "swinv2_tiny", "xt hyper"): ((), (256, *SIDES)),
    ("training", "swinv2_tiny", "xt xl"): ((512,), (1024, 2048)),
    ("training", "swinv2_tiny", "xt xl" + RECOMPUTED): ((), SIDES),
    ("training", "swinv2_tiny", "naive"): ((512,), (1024, 2048)),
    ("training", "swinv2_tiny", "regions"): ((), SIDES),
    ("training", "swinv2_tiny", "naive, window grown"): ((), (512, 1024)),
}
# What region encoder and context encoder cost together; by default the fastest encoder with all.
MATRIX: Cases = {
    ("inference", encoder, f"xt {context}"): ((1024,), (512, 2048))
    if encoder == "convnext_atto" or (encoder == "swinv2_tiny" and context in ("xl", "none"))
    else ((), SIDES)
    for encoder in ("swinv2_tiny", "hiera_tiny", "convnext_atto")
    for context in CONTEXTS
} | {
    ("training", "swinv2_tiny", "xt hyper"): ((), (512, 1024)),
    ("training", "swinv2_tiny", "xt mamba"): ((), (512, 1024)),
    ("training", "swinv2_tiny", "xt vit"): ((), (512,)),
    ("training", "convnext_atto", "xt xl"): ((), (512,)),
    ("training", "hiera_tiny", "xt xl"): ((), (512,)),
}
# Where the paper and its released code have numbers: wider encoders.
PAPER: Cases = {
    ("inference", f"swinv2_{width}", form): ((), sides)
    for width in ("small", "base", "large")
    for form, sides in {
        "naive": (256,), "xt hyper": (256, 512), "xt xl": (512,), "xt mamba": (512,),
    }.items()
} | {("inference", "swinv2_base", "xt vit"): ((), (512,))}  # fmt: skip
PARAMETERS = [
    pytest.param(*case, side, marks=marks)
    for case, (short, long) in (MATRIX | SIZES | PAPER).items()
    for sides, marks in ((short, []), (long, [pytest.mark.full]))
    for side in sides
]


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("mode, encoder, form, side", PARAMETERS)
def test_image(benchmark, request, mode, encoder, form, side):
    arguments = {"form": form, "encoder": encoder, "side": side, "mode": mode, "batch": BATCH}
    if benchmark.disabled:
        if (mode, encoder, form) != ("inference", "convnext_atto", "xt none"):
            pytest.skip("one small case is enough to see that it runs")
        arguments |= {"side": 512, "rounds": 1}
    short = 8 if (mode, encoder, form) in SIZES and mode == "inference" else 5
    arguments["seconds"] = 60 if request.config.getoption("--full") else short
    row = {}

    def measure():
        row.update(run_child(SCRIPT, arguments, None if HAS_GPU else LIMIT, timeout=1800))

    benchmark.pedantic(measure, rounds=1)
    ours = form.startswith("xt ")
    benchmark.extra_info |= {
        "schema": SCHEMA,
        "device": DEVICE,
        "dtype": str(DTYPE).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "mode": mode,
        "encoder": encoder,
        "form": form,
        "context": context_of(form),
        "side": side,
        "batch": 1 if form.startswith("naive") else BATCH,
        "limit": None if HAS_GPU else LIMIT,
    } | row
    if ours:
        assert row["outcome"] == "measured", row
