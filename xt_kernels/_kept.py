"""Small tables on a device, made once: a second call copies nothing and waits for nothing."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


def kept(maxsize: int) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """`lru_cache` for a function of hashable arguments, one of them a torch.device.

    What a CUDA graph captures is kept for good: its replays read the same memory.
    """

    def decorate(make: Callable[P, T]) -> Callable[P, T]:
        cached = lru_cache(maxsize)(make)
        captured: dict[object, T] = {}

        @wraps(make)
        def get(*args: P.args, **kwargs: P.kwargs) -> T:
            found = cached(*args, **kwargs)  # type: ignore[arg-type]
            is_on_gpu = any(isinstance(a, torch.device) and a.type != "cpu" for a in args)
            if is_on_gpu and torch.cuda.is_current_stream_capturing():
                captured[args] = found
            return found

        return get

    return decorate
