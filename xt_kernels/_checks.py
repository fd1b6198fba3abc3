"""Argument checks shared by the ops: every message names op, argument, rule and value.

The form is `op: argument must be RULE = EXPECTED, got VALUE.`
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16` for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def dtype_names(dtypes: Sequence[torch.dtype]) -> str:
    """`float16, bfloat16 or float32`."""
    names = [dtype_name(dtype) for dtype in dtypes]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


def fail(op: str, argument: str, rule: str, got: Any) -> NoReturn:
    """Raises the ValueError that says which rule `argument` of `op` breaks."""
    raise ValueError(f"{op}: {argument} must {rule}, got {got}.")


def check_dim(op: str, argument: str, tensor: torch.Tensor, layouts: dict[int, str]) -> None:
    """`tensor` has one of the numbers of dimensions that are the keys of `layouts`."""
    if tensor.dim() not in layouts:
        fail(op, argument, f"be {' or '.join(layouts.values())}", f"shape {list(tensor.shape)}")


def check_shape(
    op: str, argument: str, tensor: torch.Tensor, layout: str, expected: Sequence[int | None]
) -> None:
    """`tensor` has the sizes `expected`; None allows any size there."""
    shape = tensor.shape
    same = len(shape) == len(expected) and all(
        want is None or want == have for want, have in zip(expected, shape, strict=True)
    )
    if not same:
        sizes = ", ".join("*" if want is None else str(want) for want in expected)
        fail(op, argument, f"be {layout} = [{sizes}]", str(list(shape)))


def check_dtype(
    op: str, argument: str, dtype: torch.dtype, allowed: Sequence[torch.dtype] = FLOATS
) -> None:
    """`dtype` is one of `allowed`."""
    if dtype not in allowed:
        fail(op, argument, f"be of dtype {dtype_names(allowed)}", dtype_name(dtype))


def check_device(
    op: str, argument: str, tensor: torch.Tensor, other: str, reference: torch.Tensor
) -> None:
    """`tensor` lies on the device of `reference`, the argument called `other`."""
    if tensor.device != reference.device:
        rule = f"be on the device of {other} = {reference.device}"
        fail(op, argument, rule, str(tensor.device))


def check_supported_device(op: str, argument: str, tensor: torch.Tensor) -> None:
    """`tensor` is on a CPU or a CUDA device."""
    if tensor.device.type not in ("cpu", "cuda"):
        fail(op, argument, "be on a cpu or cuda device", str(tensor.device))
