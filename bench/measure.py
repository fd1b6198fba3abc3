"""How a bench is measured: the answer first, then time in turns, then memory in a pass of its own.

    def test_something(benchmark):
        compare(benchmark, ours, {"name": other}, num_bytes=..., flops=...)

`compare` fails if an answer is wrong. Otherwise `extra_info` holds, for each form, the median of
its times with the 20th and 80th percentile, peak memory, error where forms approximate, and the
ratio of times to ours, formed round by round, because rounds run in turns. A yardstick, the same
work in every bench, tells how the machine drifts from bench to bench.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from inputs import relative_error

from xt_models.host import cpu_name, current_rss, num_cpus, peak_rss, reset_peak_rss

SCHEMA = 1  # of extra_info and of the rows of children; `xt report` reads no other
HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
# Low precision where the GPU is meant to be used so; CPUs are measured in fp32.
DTYPE = torch.bfloat16 if HAS_GPU else torch.float32
ROOT = Path(__file__).parent.parent
# A child that measures memory writes it to the file that this names; "off" leaves it out.
_MEMORY = "XT_BENCH_MEMORY"

Run = Callable[[], Any]


def full_only(*values: Any) -> list[Any]:
    """Values of a parameter that are measured with --full only."""
    import pytest

    return [pytest.param(value, marks=pytest.mark.full) for value in values]


def seconds(run: Run) -> float:
    """Time of one call, which on a GPU has finished."""
    if not HAS_GPU:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # A full queue, so that the launch is not what is measured.
    torch.cuda._sleep(2_000_000)
    first.record()
    run()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1000


def spread(values: list[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile, and how many values they are of."""
    low = high = values[0]
    if len(values) > 1:
        low, *_, high = statistics.quantiles(values, n=5, method="inclusive")
    return {"median": statistics.median(values), "p20": low, "p80": high, "rounds": len(values)}


def agree(ours: Any, other: Any) -> None:
    """The two answers are equal to the precision of `DTYPE`; few at a time, to save memory."""
    if not isinstance(ours, torch.Tensor):
        for one, two in zip(ours, other, strict=True):
            agree(one, two)
        return
    step = max(1, 2**26 // max(1, ours[0].numel()))
    for first in range(0, len(ours), step):
        a, b = (x[first : first + step].float() for x in (ours, other))
        torch.testing.assert_close(a, b, atol=2e-2 if DTYPE == torch.bfloat16 else 1e-5, rtol=1e-2)


def compare(
    benchmark: Any,
    ours: Run,
    others: Run | Mapping[str, Run],
    num_bytes: int | None = None,
    *,
    flops: float | None = None,
    units: tuple[float, str] | None = None,
    truth: torch.Tensor | None = None,
    max_error: Mapping[str, float] | None = None,
    absent: Mapping[str, str] | None = None,
    rounds: int = 15,
    first: str = "ours",
    op: str | None = None,
    variant: str = "",
    **facts: Any,
) -> None:
    """Checks, times and weighs `ours` against other forms of the same work.

    others: name -> form; one form alone is called "eager".
    num_bytes, flops: what the work must move and compute; the floor of its time is the larger of a
        copy of as many bytes and a matrix product of as many operations.
    units: how many of what one call handles, such as (16, "regions"), for units a second.
    truth: where forms approximate it, the exact answer: the relative error of each form is noted,
        and those in `max_error` must keep it. Otherwise all answers must agree.
    absent: other forms that this machine cannot run, and why.
    first: what the first form is called where it is none of ours.
    op, variant: name the rows of the report's tables; default is the name of the test.
    facts: noted as they are; the first of length, regions, side, chunks is the axis of plots.

    Rounds end early when they have taken half a minute. Raises AssertionError for a wrong answer.
    """
    forms = {first: ours} | (dict(others) if isinstance(others, Mapping) else {"eager": others})
    asked = os.environ.get(_MEMORY, "")
    if asked not in ("", "off"):
        Path(asked).write_text(json.dumps({name: _weigh(run) for name, run in forms.items()}))
        return
    info = benchmark.extra_info
    info |= {"op": op or benchmark.name.partition("[")[0], "variant": variant}
    info |= {"schema": SCHEMA, "first": first, "device": DEVICE, "absent": dict(absent or {})}
    info |= {"dtype": str(DTYPE).removeprefix("torch."), "threads": torch.get_num_threads()} | facts
    if truth is None:
        answer = ours()
        for name, run in forms.items():
            if name != first:
                agree(answer, run())
        del answer
    else:
        assert max_error, "a bench with a truth needs max_error"
        info["error"] = {name: relative_error(run(), truth) for name, run in forms.items()}
        assert all(info["error"][name] <= most for name, most in max_error.items()), info["error"]
    if benchmark.disabled:
        benchmark(ours)
        return

    floors = {}
    if num_bytes:
        # A copy reads and writes: half of the bytes each way.
        source = torch.zeros(max(1, num_bytes // 2), dtype=torch.uint8, device=DEVICE)
        target = torch.empty_like(source)
        floors["copy"] = lambda: target.copy_(source)
    runs = forms | floors | {"yardstick": _yardstick(DEVICE)}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    end = time.perf_counter() + 30
    while len(times[first]) < rounds and (len(times[first]) < 3 or time.perf_counter() < end):
        for name, run in runs.items():
            times[name].append(seconds(run))
    info["seconds"] = {name: spread(times[name]) for name in forms}
    info["ratio"] = {
        name: spread([a / b for a, b in zip(times[name], times[first], strict=True)])
        for name in forms
        if name != first
    }
    info["yardstick"] = statistics.median(times["yardstick"])
    median = info["seconds"][first]["median"]
    floor = [statistics.median(times["copy"])] if floors else []
    if flops:
        floor.append(flops / matmul_flops(DEVICE, DTYPE))
        info["flops"] = flops
    if floor:
        info |= {"bytes": num_bytes, "floor": max(floor), "over_floor": median / max(floor)}
    if units:
        info["units_per_s"] = {"what": units[1], "value": units[0] / median}
    if memory := _memory(forms):
        info["memory"] = memory

    def finished() -> None:
        ours()
        if HAS_GPU:
            torch.cuda.synchronize()

    benchmark.pedantic(finished, rounds=min(5, len(times[first])), warmup_rounds=0)


def _memory(forms: Mapping[str, Run]) -> dict[str, int]:
    """Peak bytes of each form above its inputs: on a CPU of a fresh process that runs this test."""
    if HAS_GPU:
        return {name: _weigh(run) for name, run in forms.items()}
    if os.environ.get(_MEMORY) == "off":
        return {}
    file, _, test = os.environ["PYTEST_CURRENT_TEST"].rpartition(" ")[0].partition("::")
    node = f"{Path(__file__).parent / Path(file).name}::{test}"
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "memory.json"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        child = subprocess.run(
            [*command, "--benchmark-disable", "--full", node],
            cwd=ROOT, env=os.environ | {_MEMORY: str(out)}, capture_output=True, text=True,
        )  # fmt: skip
        assert out.exists(), f"the memory pass failed:\n{child.stdout[-2000:]}"
        return dict(json.loads(out.read_text()))


def _weigh(run: Run) -> int:
    """Peak bytes of one call above what is there before it; a first call warms up."""
    run()
    if HAS_GPU:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    reset_peak_rss()
    before = current_rss()
    run()
    return peak_rss() - before


# Children under a memory limit


def run_child(script: Path, arguments: dict[str, Any], limit: int | None, timeout: float) -> dict:
    """What `script` prints as its last line, JSON, run with `--name value` arguments in a process
    that may take `limit` bytes of memory of its own.

    The result has "outcome": "measured", "out of memory", or "out of time". Raises RuntimeError for
    any other failure.
    """
    words = [word for name, value in arguments.items() for word in (f"--{name}", str(value))]

    def bound() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    try:
        child = subprocess.run(
            [sys.executable, str(script), *words],
            capture_output=True, text=True, timeout=timeout, preexec_fn=bound,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"outcome": "out of time", "timeout": timeout}
    if child.returncode == 0:
        return {"outcome": "measured"} | json.loads(child.stdout.splitlines()[-1])
    told = child.stderr.strip().splitlines() or [""]
    # Killed by the system, refused by PyTorch's CPU or CUDA allocator, by Python, or by C++.
    signs = ("allocate memory", "out of memory", "MemoryError", "bad_alloc")
    if child.returncode == -9 or any(sign in line for line in told[-5:] for sign in signs):
        return {"outcome": "out of memory", "limit": limit, "told": told[-1][:200]}
    raise RuntimeError(f"{script.name} {' '.join(words)}: {told[-1]}")


# The machine


@lru_cache(maxsize=1)
def _yardstick(device: str) -> Run:
    """A copy and a product of matrices, about a millisecond of each on a CPU core."""
    source = torch.zeros(2**26 if device == "cuda" else 2**22, device=device)
    size = 4096 if device == "cuda" else 384
    one, other = torch.zeros(2, size, size, device=device).unbind()
    target, product = torch.empty_like(source), torch.empty_like(one)

    def run() -> None:
        target.copy_(source)
        torch.mm(one, other, out=product)

    return run


@lru_cache(maxsize=4)
def matmul_flops(device: str, dtype: torch.dtype) -> float:
    """Floating-point operations a second in a product of square matrices; the best of ten."""
    size = 8192 if device == "cuda" else 1024
    one, other = torch.randn(2, size, size, device=device, dtype=dtype).unbind()
    torch.mm(one, other)
    return 2 * size**3 / min(seconds(lambda: torch.mm(one, other)) for _ in range(10))


def machine() -> dict[str, Any]:
    """What a number was measured on."""
    import triton

    facts: dict[str, Any] = {
        "schema": SCHEMA,
        "cpu": cpu_name(),
        "cores": num_cpus(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": _tell("git", "-C", str(ROOT), "rev-parse", "HEAD"),
    }
    if HAS_GPU:
        facts["gpu"] = torch.cuda.get_device_name()
        facts["driver"] = _tell("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return facts


def _tell(*command: str) -> str:
    """First line of what a command prints, or "unknown"."""
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return told.strip().splitlines()[0]
