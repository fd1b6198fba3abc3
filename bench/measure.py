"""How a bench is measured: the answer first, then time in turns, then memory in a pass of its own.

    def test_something(benchmark):
        compare(benchmark, ours, {"name": other}, num_bytes=..., flops=...)

`compare` fails if an answer is wrong. Otherwise `extra_info` holds, for each form, the median of
its times with the 20th and 80th percentile, peak memory, error where forms approximate, and the
ratio of times to ours, formed round by round, because rounds run in turns. A yardstick, the same
work in every bench, tells how the machine drifts from bench to bench. What a form needs beyond the
machine's memory is a result too, with the limit at which it ended.

Scripts that are no benches write their JSON by `write_record`, under the same head.
"""

from __future__ import annotations

import json
import os
import platform
import random
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config
from inputs import relative_error

from xt_models.host import (
    available_memory,
    cpu_name,
    current_rss,
    num_cpus,
    peak_rss,
    reset_peak_rss,
)

SCHEMA = 1  # of extra_info and of the rows of children; `xt report` reads no other
HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
# Low precision where the GPU is meant to be used so; CPUs are measured in fp32.
DTYPE = torch.bfloat16 if HAS_GPU else torch.float32
ROOT = Path(__file__).parent.parent
# A child that measures memory writes it into the folder that this names; "off" leaves it out.
_MEMORY = "XT_BENCH_MEMORY"
_DIRTY = "--untracked-files=no"
# Bytes that a process may take on a CPU.
LIMIT = 20 * 2**30
# A process out of memory: PyTorch's CPU or CUDA allocator, Python, or C++ said so.
_SIGNS = ("allocate memory", "out of memory", "MemoryError", "bad_alloc")

RECOMPUTED = ", recomputed"  # ends a form that computes activations again in the backward pass
torch._functorch.config.donated_buffer = False  # of what is compiled, too, the graph may be kept

Run = Callable[[], Any]
# Benches that this run has selected, and its options for those that weigh them: from `conftest.py`.
selected: list[str] = []
options: list[str] = []


def context_of(form: str) -> str:
    """The context encoder of a form of whole images, or "none"."""
    return form.removeprefix("xt ").removesuffix(RECOMPUTED) if form.startswith("xt ") else "none"


def full_only(*values: Any) -> list[Any]:
    """Values of a parameter that are measured with --full only."""
    import pytest

    return [pytest.param(value, marks=pytest.mark.full) for value in values]


class Backward:
    """Gradients of what `form()` gives with respect to `inputs`: repeatable, on one graph.

    What the graph keeps is memory of a backward pass: forward and backward are weighed together.
    """

    def __init__(self, form: Run, inputs: Sequence[torch.Tensor], grad: torch.Tensor) -> None:
        self.form, self.inputs, self.grad = form, inputs, grad
        self.out: torch.Tensor | None = None

    def __call__(self) -> tuple[torch.Tensor, ...]:
        if self.out is None:
            self.out = self.form()
        return torch.autograd.grad(self.out, self.inputs, self.grad, retain_graph=True)

    def whole(self) -> tuple[torch.Tensor, ...]:
        """Forward and backward."""
        return torch.autograd.grad(self.form(), self.inputs, self.grad)


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
    """The two answers are equal to the precision of their dtype; few at a time, to save memory.

    A small value among large ones may be what large terms left over, with the rounding of those:
    the absolute error allowed grows with the root mean square.
    """
    if not isinstance(ours, torch.Tensor):
        for one, two in zip(ours, other, strict=True):
            agree(one, two)
        return
    assert ours.shape == other.shape, f"shapes {tuple(ours.shape)} and {tuple(other.shape)}"
    atol = {torch.bfloat16: 2e-2, torch.float16: 2e-3}.get(ours.dtype, 1e-5)
    step = max(1, 2**26 // max(1, ours[0].numel()))
    for first in range(0, len(ours), step):
        a, b = (x[first : first + step].float() for x in (ours, other))
        scale = max(1.0, float(b.square().mean().sqrt()))
        torch.testing.assert_close(a, b, atol=atol * scale, rtol=1e-2)


Parts = torch.Tensor | Mapping[str, torch.Tensor]


def errors(ours: Any, truth: Parts) -> dict[str, float]:
    """Relative error of each part of an answer; the one part of a tensor is "out"."""
    if isinstance(truth, torch.Tensor):
        ours, truth = (ours,), {"out": truth}
    pairs = zip(truth.items(), ours, strict=True)
    return {name: relative_error(part, exact) for (name, exact), part in pairs}


def compare(
    benchmark: Any,
    ours: Run,
    others: Run | Mapping[str, Run],
    num_bytes: int | None = None,
    *,
    flops: float | Mapping[str, float] | None = None,
    units: tuple[float, str] | None = None,
    truth: str | None = None,
    parts: Sequence[str] = ("out",),
    max_error: Mapping[str, float | Mapping[str, float]] | None = None,
    absent: Mapping[str, str] | None = None,
    rounds: int = 15,
    first: str = "ours",
    op: str | None = None,
    variant: str = "",
    dtype: torch.dtype = DTYPE,
    **facts: Any,
) -> None:
    """Checks, times and weighs `ours` against other forms of the same work.

    others: name -> form; one form alone is called "eager".
    num_bytes, flops: what the work must move and compute; the floor of its time is the larger of a
        copy of as many bytes and a matrix product of as many operations. Forms whose work differs
        have each its own operations, and floor.
    units: how many of what one call handles, such as (16, "regions"), for units a second.
    truth: where forms approximate it, the form with the exact answer: the relative error of each
        form is noted, and those in `max_error` must keep it. Otherwise all answers must agree.
    parts: names of what a form gives, if that is several tensors of which each has its error, and
        its bound in `max_error`; what is noted as "error" is that of the first.
    absent: other forms that this machine cannot run, and why.
    first: what the first form is called where it is none of ours.
    op, variant: name the rows of the report's tables; default is the name of the test.
    facts: noted as they are; the first of length, regions, side, chunks is the axis of plots.

    A form other than the first and the truth that runs out of memory is noted with the limit.
    Each round has all forms in an order of its own, the same in every run; rounds end early when
    three or more have taken five seconds, or fewer a minute.

    Raises AssertionError for a wrong answer.
    """
    forms = {first: ours} | (dict(others) if isinstance(others, Mapping) else {"eager": others})
    needed = {first, truth}
    asked = os.environ.get(_MEMORY, "")
    if asked not in ("", "off"):
        (Path(asked) / _slug()).write_text(json.dumps(_weigh_all(forms)))
        return
    info = benchmark.extra_info
    info |= {"op": op or benchmark.name.partition("[")[0], "variant": variant}
    info |= {"schema": SCHEMA, "first": first, "device": DEVICE, "absent": dict(absent or {})}
    info |= {"dtype": str(dtype).removeprefix("torch."), "threads": torch.get_num_threads()} | facts
    memory = {} if benchmark.disabled else _memory(forms)
    if isinstance(ours, Backward):
        info["memory_of"] = "forward and backward"
    lost = {name: found["limit"] for name, found in memory.items() if isinstance(found, dict)}
    assert not needed & set(lost), f"out of memory: {lost}"
    if memory:
        info["memory"] = {name: peak for name, peak in memory.items() if name not in lost}
        info["out_of_memory"] = lost
    forms = {name: run for name, run in forms.items() if name not in lost}
    _check(forms, first, truth, parts, max_error or {}, info)
    if benchmark.disabled:
        benchmark(ours)
        return

    floors = {}
    if num_bytes:
        # A copy reads and writes: half of the bytes each way.
        source = torch.zeros(max(1, num_bytes // 2), dtype=torch.uint8, device=DEVICE)
        target = torch.empty_like(source)
        floors["copy"] = lambda: target.copy_(source)
    extra = floors | {"yardstick": yardstick(DEVICE)}
    runs = forms | extra
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in extra.values():
        run()  # forms are warm from the check
    # What came before has filled the caches: extraction, always after the yardstick, with views
    # always after it, had 0.80 times their speed; in shuffled order it is 0.97.
    order, shuffled = list(runs), random.Random(0)
    begin = time.perf_counter()

    def is_enough() -> bool:
        done, took = len(times[first]), time.perf_counter() - begin
        return done >= rounds or (done > 0 and took > (60 if done < 3 else 5))

    while not is_enough():
        shuffled.shuffle(order)
        for name in order:
            times[name].append(seconds(runs[name]))
    info["seconds"] = {name: spread(times[name]) for name in forms}
    info["ratio"] = {
        name: spread([a / b for a, b in zip(times[name], times[first], strict=True)])
        for name in forms
        if name != first
    }
    info["yardstick"] = statistics.median(times["yardstick"])
    median = info["seconds"][first]["median"]
    copy = statistics.median(times["copy"]) if floors else 0.0
    if num_bytes:
        info["bytes"] = num_bytes
    if isinstance(flops, Mapping):
        info["flops"] = {name: flops[name] for name in forms}
        rate = matmul_flops(DEVICE, dtype)
        info["floor"] = {name: max(copy, flops[name] / rate) for name in forms}
        info["over_floor"] = median / info["floor"][first]
    elif flops or num_bytes:
        if flops:
            info["flops"] = flops
        info["floor"] = max(copy, flops / matmul_flops(DEVICE, dtype) if flops else 0.0)
        info["over_floor"] = median / info["floor"]
    if units:
        info["units_per_s"] = {"what": units[1], "value": units[0] / median}

    def finished() -> None:
        ours()
        if HAS_GPU:
            torch.cuda.synchronize()

    benchmark.pedantic(finished, rounds=min(5, len(times[first])), warmup_rounds=0)


def _check(
    forms: dict[str, Run],
    first: str,
    truth: str | None,
    parts: Sequence[str],
    max_error: Mapping[str, float | Mapping[str, float]],
    info: dict[str, Any],
) -> None:
    """Runs each form once; notes errors against the truth, or sees that all agree."""
    if truth is None:
        answer = forms[first]()
        for name, run in forms.items():
            if name != first:
                agree(answer, run())
        return
    assert first in max_error, "a bench with a truth must bound the error of its first form"
    answer = forms[truth]()
    exact: Parts = answer
    if not isinstance(answer, torch.Tensor):
        exact = dict(zip(parts, answer, strict=True))
    found = {
        name: dict.fromkeys(parts, 0.0) if name == truth else errors(run(), exact)
        for name, run in forms.items()
    }
    info["error"] = {name: values[parts[0]] for name, values in found.items()}
    if len(parts) > 1:
        info["errors"] = found
    for name, most in max_error.items():
        bounds = most if isinstance(most, Mapping) else dict.fromkeys(parts, most)
        assert set(bounds) == set(parts), f"{name}: every part needs a bound"
        # A form that ran out of memory has no error; NaN keeps no bound.
        wrong = {p: e for p, e in found.get(name, {}).items() if not e <= bounds[p]}
        assert not wrong, f"{name}: errors {wrong}, at most {bounds}"


def _slug() -> str:
    """A name of a file for the test that runs now."""
    return (
        os.environ["PYTEST_CURRENT_TEST"].rpartition(" ")[0].rpartition("::")[2].replace("/", "_")
    )


_weighed: dict[str, dict[str, Any]] = {}


def _memory(forms: Mapping[str, Run]) -> dict[str, Any]:
    """Peak bytes of each form above its inputs, or {"limit": bytes} where they did not suffice.

    On a CPU they are those of a fresh process, which may take `LIMIT` bytes, or nine tenths of what
    is free; it runs all selected cases of this bench.
    """
    if os.environ.get(_MEMORY) == "off":
        return {}
    if HAS_GPU:
        return _weigh_all(forms)
    node = os.environ["PYTEST_CURRENT_TEST"].rpartition(" ")[0]
    if node not in _weighed:
        bench = node.partition("[")[0]
        nodes = [n for n in selected if n.partition("[")[0] == bench] or [node]
        limit = min(LIMIT, available_memory() * 9 // 10)
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
            here = [str(Path(__file__).parent / n.rpartition("/")[2]) for n in nodes]
            child = subprocess.run(
                [*command, "--benchmark-disable", *options, *here],
                cwd=ROOT, env=os.environ | {_MEMORY: folder}, capture_output=True, text=True,
                preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)),
            )  # fmt: skip
            for n in nodes:
                file = Path(folder) / n.rpartition("::")[2].replace("/", "_")
                told = file.read_text() if file.exists() else None
                _weighed[n] = json.loads(told) if told else {"failed": child.stdout[-2000:]}
    found = _weighed[node]
    assert "failed" not in found, f"the memory pass failed:\n{found.get('failed')}"
    return found


def _weigh_all(forms: Mapping[str, Run]) -> dict[str, Any]:
    return {name: _weigh(run) for name, run in forms.items()}


def _weigh(run: Run) -> Any:
    """Peak bytes of one call above what is there before it; a first call warms up.

    {"limit": bytes} if the call takes more than there is.
    """
    if isinstance(run, Backward):
        run = run.whole
    try:
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
        return max(peak_rss() - before, 0)  # pages may have been given back
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if not out_of_memory(error):
            raise
        return {"limit": memory_limit()}


def out_of_memory(error: BaseException) -> bool:
    """Whether that is what an exception tells."""
    text = f"{type(error).__name__}: {error}"
    return any(sign in text for sign in _SIGNS)


def memory_limit() -> int:
    """Bytes that this process may take."""
    if HAS_GPU:
        return int(torch.cuda.get_device_properties(0).total_memory)
    soft, _ = resource.getrlimit(resource.RLIMIT_DATA)
    return soft if soft != resource.RLIM_INFINITY else LIMIT


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
    # Killed by the system, or refused.
    if child.returncode == -9 or any(sign in line for line in told[-5:] for sign in _SIGNS):
        return {"outcome": "out of memory", "limit": limit, "told": told[-1][:200]}
    raise RuntimeError(f"{script.name} {' '.join(words)}: {told[-1]}")


# The machine


@lru_cache(maxsize=1)
def yardstick(device: str) -> Run:
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
    """What a number was measured on, from which sources, and by which command."""
    import triton

    facts: dict[str, Any] = {
        "schema": SCHEMA,
        "cpu": cpu_name(),
        "cores": num_cpus(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": _tell("git", "-C", str(ROOT), "rev-parse", "HEAD"),
        "dirty": bool(_tell("git", "-C", str(ROOT), "status", "--porcelain", _DIRTY, none="")),
        "command": command(),
    }
    if HAS_GPU:
        facts["gpu"] = torch.cuda.get_device_name()
        facts["driver"] = _tell("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return facts


def command() -> str:
    """How this process was started, as one types it in the repository."""
    program, *arguments = sys.argv
    path = Path(program)
    if path.name == "__main__.py":
        start = ["python", "-m", path.parent.name]
    elif path.suffix == ".py":
        start = ["python", _in_repository(str(path.resolve()))]
    else:
        start = [path.name]
    return shlex.join([*start, *map(_in_repository, arguments)])


def _in_repository(word: str) -> str:
    """An argument whose paths below the repository are relative to it."""
    return word.replace(f"{ROOT}/", "")


def write_record(out: Path | None, record: Mapping[str, Any]) -> None:
    """Writes what a script measured under the head that all records have; None: nowhere."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        made = datetime.now(UTC).isoformat(timespec="seconds")
        whole = {"schema": SCHEMA, "made": made, "machine": machine(), **record}
        out.write_text(json.dumps(whole, indent=1) + "\n")


def script_row(
    form: str, size: str, values: float | list[float], unit: str, note: str = ""
) -> dict[str, Any]:
    """A row of the report's table of what scripts measure: one value, or the median of several."""
    found = spread(values if isinstance(values, list) else [values])
    row = {"form": form, "size": size, "value": found["median"], "unit": unit}
    return row | {"p20": found["p20"], "p80": found["p80"], "note": note}


def _tell(*words: str, none: str = "unknown") -> str:
    """First line of what a command prints; `none` if it prints nothing, or fails."""
    try:
        told = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return none
    return next(iter(told.strip().splitlines()), none)
