"""The definition of `selective_scan`: one token after the other, in eager PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F


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
    initial_state: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """As `xt_kernels.selective_scan`; a dozen small operations a token."""
    wide = torch.promote_types(u.dtype, torch.float32)
    dtype, (batch, dim, length) = u.dtype, u.shape
    u, delta = u.to(wide), delta.to(wide)
    # 1. The step size.
    if delta_bias is not None:
        delta = delta + delta_bias[:, None]
    if delta_softplus:
        delta = F.softplus(delta)
    # 2. The recurrence; each channel reads B and C of its group.
    B, C = ((t if t.dim() == 4 else t[:, None]).to(wide) for t in (B, C))  # [B, G, N, L]
    state = u.new_zeros(batch, dim, A.shape[1]) if initial_state is None else initial_state
    outs = []
    for step, x, b, c in zip(*(t.unbind(-1) for t in (delta, u, B, C)), strict=True):
        step = step[..., None]  # [B, D, 1]
        b, c = (t.repeat_interleave(dim // t.shape[1], 1) for t in (b, c))  # [B, D, N]
        state = torch.exp(step * A) * state + step * x[..., None] * b
        outs.append((state * c).sum(-1))
    out = torch.stack(outs, -1) if length else u
    # 3. The skip connection and the gate.
    if D is not None:
        out = out + D[:, None] * u
    if z is not None:
        out = out * F.silu(z.to(wide))
    out = out.to(dtype)
    return (out, state) if return_last_state else out
