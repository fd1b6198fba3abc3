"""What a call of `hyper_attention` would do, and what it would cost: without doing it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .. import _checks as checks
from .api import OP, spec_of
from .plan import levels


@dataclass(frozen=True)
class Explanation:
    """The path of a call and why; `print` it.

    path: "exact" or "hyper". form: "Triton" or "PyTorch (CPU)". reason: what decides.
    keys_per_query: keys, means and samples that a query attends to, on average.
    num_keys: keys that it would attend to exactly. parts: one line a level.
    result_bytes: out and lse. plan_bytes: orders, windows and residual keys. scratch_bytes: what
    is freed again: hashes and counts, means, fp32 sums between levels; on a CPU ordered copies of
    one head's keys and values, and gathered windows.
    """

    path: str
    form: str
    reason: str
    keys_per_query: float
    num_keys: float
    parts: tuple[str, ...]
    result_bytes: int
    plan_bytes: int
    scratch_bytes: int

    def __str__(self) -> str:
        size = f"{self.keys_per_query:,.0f} of {self.num_keys:,.0f} keys a query"
        kinds = {
            "result": self.result_bytes,
            "plan": self.plan_bytes,
            "scratch": self.scratch_bytes,
        }
        memory = ", ".join(f"{name} {count / 2**20:,.1f} MiB" for name, count in kinds.items())
        lines = [f"{self.path} attention, {self.form}: {self.reason}", size, memory]
        return "\n  ".join([*lines, *self.parts])


def explain(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor | None = None,
    *,
    memory_key: torch.Tensor | None = None,
    is_causal: bool = False,
    enable_gqa: bool = False,
    block_size: int = 256,
    sample_size: int = 256,
    min_seq_len: int = 4096,
    window: str = "lsh",
    residual: str = "sample",
    **ignored: Any,
) -> Explanation:
    """Which path `hyper_attention` takes for these tensors, why, and what memory it expects.

    Arguments are those of `hyper_attention`; meta tensors do. Nothing is computed. Raises
    ValueError as the op does.
    """
    if query.device.type != "meta":
        value = key if value is None else value
        checks.attention_inputs(OP, query, key, value, memory_key, memory_key, enable_gqa)
    spec = spec_of(is_causal, block_size, sample_size, min_seq_len, window, residual)
    batch, heads, num_queries, head_dim = query.shape
    groups, num_keys = key.shape[1:3]
    num_memory = 0 if memory_key is None else memory_key.shape[2]
    total = num_memory + num_keys
    cpu = query.device.type == "cpu"
    form = "PyTorch (CPU)" if cpu else "Triton"
    item = query.element_size()
    wide = max(item, 4)
    result = batch * heads * num_queries * (head_dim * item + wide)
    square = min(num_queries, num_keys) if is_causal else 0
    pairs = num_queries * total - square * (square - 1) // 2
    if is_causal:
        pairs -= max(num_queries - num_keys, 0) * num_keys
    possible = pairs / max(1, num_queries)
    if spec.is_exact(num_keys, num_memory):
        over = f"{total:,} keys <= "
        budget = f"the budget {spec.budget:,} (block_size + sample_size)"
        reason = over + (budget if total <= spec.budget else f"min_seq_len {spec.min_seq_len:,}")
        return Explanation("exact", form, reason, possible, possible, (), result, 0, 0)
    parts, seen, slots, means = [], 0, 0, 0
    found = levels(spec, num_queries, num_keys, num_memory)
    most = 0
    for level in found:
        for s in range(level.segments):
            rows = level.queries(s)
            n = rows.stop - rows.start
            if level.is_causal:
                seen += n * (n + 1) // 2
            else:
                seen += n * (level.width + level.num_residual)
        size = f"{level.segments} x ({level.num_queries:,} queries, {level.num_keys:,} keys)"
        if level.is_exact:
            parts.append(f"exact{' triangles' if level.is_causal else ''}: {size}")
            continue
        kind = f"window of {level.width}, {level.num_residual} residual keys ({residual})"
        parts.append(f"{kind}: {size}")
        slots += heads * level.segments * level.num_blocks
        if window == "lsh":
            slots += level.segments * (heads * level.num_queries + groups * level.num_keys)
        if residual in ("sample", "uniform"):
            slots += groups * level.segments * level.num_residual
        if residual == "mean":
            means = max(means, level.segments * level.num_residual)
        most = max(most, level.num_keys + level.num_residual)
    if cpu:
        # One head: ordered keys and values, and those of 64 query blocks' windows.
        scratch = 2 * head_dim * item * (most + 64 * spec.budget)
        scratch += num_queries * head_dim * wide * (heads // max(1, groups))
    else:
        scratch = 2 * batch * groups * means * head_dim * item
        if window == "lsh":
            # Hashes of a byte; twice a count for each of up to 128 buckets in 256 tokens.
            scratch += batch * (heads * num_queries + groups * total) * 5
        if len(found) > 1:
            scratch += batch * heads * num_queries * head_dim * wide
    return Explanation(
        "hyper",
        form,
        f"{total:,} keys > min_seq_len {spec.min_seq_len:,} and budget {spec.budget:,}",
        seen / max(1, num_queries),
        possible,
        tuple(parts),
        result,
        4 * batch * slots,
        scratch,
    )
