"""What this machine has: memory of the process, memory and disk that are free."""

from __future__ import annotations

import os
import resource
import shutil
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


def num_cpus() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0))


def _status_kib(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
