"""`xl_attention`: exact softmax attention over [memory, current] without the concatenation."""

from __future__ import annotations

import torch

from .. import _checks as checks
from . import ops

_OP = "xl_attention"


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
    query, key, value, memory_key, memory_value = checks.attention_inputs(
        _OP, query, key, value, memory_key, memory_value, enable_gqa
    )
    factor = checks.attention_scale(_OP, query, scale)
    out, lse = ops.forward(query, key, value, memory_key, memory_value, factor, bool(is_causal))
    return (out, lse) if return_lse else out
