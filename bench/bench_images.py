"""xT against the same Swin on the whole image: regions a second and memory, by size of the image.

    pytest bench/bench_images.py --benchmark-only          # small, and where the naive form ends
    pytest bench/bench_images.py --benchmark-only --full   # all sizes, inference and training

Each case is a process of its own (`whole_image.py`) that may take 20 GiB of memory on a CPU. Out of
memory is a result. The time that pytest-benchmark prints is that of the process; what was measured
in it is in `extra_info`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from measure import DEVICE, DTYPE, HAS_GPU, SCHEMA, run_child

LIMIT = None if HAS_GPU else 20 * 2**30
SCRIPT = Path(__file__).parent / "whole_image.py"
# (form, sides always measured, sides with --full); what runs out of memory does so within seconds.
CASES = {
    "inference": [
        ("xt xl", [512, 1024, 2048], [4096]),
        ("xt none", [512], [1024, 2048, 4096]),
        ("xt hyper", [], [512, 1024, 2048]),
        ("regions", [512, 1024], [2048, 4096]),
        ("naive", [512, 1024], [2048, 4096]),
        ("naive, window grown", [512, 2048], [1024]),
    ],
    "training": [
        ("xt xl", [512], [1024, 2048]),
        ("regions", [], [512, 1024, 2048]),
        ("naive", [512], [1024, 2048]),
        ("naive, window grown", [], [512, 1024]),
    ],
}
PARAMETERS = [
    pytest.param(mode, form, side, marks=marks)
    for mode, rows in CASES.items()
    for form, short, long in rows
    for sides, marks in ((short, []), (long, [pytest.mark.full]))
    for side in sides
]


@pytest.mark.parametrize("mode, form, side", PARAMETERS)
def test_image(benchmark, request, mode, form, side):
    arguments = {"form": form, "side": side, "mode": mode}
    arguments["seconds"] = 60 if request.config.getoption("--full") else 10
    if benchmark.disabled:
        if side > 512 or mode == "training" or "xt none" != form:
            pytest.skip("one small case is enough to see that it runs")
        arguments["rounds"] = 1
    row = {}

    def measure():
        row.update(run_child(SCRIPT, arguments, LIMIT, timeout=1800))

    benchmark.pedantic(measure, rounds=1)
    facts = {"schema": SCHEMA, "device": DEVICE, "encoder": "swinv2_tiny"}
    facts["dtype"] = str(DTYPE).removeprefix("torch.")
    benchmark.extra_info |= facts | arguments | {"limit": LIMIT} | row
    if form.startswith("xt "):
        assert row["outcome"] == "measured", row
