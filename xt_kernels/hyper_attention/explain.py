"""What a call of `hyper_attention` would do, and what it would cost: without doing it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .. import _checks as checks
from . import eager
from .api import OP, check_hash, check_samples, checked, spec_of
from .plan import TILE, Level, Plan, is_in_parts, levels


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
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    block_size: int = 256,
    sample_size: int = 256,
    lsh_num_projs: int = 7,
    min_seq_len: int = 4096,
    window: str = "lsh",
    residual: str = "sample",
    memory_key: torch.Tensor | None = None,
    memory_value: torch.Tensor | None = None,
    plan: Plan | None = None,
    seed: int = 0,
) -> Explanation:
    """Which path `hyper_attention` takes for these tensors, why, and what memory it expects.

    Arguments are those of `hyper_attention`; meta tensors, for a CUDA device, do, and value and
    memory_value may be left out. Nothing is computed. Raises ValueError as the op does.
    """
    value = key if value is None else value
    memory_value = memory_key if memory_value is None else memory_value
    query, key, _, memory_key, _ = checks.attention_inputs(
        OP, query, key, value, memory_key, memory_value, enable_gqa, ("cpu", "cuda", "meta")
    )
    checks.attention_scale(OP, query, scale)
    if plan is None:
        spec = spec_of(is_causal, block_size, sample_size, min_seq_len, window, residual)
        check_hash(lsh_num_projs, seed)
    else:
        spec, lsh_num_projs = checked(plan, query, key, memory_key), plan.lsh_num_projs
    residual = spec.residual
    batch, heads, num_queries, head_dim = query.shape
    groups, num_keys = key.shape[1:3]
    num_memory = 0 if memory_key is None else memory_key.shape[2]
    found = levels(spec, num_queries, num_keys, num_memory)
    is_cpu = query.device.type == "cpu"
    form = "PyTorch (CPU)" if is_cpu else "Triton"
    # Bytes of a number, and of one in a sum.
    item = query.element_size()
    wide = max(item, 4)
    result = batch * heads * num_queries * (head_dim * item + wide)

    possible = sum(level.count_pairs(level.num_keys) for level in found) / max(1, num_queries)
    total = num_memory + num_keys
    if spec.is_exact(num_keys, num_memory):
        limit = f"min_seq_len {spec.min_seq_len:,}"
        if total <= spec.budget:
            limit = f"the budget {spec.budget:,} (block_size + sample_size)"
        reason = f"{total:,} keys <= {limit}"
        return Explanation("exact", form, reason, possible, possible, (), result, 0, 0)

    check_samples(spec)
    seen = sum(level.count_pairs(level.width + level.num_residual) for level in found)
    hyper = [level for level in found if not level.is_exact]
    slots = sum(level.segments * heads * level.num_blocks for level in hyper)
    queries, keys = (
        sum(level.segments * getattr(level, name) for level in hyper)
        for name in ("num_queries", "num_keys")
    )
    ordered = heads * queries + groups * keys if spec.is_ordered else 0
    slots += ordered
    if residual in ("sample", "uniform"):
        slots += groups * sum(level.segments * level.num_residual for level in hyper)
    if is_cpu:
        # Of one head: ordered keys and values, and those that the query blocks of a call attend to.
        most = max((level.num_keys + level.num_residual for level in hyper), default=0)
        scratch = 2 * head_dim * item * (most + eager.BLOCKS * spec.budget)
        if is_in_parts(found):
            scratch += num_queries * head_dim * wide * (heads // max(1, groups))
    else:
        means = sum(level.segments * level.num_residual for level in hyper)
        scratch = 2 * batch * groups * means * head_dim * item if residual == "mean" else 0
        if spec.is_ordered:
            # A byte of hash, and a share of a count of each bucket in a tile: of all tokens, and
            # again in each level.
            count = 4 * 2**lsh_num_projs / TILE
            tokens = heads * num_queries + groups * total
            scratch += int(batch * (tokens * (1 + count) + ordered * count))
        if is_in_parts(found):
            scratch += batch * heads * num_queries * head_dim * wide
    return Explanation(
        "hyper",
        form,
        f"{total:,} keys > min_seq_len {spec.min_seq_len:,} and budget {spec.budget:,}",
        seen / max(1, num_queries),
        possible,
        tuple(_line(level, residual) for level in found),
        result,
        4 * batch * slots,
        scratch,
    )


def _line(level: Level, residual: str) -> str:
    size = f"{level.segments} x ({level.num_queries:,} queries, {level.num_keys:,} keys)"
    if level.is_exact:
        return f"exact{' triangles' if level.is_causal else ''}: {size}"
    return f"window of {level.width}, {level.num_residual} residual keys ({residual}): {size}"
