"""What a plain call need not do: be checked again, and on a CPU go through PyTorch's dispatcher.

`torch.library` takes 25 us for a call and 60 us for a backward pass, where the work of one region
takes ten (one core of an AMD EPYC, family 26). Compiling, tracing, fake and wrapped tensors need
it; a plain tensor on a CPU does not. What tells them apart has no public name in PyTorch: where it
is missing, every call takes the long way.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch.autograd.function import once_differentiable

from .grid import RegionGrid

try:
    from torch._C import _len_torch_dispatch_stack as _modes
    from torch._C._functorch import peek_interpreter_stack as _transform
except ImportError:
    _modes = _transform = None  # type: ignore[assignment]

T = TypeVar("T")

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


# Of these, equal values of one type are the same argument.
_SIMPLE = frozenset(
    {bool, int, float, str, type(None), torch.dtype, torch.memory_format, RegionGrid}
)
# What is remembered at most: calls, and numbers of a list, longer ones take long anyway.
_CALLS, _NUMBERS = 256, 1024


def remembered(check: Callable[..., T]) -> Callable[..., T]:
    """Decorator of a function whose answer follows from the shape, dtype and device of its first
    argument, a tensor, and from the others: a plain tensor with arguments that were asked for
    before is not looked at again. An error is not remembered.
    """
    known: dict[tuple[Any, ...], T] = {}

    @wraps(check)
    def ask(tensor: torch.Tensor, *others: Any) -> T:
        if not is_plain(tensor):
            return check(tensor, *others)
        key: list[Any] = [tensor.shape, tensor.dtype, tensor.device]
        for value in others:
            kind = type(value)
            if kind in _SIMPLE:
                key += kind, value
                continue
            if kind not in (list, tuple, range) or len(value) > _NUMBERS:
                return check(tensor, *others)
            kinds = frozenset(map(type, value))
            if not kinds <= {int, float}:
                return check(tensor, *others)
            key += kinds, tuple(value)
        found = known.get(asked := tuple(key))
        if found is None:
            found = check(tensor, *others)
            if len(known) >= _CALLS:
                known.clear()
            known[asked] = found
        return found

    return ask


class Op:
    """`function`, whose first argument is a tensor, and the same `registered` as `name`."""

    def __init__(self, name: str, function: Callable[..., Any], mutates: tuple[str, ...]) -> None:
        self.function = function
        self.registered = torch.library.custom_op(name, function, mutates_args=mutates)
        self.register_fake = self.registered.register_fake
        self._with_gradient: Any = None

    def register_autograd(
        self,
        gradient: Callable[..., Any],
        keep: Callable[..., None],
        pull: Callable[..., Callable[[torch.Tensor], torch.Tensor]],
    ) -> None:
        """gradient, keep: the formula and what it keeps, as `torch.library` has them.

        pull: of the tensor, the output and the other inputs makes the backward pass for a plain
            gradient, so that little is left to do in it.
        """
        self.registered.register_autograd(gradient, setup_context=keep)
        once = once_differentiable(gradient)

        # With `setup_context` apart PyTorch would bind the arguments by their names.
        def forward(ctx: Any, tensor: torch.Tensor, others: tuple[Any, ...]) -> Any:
            output = self.function(tensor, *others)
            keep(ctx, (tensor, *others), output)
            ctx.pull = pull(tensor, output, *others)
            return output

        def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, None]:
            if torch.is_grad_enabled():  # what it gives may be differentiated, which `once` refuses
                return once(ctx, grad)[0], None
            return ctx.pull(grad) if is_plain(grad) else gradient(ctx, grad)[0], None

        members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        self._with_gradient = type(self.function.__name__, (torch.autograd.Function,), members)

    def __call__(self, tensor: torch.Tensor, *others: Any) -> Any:
        if not is_plain(tensor) or tensor.is_cuda:
            return self.registered(tensor, *others)
        if self._with_gradient is not None and tensor.requires_grad and torch.is_grad_enabled():
            return self._with_gradient.apply(tensor, others)
        return self.function(tensor, *others)


def op(name: str, mutates: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], Op]:
    """Decorator: the `Op` of a function."""
    return lambda function: Op(name, function, mutates)
