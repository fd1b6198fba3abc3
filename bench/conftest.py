"""Options of the benches, and the machine in their JSON."""

from __future__ import annotations

import os
from typing import Any

from xt_models.host import keep_memory_flat

if os.environ.get("XT_BENCH_MEMORY", "off") not in ("", "off"):
    # Before torch loads: what is freed must not hide what is taken.
    keep_memory_flat()

import measure
import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="all sizes, however long they take")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "full: runs with --full only")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--full"):
        measure.options[:] = ["--full"]
        for item in items:  # the first of a bench weighs all its cases
            if not item.get_closest_marker("timeout"):
                item.add_marker(pytest.mark.timeout(7200))
        return
    # Not where memory is weighed: that is done by smoke tests too, under a limit.
    is_smoke = config.getoption("benchmark_disable") and not os.environ.get("XT_BENCH_MEMORY")
    for item in items:
        if item.get_closest_marker("full"):
            item.add_marker(pytest.mark.skip(reason="--full was not given"))
        elif (is_smoke or "XT_BENCH_DRY" in os.environ) and _length(item) > 4096:
            # Exact forms of 16,384 tokens take more memory than many machines have.
            item.add_marker(pytest.mark.skip(reason="longer than a smoke test needs"))


def _length(item: pytest.Item) -> int:
    callspec = getattr(item, "callspec", None)
    return callspec.params.get("length", 0) if callspec else 0


_left_out: list[str] = []


def pytest_deselected(items: list[pytest.Item]) -> None:
    _left_out.extend(item.nodeid.rpartition("::")[2].partition("[")[0] for item in items)


def pytest_collection_finish(session: pytest.Session) -> None:
    measure.selected[:] = [
        item.nodeid
        for item in session.items
        if not item.get_closest_marker("full") or session.config.getoption("--full")
    ]
    word = session.config.getoption("keyword")
    if word and _left_out and not session.items:
        names = ", ".join(sorted(set(_left_out)))
        raise pytest.UsageError(f"no bench matches -k {word}; there are: {names}")


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]):
    machine_info.clear()
    machine_info |= measure.machine()
