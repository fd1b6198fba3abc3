"""An op that a plain call on a CPU reaches without PyTorch's dispatcher.

`torch.library` takes 25 us for a call and 60 us for a backward pass, where the work of one region
takes ten (one core of an AMD EPYC, family 26). Compiling, tracing, fake and wrapped tensors need
it; a plain tensor on a CPU does not. What tells them apart has no public name in PyTorch: where it
is missing, every call takes the long way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

try:
    from torch._C import _len_torch_dispatch_stack as _modes
    from torch._C._functorch import peek_interpreter_stack as _transform
except ImportError:
    _modes = _transform = None  # type: ignore[assignment]

_PLAIN = (torch.Tensor, torch.nn.Parameter)


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether `tensor` is memory and nothing else: no fake or wrapper, nothing that records it."""
    return (
        not torch.compiler.is_compiling()
        and type(tensor) in _PLAIN
        and _modes is not None
        and _modes() == 0
        and _transform() is None
    )


class Op:
    """`function`, whose first argument is a tensor, and the same `registered` as `name`."""

    def __init__(self, name: str, function: Callable[..., Any], mutates: tuple[str, ...]) -> None:
        self.function = function
        self.registered = torch.library.custom_op(name, function, mutates_args=mutates)
        self.register_fake = self.registered.register_fake
        self._with_gradient: Any = None

    def register_autograd(self, gradient: Callable[..., Any], keep: Callable[..., None]) -> None:
        """The gradient's formula and what it keeps, as `torch.library` has them."""
        self.registered.register_autograd(gradient, setup_context=keep)
        members = {
            "forward": staticmethod(self.function),
            "setup_context": staticmethod(keep),
            "backward": staticmethod(once_differentiable(gradient)),
        }
        self._with_gradient = type(self.function.__name__, (torch.autograd.Function,), members)

    def __call__(self, tensor: torch.Tensor, *others: Any) -> Any:
        if not is_plain(tensor) or tensor.is_cuda:
            return self.registered(tensor, *others)
        if self._with_gradient is not None and tensor.requires_grad and torch.is_grad_enabled():
            return self._with_gradient.apply(tensor, *others)
        return self.function(tensor, *others)


def op(name: str, mutates: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], Op]:
    """Decorator: the `Op` of a function."""
    return lambda function: Op(name, function, mutates)
