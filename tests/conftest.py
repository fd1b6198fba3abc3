"""Where the tests run: without a CUDA device kernels go through Triton's interpreter, made honest.

Kernel tests must also run where timm, zarr and tifffile are not installed, so nothing of xt_models
is imported here.
"""

import os
import signal
from collections.abc import Iterator

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    # Triton reads this when a kernel is defined, so it comes before the import of any kernel.
    os.environ.setdefault("TRITON_INTERPRET", "1")
if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers that each start a thread per core only get in one another's way.
    torch.set_num_threads(1)
# A run in the background of a script ignores Ctrl-C, and so would the processes that it is sent to.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA device (scripts/gpu_run.py runs these)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if HAS_GPU:
        return
    reason = pytest.mark.skip(reason="torch.cuda.is_available() is False")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(reason)


@pytest.fixture
def honest() -> Iterator[None]:
    """Kernels are checked as `honest_interpreter` does; on a GPU they run as they are."""
    if HAS_GPU:
        yield
        return
    from xt_kernels.testing import honest_interpreter

    with honest_interpreter():
        yield


@pytest.fixture
def poisoned_empty() -> Iterator[None]:
    """`torch.empty` gives NaN in this test, so an output element that nobody writes is seen."""
    from xt_kernels.testing import poisoned_empty

    with poisoned_empty():
        yield


@pytest.fixture
def device() -> str:
    """Where kernels run in this test: "cuda", or "cpu" for the interpreter."""
    return "cuda" if HAS_GPU else "cpu"
