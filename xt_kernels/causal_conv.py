"""`causal_conv`: causal depth-wise convolution over tokens, with the last inputs carried on.

Plain PyTorch, or `causal-conv1d` for CUDA tensors where that package is installed. The package
takes a state in a layout with channels last alone, and only for channels in eights. The state goes
in front of the tokens instead, which suits any number of either, keeps tokens contiguous as the
scan likes them, and copies them once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F

from . import _checks as checks

_OP = "causal_conv"
_PACKAGE_DEVICE = "cuda"

# Tokens that the state takes in front of the others for the package: rows of as many tokens more,
# and results that start as many in, stay aligned to 16 bytes and keep their wide loads.
_FRONT = 16


def causal_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    state: torch.Tensor | None = None,
    *,
    silu: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out_t = bias + sum_k weight_k x_{t - K + 1 + k}, and the last K - 1 inputs.

    x: `[B, D, L]`, fp16, bf16, fp32 or fp64, L any number, zero included.
    weight: `[D, K]`, K at least 1, dtype of x. bias: `[D]`, dtype of x, or None.
    state: `[B, D, K - 1]`, dtype of x or fp32, the inputs before the first token, oldest first;
        None is zeros.
    silu: apply SiLU to the result.

    Returns (out `[B, D, L]`, state `[B, D, K - 1]` for the next call), both differentiable and in
    the dtype of x. Two calls over the parts of a sequence give what one call gives. Under autocast
    x, weight and bias are cast to its dtype.
    Raises ValueError if shapes, dtypes or devices disagree.
    """
    checks.check_dim(_OP, "x", x, {3: "[B, D, L]"})
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        low = torch.get_autocast_dtype(device)
        x, weight = x.to(low), weight.to(low)
        bias = None if bias is None else bias.to(low)
    checks.check_dtype(_OP, "x", x.dtype)
    batch, dim, length = x.shape
    checks.check_shape(_OP, "weight", weight, "[D, K]", [dim, None])
    width = weight.shape[1]
    if not width:
        checks.fail(_OP, "weight", "have a width K of at least 1", width)
    _check_like(x, "weight", weight, x.dtype)
    if bias is not None:
        checks.check_shape(_OP, "bias", bias, "[D]", [dim])
        _check_like(x, "bias", bias, x.dtype)
    if state is None:
        state = x.new_zeros(batch, dim, width - 1)
    checks.check_shape(_OP, "state", state, "[B, D, K - 1]", [batch, dim, width - 1])
    _check_like(x, "state", state, *dict.fromkeys((x.dtype, torch.float32)))
    state = state.to(x.dtype)
    package = _package() if x.device.type == _PACKAGE_DEVICE else None
    if package is not None and 2 <= width <= 4 and x.dtype != torch.float64 and x.numel():
        padded = torch.cat([x.new_zeros(batch, dim, _FRONT + 1 - width), state, x], -1)
        out = package(padded, weight, bias, activation="silu" if silu else None)[..., _FRONT:]
        return out, padded[..., padded.shape[2] + 1 - width :]
    padded = torch.cat([state, x], -1)
    last = padded[..., length:]
    if not x.numel():
        return x, last
    out = F.conv1d(padded, weight[:, None], bias, groups=dim)
    return F.silu(out) if silu else out, last


def _check_like(x: torch.Tensor, name: str, tensor: torch.Tensor, *dtypes: torch.dtype) -> None:
    """`tensor` has one of these dtypes and the device of x."""
    if tensor.dtype not in dtypes:
        rule = f"be of dtype {checks.dtype_names(dtypes)} for x in {checks.dtype_name(x.dtype)}"
        checks.fail(_OP, name, rule, checks.dtype_name(tensor.dtype))
    checks.check_device(_OP, name, tensor, "x", x)


@cache
def _package() -> Callable[..., torch.Tensor] | None:
    """causal-conv1d's function, if it is there."""
    try:
        from causal_conv1d import causal_conv1d_fn
    except ImportError:
        return None
    function: Callable[..., torch.Tensor] = causal_conv1d_fn
    return function
