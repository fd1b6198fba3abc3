"""The definition of `xl_attention`: dense softmax over the concatenation, in eager PyTorch."""

from __future__ import annotations

import torch


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
    """As `xt_kernels.xl_attention`, in the dtype of its inputs; memory O(L (M + L))."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    num_memory = 0
    # 1. The concatenation that the op never builds.
    if memory_key is not None and memory_value is not None:
        num_memory = memory_key.shape[2]
        key = torch.cat([memory_key, key], dim=2)
        value = torch.cat([memory_value, value], dim=2)
    group = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(group, dim=1) for t in (key, value))
    # 2. Scores; causal: query i sees all memory and the current keys up to its own place, the ends
    # of both sequences aligned.
    scores = query @ key.transpose(-1, -2) * scale  # [B, H, L, M + Lk]
    if is_causal:
        length, total = scores.shape[-2:]
        place = torch.arange(length, device=query.device)[:, None] + total - length
        ahead = torch.arange(total, device=query.device)[None, :] > place
        if num_memory:
            ahead[:, :num_memory] = False
        scores = scores.masked_fill(ahead, float("-inf"))
    # 3. Softmax with its normaliser; a row without keys gives 0.
    wide = torch.promote_types(scores.dtype, torch.float32)
    lse = scores.to(wide).logsumexp(-1)
    weights = (scores.to(wide) - lse[..., None]).exp()
    weights = weights.masked_fill(torch.isneginf(lse)[..., None], 0.0).to(value.dtype)
    out = weights @ value
    return (out, lse) if return_lse else out
