"""Streaming a file against the region encoder alone on the same batches already in memory, and a
page that is mostly paper with and without reuse of equal regions.

Each case is a process of its own (`streaming.py`), with memory as the command line has it. The time
that pytest-benchmark prints is that of the process; what was measured in it is in `extra_info`.
"""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest
from measure import DEVICE, SCHEMA, run_child, spread

SCRIPT = Path(__file__).parent / "streaming.py"


LONG = [("swinv2_tiny", "xl", 4096), ("swinv2_tiny", "none", 4096)]


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("encoder", "context", "side"),
    [
        ("swinv2_tiny", "xl", 1024),
        ("convnext_atto", "none", 3072),
        *[pytest.param(*case, marks=pytest.mark.full) for case in LONG],
    ],
)
def test_streaming_against_encoder_only(benchmark, encoder, context, side):
    compare_streams(
        benchmark, what="file", encoder=encoder, context=context, rounds=3,
        side=512 if benchmark.disabled else side,  # enough to see that it runs
    )  # fmt: skip


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    "encoder", ["convnext_atto", pytest.param("swinv2_tiny", marks=pytest.mark.full)]
)
def test_a_page_of_70_percent_paper(benchmark, encoder):
    compare_streams(benchmark, what="page", encoder=encoder, context="xl", rounds=2)


def compare_streams(benchmark, **arguments):
    """Runs the script and notes what `xt report` reads; the first form is ours."""
    # It writes tokens, and reads compressed files.
    for package in ("zarr", "imagecodecs"):
        pytest.importorskip(package)
    row = {}
    if benchmark.disabled:
        arguments["rounds"] = 0  # what comes before the clock is enough to see that it runs

    def measure():
        row.update(run_child(SCRIPT, arguments, None, timeout=3600))

    benchmark.pedantic(measure, rounds=1)
    assert row["outcome"] == "measured", row
    if benchmark.disabled:
        return
    times, regions = row["wall"], row["regions"]
    first, *others = times
    is_page = arguments["what"] == "page"
    context = arguments["context"].replace("none", "no context")
    benchmark.extra_info |= {
        "schema": SCHEMA,
        "op": "a page, 70 % paper" if is_page else "streaming a deflate TIFF",
        "variant": f"{arguments['encoder']}, {context}",
        "device": DEVICE,
        "dtype": "float32",
        "encoder": arguments["encoder"],
        "context": arguments["context"],
        "batch": row["batch"],
        "threads": row["threads"],
        "yardstick": row["yardstick"],
        "regions": regions,
        "first": first,
        "seconds": {name: spread(values) for name, values in times.items()},
        "ratio": {
            name: spread([a / b for a, b in zip(times[name], times[first], strict=True)])
            for name in others
        },
        "units_per_s": {"what": "regions", "value": regions / statistics.median(times[first])},
        "processor_seconds": {name: spread(values) for name, values in row["processor"].items()},
    }
