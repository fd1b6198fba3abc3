"""`xl_attention`: exact softmax attention over [memory, current] without the concatenation."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from .. import _checks as checks
from . import ops

_OP = "xl_attention"
_LAYOUT = "[B, heads, L, D]"


def xl_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    memory_key: torch.Tensor | None = None,
    memory_value: torch.Tensor | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    enable_gqa: bool = False,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`softmax(scale query [memory_key, key]^T) [memory_value, value]`, exact, in O(L) memory.

    query: `[B, heads, L, D]`, fp16, bf16, fp32 (or fp64 on a CPU), any strides, D a multiple of 8
        in 16..256, L any number, zero included.
    key, value: `[B, heads, Lk, D]`, dtype and device of query; with enable_gqa `[B, groups, Lk, D]`
        with groups that divides heads, query head h using group h // (heads / groups).
    memory_key, memory_value: `[B, heads or groups, M, D]`, both or neither; attended like other
        keys. Detached memory costs no gradient work: its gradients are computed only if either
        tensor requires one (Dai et al. 2019, arXiv 1901.02860, section 3.2: SG(h)).
    scale: factor of the scores before the softmax; default D ** -0.5.
    is_causal: query i sees all memory, and current keys j <= i + (Lk - L).
    enable_gqa: allow fewer key heads than query heads, as in `scaled_dot_product_attention`.
    return_lse: also return the log of the softmax's denominator.

    Returns out `[B, heads, L, D]` in the dtype of query, and with return_lse (out, lse), lse
    `[B, heads, L]`, fp32 (fp64 for fp64), natural log. A query that sees no key gives out 0, lse
    -inf and no gradient. Under autocast tensors are cast to its dtype first. Softmax and sums are
    fp32 (fp64 for fp64); fp32 products on CUDA are IEEE under
    `torch.set_float32_matmul_precision("highest")` and beyond head dim 128, TF32 otherwise. All
    inputs get exact gradients, also through lse; they are deterministic; there is no second
    derivative. Kept for backward: the inputs, out and lse.
    Raises ValueError if arguments disagree.
    """
    checks.check_dim(_OP, "query", query, {4: _LAYOUT})
    checks.check_supported_device(_OP, "query", query)
    device = query.device.type
    if torch.is_autocast_enabled(device):
        low = torch.get_autocast_dtype(device)
        query, key, value = (_cast(t, low) for t in (query, key, value))
        memory_key = None if memory_key is None else _cast(memory_key, low)
        memory_value = None if memory_value is None else _cast(memory_value, low)
    allowed = checks.FLOATS[:3] if device == "cuda" else checks.FLOATS
    checks.check_dtype(_OP, "query", query.dtype, allowed)
    batch, heads, _, head_dim = query.shape
    if not 16 <= head_dim <= 256 or head_dim % 8:
        checks.fail(_OP, "query", "have a head dim in 16..256 that is a multiple of 8", head_dim)
    checks.check_dim(_OP, "key", key, {4: _LAYOUT})
    key_heads = _key_heads(key, heads, enable_gqa)
    _check_like(query, "key", key, "Lk", [batch, key_heads, None, head_dim])
    _check_like(query, "value", value, "Lk", [batch, key_heads, key.shape[2], head_dim], "key")
    if (memory_key is None) != (memory_value is None):
        given = "memory_key" if memory_value is None else "memory_value"
        checks.fail(_OP, "memory_key and memory_value", "come together", f"{given} alone")
    if memory_key is not None and memory_value is not None:
        _check_like(query, "memory_key", memory_key, "M", [batch, key_heads, None, head_dim])
        sizes = [batch, key_heads, memory_key.shape[2], head_dim]
        _check_like(query, "memory_value", memory_value, "M", sizes, "memory_key")
    if scale is not None and not math.isfinite(scale):
        checks.fail(_OP, "scale", "be finite", scale)
    factor = head_dim**-0.5 if scale is None else float(scale)
    out, lse = ops.forward(query, key, value, memory_key, memory_value, factor, bool(is_causal))
    return (out, lse) if return_lse else out


def _cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """As autocast does: fp64 and integers stay."""
    if tensor.dtype == torch.float64 or not tensor.is_floating_point():
        return tensor
    return tensor.to(dtype)


def _key_heads(key: torch.Tensor, heads: int, enable_gqa: bool) -> int:
    """Heads that key must have: its own if they divide the query's and enable_gqa allows it."""
    key_heads = key.shape[1]
    if not enable_gqa:
        return heads
    if key_heads < 1 or heads % key_heads:
        if key_heads != heads:
            rule = f"have a number of heads that divides that of query = {heads}"
            checks.fail(_OP, "key", rule, key_heads)
    return key_heads


def _check_like(
    query: torch.Tensor,
    name: str,
    tensor: torch.Tensor,
    length: str,
    sizes: Sequence[int | None],
    other: str = "query",
) -> None:
    """`tensor` has the sizes that `other` asks for, and dtype and device of query."""
    layout = f"[B, heads, {length}, D]"
    shown = ", ".join("*" if n is None else str(n) for n in sizes)
    same = tensor.dim() == 4 and all(
        n is None or n == m for n, m in zip(sizes, tensor.shape, strict=True)
    )
    if not same:
        rule = f"be {layout} = [{shown}] to match {other}"
        checks.fail(_OP, name, rule, str(list(tensor.shape)))
    if tensor.dtype != query.dtype:
        rule = f"be of the dtype of query = {checks.dtype_name(query.dtype)}"
        checks.fail(_OP, name, rule, checks.dtype_name(tensor.dtype))
    checks.check_device(_OP, name, tensor, "query", query)
