"""`selective_scan`: Mamba's recurrence over tokens, with an initial and a final state."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .. import _checks as checks
from . import ops

_OP = "selective_scan"
BACKENDS = ("xt", "mamba_ssm")
_PACKAGE_DEVICE = "cuda"
MAX_STATES = 64


def selective_scan(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    initial_state: torch.Tensor | None = None,
    backend: str = "xt",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Selective state space model (Gu and Dao 2023, arXiv 2312.00752, algorithm 2), chunked.

        d_t = softplus(delta_t + delta_bias)
        h_t = exp(d_t A) h_{t-1} + d_t u_t B_t,    h_0 = initial_state
        out_t = (C_t . h_t + D u_t) silu(z_t)

    Names and order are those of mamba_ssm's `selective_scan_fn`. A sequence cut anywhere, each part
    starting from the last state of the part before, gives what one call gives, to rounding.

    u: `[B, D, L]`, fp16, bf16, fp32 (or fp64 on a CPU), any strides, L any number, zero included.
    delta: `[B, D, L]`, dtype of u: the step size, before bias and softplus.
    A: `[D, N]`, fp32 (fp64 for fp64), real, N up to 64; usually negative.
    B, C: `[B, N, L]`, or `[B, G, N, L]` with G that divides D, channel d using group d // (D / G);
        dtype of u.
    D: `[D]`, dtype of A; None leaves the skip connection out.
    z: `[B, D, L]`, dtype of u; None leaves the gate out.
    delta_bias: `[D]`, dtype of A. delta_softplus: apply softplus to delta (beta 1).
    return_last_state: also return the state behind the last token.
    initial_state: `[B, D, N]`, dtype of A; None is zero.
    backend: "xt", or "mamba_ssm" for the CUDA kernel of that package where it is installed; it
        takes no initial state, and the last one comes detached: the kernel has no gradient for it.

    Returns out `[B, D, L]` in the dtype of u, or (out, last_state `[B, D, N]`) with last_state in
    the dtype of A. Under autocast u, delta, B, C and z are cast to its dtype, the others to fp32.
    The recurrence is fp32 (fp64 for fp64). All inputs get exact gradients, also through the last
    state; they are deterministic; there is no second derivative. Kept for backward: the inputs and
    the states at chunk boundaries.
    Raises ValueError if arguments disagree, or if the backend is not there or cannot do it.
    """
    layout = "[B, D, L]"
    checks.check_dim(_OP, "u", u, {3: layout})
    checks.check_supported_device(_OP, "u", u)
    device = u.device.type
    if torch.is_autocast_enabled(device):
        low = torch.get_autocast_dtype(device)
        u, delta, B, C = (_cast(t, low) for t in (u, delta, B, C))
        z = None if z is None else _cast(z, low)
        A = _cast(A, torch.float32)
        D, delta_bias, initial_state = (
            None if t is None else _cast(t, torch.float32) for t in (D, delta_bias, initial_state)
        )
    allowed = checks.FLOATS[:3] if device == "cuda" else checks.FLOATS
    checks.check_dtype(_OP, "u", u.dtype, allowed)
    batch, dim, length = u.shape
    wide = torch.promote_types(u.dtype, torch.float32)
    _check(u, "delta", delta, layout, [batch, dim, length], u.dtype)
    if A.is_complex():
        name = checks.dtype_name(A.dtype)
        checks.fail(_OP, "A", "be real: complex state spaces are not supported", name)
    _check(u, "A", A, "[D, N]", [dim, None], wide)
    states = A.shape[1]
    if not 1 <= states <= MAX_STATES:
        checks.fail(_OP, "A", f"have 1 to {MAX_STATES} states N a channel", states)
    _check_projection(u, "B", B, states)
    _check_projection(u, "C", C, states)
    if _groups(C) != _groups(B):
        checks.fail(_OP, "C", f"have the groups of B = {_groups(B)}", _groups(C))
    for name, vector in (("D", D), ("delta_bias", delta_bias)):
        if vector is not None:
            _check(u, name, vector, "[D]", [dim], wide)
    if z is not None:
        _check(u, "z", z, layout, [batch, dim, length], u.dtype)
    if initial_state is not None:
        _check(u, "initial_state", initial_state, "[B, D, N]", [batch, dim, states], wide)
    if backend not in BACKENDS:
        checks.fail(_OP, "backend", f"be one of {', '.join(BACKENDS)}", repr(backend))
    if backend == "mamba_ssm":
        return _by_mamba_ssm(
            u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state, initial_state
        )
    B, C = (t if t.dim() == 4 else t[:, None] for t in (B, C))
    inputs = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    out, last_state, _ = ops.forward(*inputs, bool(delta_softplus), keep)
    return (out, last_state) if return_last_state else out


def _cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """As autocast does: fp64, complex numbers and integers stay."""
    if tensor.dtype == torch.float64 or not tensor.is_floating_point():
        return tensor
    return tensor.to(dtype)


def _groups(projection: torch.Tensor) -> int:
    return projection.shape[1] if projection.dim() == 4 else 1


def _check_projection(u: torch.Tensor, name: str, tensor: torch.Tensor, states: int) -> None:
    """B or C has its shape, and its groups divide the channels."""
    batch, dim, length = u.shape
    if tensor.dim() == 2:
        rule = "vary over tokens, [B, N, L] or [B, G, N, L]: one constant a channel is not offered"
        checks.fail(_OP, name, rule, f"shape {list(tensor.shape)}")
    if tensor.dim() == 4:
        _check(u, name, tensor, "[B, G, N, L]", [batch, None, states, length], u.dtype)
        groups = tensor.shape[1]
        if groups < 1 or dim % groups:
            checks.fail(_OP, name, f"have a number of groups that divides D = {dim}", groups)
    else:
        _check(u, name, tensor, "[B, N, L]", [batch, states, length], u.dtype)


def _check(
    u: torch.Tensor,
    name: str,
    tensor: torch.Tensor,
    layout: str,
    sizes: Sequence[int | None],
    dtype: torch.dtype,
) -> None:
    """`tensor` has these sizes (None allows any), this dtype and the device of u."""
    checks.check_shape(_OP, name, tensor, layout, sizes)
    if tensor.dtype != dtype:
        rule = f"be of dtype {checks.dtype_name(dtype)} for u in {checks.dtype_name(u.dtype)}"
        checks.fail(_OP, name, rule, checks.dtype_name(tensor.dtype))
    checks.check_device(_OP, name, tensor, "u", u)


def _by_mamba_ssm(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    delta_bias: torch.Tensor | None,
    delta_softplus: bool,
    return_last_state: bool,
    initial_state: torch.Tensor | None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The CUDA kernel of mamba_ssm, for comparison."""
    backend = 'backend="mamba_ssm"'
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except ImportError as error:
        checks.fail(_OP, "backend", "be installed (pip install mamba-ssm)", f"{backend}: {error}")
    if initial_state is not None:
        checks.fail(_OP, "initial_state", f"be None with {backend}, which takes none", "a tensor")
    if u.device.type != _PACKAGE_DEVICE:
        rule = f"be on a {_PACKAGE_DEVICE} device with {backend}"
        checks.fail(_OP, "u", rule, str(u.device))
    found = selective_scan_fn(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state
    )
    if not return_last_state:
        out: torch.Tensor = found
        return out
    out, last_state = found
    return out, last_state.detach()
