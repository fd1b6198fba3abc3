"""Where the time of a run goes: spans by name and thread, as a table and as a Chrome trace.

A span's time is its own: what a span inside it takes is taken off. On CUDA a span of the main
thread is what the device did between its ends, so that waiting does not count as work.
"""

from __future__ import annotations

import json
import threading
import time
from collections import defaultdict
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

MAX_EVENTS = 200_000
"""Spans that the trace keeps, 20 MB of memory; the table counts all."""

NAMES = ("read", "decode", "copy", "encode", "stitch", "context", "write", "idle")
"""read: fetching bytes and cutting windows out. decode: of tiles. copy: pixels into the batch, to a
device and normalised. encode, stitch, context: the model. write: results. idle: the main thread
waits for a reader or the writer. Others where there are any: compile, of the region encoder; heads.
"""


class Spans(Protocol):
    """What takes the times: `with spans("encode"): ...`."""

    def __call__(self, name: str) -> AbstractContextManager[Any]: ...


_NOTHING = nullcontext()


def no_spans(name: str) -> AbstractContextManager[Any]:
    """Takes no times."""
    return _NOTHING


class Profile:
    """Collects spans from any thread. device: times the main thread's spans on it if it is CUDA.

    seconds: time of each name, on all threads together. wall: of the run, set by `finish`.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._is_cuda = device is not None and device.type == "cuda"
        self._start = time.perf_counter()
        self._lock = threading.Lock()
        self._local = threading.local()
        self._events: list[tuple[str, int, float, float]] = []
        self._on_device: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._threads: dict[int, str] = {}
        self.dropped = 0
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.wall = 0.0
        if self._is_cuda:
            self._zero = self._now()

    def __call__(self, name: str) -> AbstractContextManager[Any]:
        on_device = self._is_cuda and name in ("copy", "encode", "stitch", "context")
        return _DeviceSpan(self, name) if on_device else _Span(self, name)

    def finish(self) -> None:
        """Ends the run; waits for the device."""
        if self._is_cuda:
            self._now().synchronize()
            for name, first, last in self._on_device:
                begin = self._zero.elapsed_time(first) / 1e3
                length = first.elapsed_time(last) / 1e3
                self._add(name, 0, begin, length, length)
            self._on_device.clear()
        self.wall = time.perf_counter() - self._start

    def table(self) -> list[tuple[str, float, float]]:
        """(name, seconds, share of the run) in the order of `NAMES`, then others that came up.
        Readers and the writer work beside the main thread, so shares may add up to more than 1."""
        names = [*NAMES, *(name for name in self.seconds if name not in NAMES)]
        return [(name, self.seconds[name], self.seconds[name] / self.wall) for name in names]

    @property
    def busy(self) -> float:
        """Share of the run that the region encoder and the context encoder were at work."""
        return (self.seconds["encode"] + self.seconds["context"]) / self.wall

    def lengths(self, name: str) -> list[float]:
        """Seconds of each span of a name, in order."""
        return [length for known, _, _, length in self._events if known == name]

    def write_trace(self, path: Path) -> None:
        """Writes what chrome://tracing and ui.perfetto.dev show, in microseconds."""
        names: list[dict[str, Any]] = [
            {"name": "thread_name", "ph": "M", "pid": 1, "tid": thread, "args": {"name": name}}
            for thread, name in self._threads.items()
        ]
        spans = [
            {
                "name": name,
                "ph": "X",
                "pid": 1,
                "tid": thread,
                "ts": 1e6 * start,
                "dur": 1e6 * length,
            }
            for name, thread, start, length in self._events
        ]
        path.write_text(json.dumps({"traceEvents": names + spans, "displayTimeUnit": "ms"}))

    def _now(self) -> torch.cuda.Event:
        import torch

        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _add(self, name: str, thread: int, start: float, length: float, own: float) -> None:
        with self._lock:
            self.seconds[name] += own
            if len(self._events) < MAX_EVENTS:
                self._events.append((name, thread, start, length))
            else:
                self.dropped += 1
            if thread not in self._threads:
                self._threads[thread] = threading.current_thread().name if thread else "device"


class _Span:
    """One span on the clock of its thread."""

    __slots__ = ("_inside", "_name", "_outer", "_profile", "_start")

    def __init__(self, profile: Profile, name: str) -> None:
        self._profile, self._name, self._inside = profile, name, 0.0

    def __enter__(self) -> None:
        local = self._profile._local
        self._outer = getattr(local, "span", None)
        local.span = self
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        length = time.perf_counter() - self._start
        self._profile._local.span = self._outer
        if self._outer is not None:
            self._outer._inside += length
        start = self._start - self._profile._start
        own = length - self._inside
        self._profile._add(self._name, threading.get_ident(), start, length, own)


class _DeviceSpan:
    """One span on the clock of the device."""

    __slots__ = ("_first", "_name", "_profile")

    def __init__(self, profile: Profile, name: str) -> None:
        self._profile, self._name = profile, name

    def __enter__(self) -> None:
        self._first = self._profile._now()

    def __exit__(self, *_: object) -> None:
        self._profile._on_device.append((self._name, self._first, self._profile._now()))
