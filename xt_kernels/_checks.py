"""Argument checks shared by the ops: every message names op, argument, rule and value.

The form is `op: argument must be RULE = EXPECTED, got VALUE.`
"""

from __future__ import annotations

import math
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


def check_supported_device(
    op: str, argument: str, tensor: torch.Tensor, devices: Sequence[str] = ("cpu", "cuda")
) -> None:
    """`tensor` is on a CPU or a CUDA device, or one of `devices`."""
    if tensor.device.type not in devices:
        fail(op, argument, f"be on a {' or '.join(devices)} device", str(tensor.device))


def check_count(op: str, argument: str, value: Any, least: int, most: int | None = None) -> None:
    """`value` is an integer of at least `least`, and at most `most`."""
    right = isinstance(value, int) and not isinstance(value, bool) and value >= least
    if not right or (most is not None and value > most):
        rule = f"of at least {least}" if most is None else f"in {least}..{most}"
        fail(op, argument, f"be an integer {rule}", value)


# What the attention ops share.

_ATTENTION = "[B, heads, L, D]"


def attention_inputs(
    op: str,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    memory_key: torch.Tensor | None,
    memory_value: torch.Tensor | None,
    enable_gqa: bool,
    devices: Sequence[str] = ("cpu", "cuda"),
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Query, key, value and memory as the op's docstring asks for them, cast under autocast."""
    check_dim(op, "query", query, {4: _ATTENTION})
    check_supported_device(op, "query", query, devices)
    device = "cpu" if query.device.type == "cpu" else "cuda"
    if torch.is_autocast_enabled(device):
        low = torch.get_autocast_dtype(device)
        query, key, value = (_cast(t, low) for t in (query, key, value))
        memory_key = None if memory_key is None else _cast(memory_key, low)
        memory_value = None if memory_value is None else _cast(memory_value, low)
    allowed = FLOATS[:3] if device == "cuda" else FLOATS
    check_dtype(op, "query", query.dtype, allowed)
    batch, heads, _, head_dim = query.shape
    if not 16 <= head_dim <= 256 or head_dim % 8:
        fail(op, "query", "have a head dim in 16..256 that is a multiple of 8", head_dim)
    check_dim(op, "key", key, {4: _ATTENTION})
    key_heads = _key_heads(op, key, heads, enable_gqa)
    _check_like(op, query, "key", key, "Lk", [batch, key_heads, None, head_dim])
    _check_like(op, query, "value", value, "Lk", [batch, key_heads, key.shape[2], head_dim], "key")
    if (memory_key is None) != (memory_value is None):
        given = "memory_key" if memory_value is None else "memory_value"
        fail(op, "memory_key and memory_value", "come together", f"{given} alone")
    if memory_key is not None and memory_value is not None:
        _check_like(op, query, "memory_key", memory_key, "M", [batch, key_heads, None, head_dim])
        sizes = [batch, key_heads, memory_key.shape[2], head_dim]
        _check_like(op, query, "memory_value", memory_value, "M", sizes, "memory_key")
    return query, key, value, memory_key, memory_value


def attention_scale(op: str, query: torch.Tensor, scale: float | None) -> float:
    """The factor of the scores: D ** -0.5 unless given."""
    if scale is not None and not math.isfinite(scale):
        fail(op, "scale", "be finite", scale)
    return float(query.shape[3] ** -0.5 if scale is None else scale)


def _cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """As autocast does: fp64 and integers stay."""
    if tensor.dtype == torch.float64 or not tensor.is_floating_point():
        return tensor
    return tensor.to(dtype)


def _key_heads(op: str, key: torch.Tensor, heads: int, enable_gqa: bool) -> int:
    """Heads that key must have: its own if they divide the query's and enable_gqa allows it."""
    key_heads = key.shape[1]
    if not enable_gqa:
        return heads
    if key_heads < 1 or heads % key_heads:
        if key_heads != heads:
            rule = f"have a number of heads that divides that of query = {heads}"
            fail(op, "key", rule, key_heads)
    return key_heads


def _check_like(
    op: str,
    query: torch.Tensor,
    name: str,
    tensor: torch.Tensor,
    length: str,
    sizes: Sequence[int | None],
    other: str = "query",
) -> None:
    """`tensor` has the sizes that `other` asks for, and dtype and device of query."""
    layout = f"[B, heads, {length}, D]"
    same = tensor.dim() == 4 and all(
        n is None or n == m for n, m in zip(sizes, tensor.shape, strict=True)
    )
    if not same:
        shown = ", ".join("*" if n is None else str(n) for n in sizes)
        rule = f"be {layout} = [{shown}] to match {other}"
        fail(op, name, rule, str(list(tensor.shape)))
    if tensor.dtype != query.dtype:
        rule = f"be of the dtype of query = {dtype_name(query.dtype)}"
        fail(op, name, rule, dtype_name(tensor.dtype))
    check_device(op, name, tensor, "query", query)
