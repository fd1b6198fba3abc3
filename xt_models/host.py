"""What this machine has: memory of the process, memory and disk that are free, packages."""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import shutil
from importlib.util import find_spec
from pathlib import Path


def current_rss() -> int:
    """Resident memory of this process, bytes."""
    return _status_kib("VmRSS") * 1024


def peak_rss() -> int:
    """Highest resident memory since the last `reset_peak_rss` that worked, bytes."""
    return _status_kib("VmHWM") * 1024


def reset_peak_rss() -> None:
    """Lets `peak_rss` start again from now, where the kernel allows it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass  # the peak then is that of the process's whole life


def keep_memory_flat() -> None:
    """Gives large freed blocks back to the system at once. For programs, before torch loads.

    glibc otherwise keeps freed blocks of up to 32 MiB in its heaps, whose holes grow with the
    length of a run. Streaming JPEG with convnext_atto on two cores (AMD EPYC, Zen 5), above the
    model, 4,096 x 4,096 px and 16,384 x 16,384 px: 347 and 428 MiB as it comes; 219 and 234 with
    blocks of 1 MiB and more mapped apart; 214 and 216 from 128 KiB on, at the same speed. Mapping
    alone costs a quarter of the time; huge pages for the mapped blocks win it back.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch reads it at its first allocation
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        mallopt(-3, 128 << 10)  # M_MMAP_THRESHOLD in malloc.h


def available_memory() -> int:
    """Bytes that a process can still take without swapping, within its control group."""
    free = next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/meminfo").read_text().splitlines()
        if line.startswith("MemAvailable")
    )
    root = Path("/sys/fs/cgroup")
    try:
        limit = (root / "memory.max").read_text().strip()
        if limit != "max":
            used = int((root / "memory.current").read_text())
            free = min(free, int(limit) - used)
    except OSError:
        pass  # no version 2 control group: the machine's own figure stands
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        free = min(free, soft - _status_kib("VmSize") * 1024)
    return max(free, 0)


def free_disk(path: Path) -> int:
    """Free bytes on the disk that holds `path` or its nearest parent that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def need(command: str, module: str, package: str, extra: str) -> None:
    """Raises ValueError, with the way to install it, if an optional package is missing."""
    if find_spec(module) is None:
        raise ValueError(
            f"{command}: {package} must be installed: pip install 'xt-kernels[{extra}]'."
        )


def num_cpus() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0))


def cpu_name() -> str:
    """Model name, family and model of the processor: a cloud machine's name alone says little."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor() or "unknown processor"
    facts = {
        key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)
    }
    if "model name" not in facts:
        return platform.processor() or platform.machine()
    family, model = facts.get("cpu family", "?"), facts.get("model", "?")
    return f"{facts['model name']} (family {family}, model {model})"


def _status_kib(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
