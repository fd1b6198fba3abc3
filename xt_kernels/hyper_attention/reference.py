"""The definition of `hyper_attention`: a dense softmax over weighted keys, in eager PyTorch."""

from __future__ import annotations

from typing import Any

import torch

from ..xl_attention.reference import xl_attention
from .api import make_plan
from .plan import QUERY_BLOCK, Level, Plan, strata


def hyper_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    memory_key: torch.Tensor | None = None,
    memory_value: torch.Tensor | None = None,
    scale: float | None = None,
    plan: Plan | None = None,
    return_lse: bool = False,
    **choices: Any,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """As `xt_kernels.hyper_attention`, in the dtype of its inputs; memory O(L (M + L)).

    choices: those of `make_plan`, unless a plan is given.
    """
    plan = plan or make_plan(query, key, memory_key=memory_key, enable_gqa=True, **choices)
    if plan.choices is None:
        return xl_attention(
            query, key, value, memory_key, memory_value, scale=scale,
            is_causal=plan.spec.is_causal, enable_gqa=True, return_lse=return_lse,
        )  # fmt: skip
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    # 1. The concatenation that the op never builds.
    if memory_key is not None and memory_value is not None:
        key = torch.cat([memory_key, key], dim=2)
        value = torch.cat([memory_value, value], dim=2)
    group = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(group, dim=1) for t in (key, value))
    # 2. The logarithm of each key's weight for each query, -inf where it is not attended; every
    # pair is in one level at most. Mean keys and values are further columns.
    keys, values, log_weights = [key], [value], [_log_weights(plan, key)]
    if plan.spec.residual == "mean":
        for level, segment in plan.segments():
            mean_key, mean_value, weights = _means(plan, level, segment, key, value)
            keys.append(mean_key)
            values.append(mean_value)
            log_weights.append(weights)
    key, value = torch.cat(keys, 2), torch.cat(values, 2)
    # 3. One softmax over all of them; a row without keys gives 0.
    scores = query @ key.transpose(-1, -2) * scale
    wide = torch.promote_types(scores.dtype, torch.float32)
    log_weight = torch.cat(log_weights, 3).to(wide)
    logits = (scores.to(wide) + log_weight).masked_fill(log_weight.isneginf(), float("-inf"))
    lse = logits.logsumexp(-1)
    weights = (logits - lse[..., None]).exp()
    weights = weights.masked_fill(torch.isneginf(lse)[..., None], 0.0).to(value.dtype)
    out = weights @ value
    return (out, lse) if return_lse else out


def _orders(
    plan: Plan, level: Level, segment: int, heads: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(ordered queries `[B, H, q]`, ordered keys `[B, H, k]`) of a segment, as indices."""
    choices = plan.choices
    assert choices is not None
    batch = choices.window_start.shape[0]
    if not plan.spec.is_ordered:
        places = level.queries(segment), level.keys(segment)
        device = choices.window_start.device
        q, k = (torch.arange(p.start, p.stop, device=device) for p in places)
        return q.expand(batch, heads, -1), k.expand(batch, heads, -1)
    q_place, k_place = level.order(segment)
    k = choices.key_order[:, :, k_place].long()
    k = k.repeat_interleave(heads // k.shape[1], dim=1)
    return choices.query_order[:, :, q_place].long(), k


def _inside(plan: Plan, level: Level, segment: int, num_queries: int) -> torch.Tensor:
    """Whether an ordered key is in the window of an ordered query: `[B, H, q, k]`."""
    assert plan.choices is not None
    start = plan.choices.window_start[:, :, level.blocks(segment)].long()
    start = start.repeat_interleave(QUERY_BLOCK, dim=2)[:, :, :num_queries, None]
    place = torch.arange(level.num_keys, device=start.device)
    return (place >= start) & (place < start + level.width)


def _log_weights(plan: Plan, key: torch.Tensor) -> torch.Tensor:
    """Log weight `[B, H, L, M + Lk]` of every key for every query."""
    batch, heads, num_keys, _ = key.shape
    found = torch.full(
        (batch, heads, plan.num_queries, num_keys), float("-inf"), device=key.device
    ).double()
    for level in plan.levels:
        for segment in range(level.segments):
            rows, columns = level.queries(segment), level.keys(segment)
            part = found[:, :, rows, columns]
            if level.is_exact:
                seen = torch.ones(part.shape[2:], dtype=torch.bool, device=key.device)
                part[:, :, seen.tril() if level.is_causal else seen] = 0.0
                continue
            q, k = _orders(plan, level, segment, heads)
            inside = _inside(plan, level, segment, q.shape[2])
            weights = torch.zeros(inside.shape, dtype=torch.float64, device=key.device)
            if plan.choices is not None and plan.choices.residual_place.numel():
                places = plan.choices.residual_place[level.residuals(segment)].long()
                drawn = torch.bincount(places, minlength=level.num_keys).double()
                # Each draw outside the window stands for as many of the keys there as any other.
                outside = (drawn * ~inside).sum(-1, keepdim=True).clamp(min=1)
                weights = drawn * (level.num_keys - level.width) / outside
            weights = torch.where(inside, 1.0, weights)
            # Back from ordered to own places.
            whole = torch.zeros_like(weights)
            index = (q - rows.start)[..., None].expand(weights.shape)
            whole.scatter_(2, index, weights)
            weights = torch.zeros_like(whole)
            index = (k - columns.start)[:, :, None].expand(weights.shape)
            weights.scatter_(3, index, whole)
            part.copy_(weights.log())
    return found


def _means(
    plan: Plan, level: Level, segment: int, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean key and value `[B, H, m, D]` of each stratum of ordered keys, log weights for all L.

    A mean weighs as many keys as its stratum has outside a query's window.
    """
    heads = key.shape[1]
    q, k = _orders(plan, level, segment, heads)
    inside = _inside(plan, level, segment, q.shape[2])
    bounds = strata(level.num_keys, level.num_residual).to(key.device)
    sizes = bounds.diff()
    place = torch.arange(level.num_keys, device=key.device)
    member = torch.searchsorted(bounds, place, right=True) - 1
    share = torch.zeros((level.num_residual, level.num_keys), device=key.device).double()
    share[member, place] = 1.0
    means = []
    for tensor in (key, value):
        rows = tensor.gather(2, k[..., None].expand(*k.shape, tensor.shape[3]))
        # The sums in fp32 at least, rounded once.
        wide = torch.promote_types(tensor.dtype, torch.float32)
        mean = share.to(wide) @ rows.to(wide) / sizes[:, None].to(wide)
        means.append(mean.to(tensor.dtype))
    outside = (~inside).double() @ share.T  # [B, H, q, m]
    weights = torch.zeros((*key.shape[:2], plan.num_queries, level.num_residual)).to(outside)
    weights.scatter_(2, q[..., None].expand(outside.shape), outside)
    return means[0], means[1], weights.log()
