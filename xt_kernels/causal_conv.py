"""`causal_conv`: causal depth-wise convolution over tokens, with the last inputs carried on.

Plain PyTorch, or `causal-conv1d` for CUDA tensors where that package is installed.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

from . import _checks as checks

_OP = "causal_conv"


def causal_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    state: torch.Tensor | None = None,
    *,
    silu: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out_t = bias + sum_k weight_k x_{t - K + 1 + k}, and the last K - 1 inputs.

    x: `[B, D, L]`, floating, L any number, zero included. weight: `[D, K]`. bias: `[D]` or None.
    state: `[B, D, K - 1]`, the inputs before the first token, oldest first; None is zeros.
    silu: apply SiLU to the result.

    Returns (out `[B, D, L]`, state `[B, D, K - 1]` for the next call), both differentiable. Two
    calls over the parts of a sequence give what one call gives. Raises ValueError if shapes
    disagree.
    """
    checks.check_dim(_OP, "x", x, {3: "[B, D, L]"})
    batch, dim, length = x.shape
    checks.check_shape(_OP, "weight", weight, "[D, K]", [dim, None])
    width = weight.shape[1]
    if bias is not None:
        checks.check_shape(_OP, "bias", bias, "[D]", [dim])
    if state is None:
        state = x.new_zeros(batch, dim, width - 1)
    checks.check_shape(_OP, "state", state, "[B, D, K - 1]", [batch, dim, width - 1])
    padded = torch.cat([state.to(x.dtype), x], -1)
    last = padded[..., length:]
    if not length:
        return x, last
    fused = _fused() if x.is_cuda else None
    if fused is not None and 2 <= width <= 4 and x.dtype == weight.dtype:
        # It takes a state in this layout alone.
        rows, before = (t.mT.contiguous().mT for t in (x, state.to(x.dtype)))
        out = fused(rows, weight, bias, initial_states=before, activation="silu" if silu else None)
        return out, last
    out = F.conv1d(padded, weight[:, None], bias, groups=dim)
    return F.silu(out) if silu else out, last


@cache
def _fused() -> Any:
    """causal-conv1d's function, if it is there and takes a state."""
    try:
        import inspect

        from causal_conv1d import causal_conv1d_fn
    except ImportError:
        return None
    return (
        causal_conv1d_fn
        if "initial_states" in inspect.signature(causal_conv1d_fn).parameters
        else None
    )
