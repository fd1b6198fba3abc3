# mypy: ignore-errors
"""Triton forward of `hyper_attention`: one online softmax over a window and the residual keys.

    s_ij = scale q_i . k_j + log w_ij     j over the window of query block i, then over the residual
    out_i = sum_j p_ij v_j                p_ij = exp(s_ij - lse_i),   lse_i = log sum_j exp(s_ij)

w_ij is 1 in the window. A sampled key outside it weighs as many keys as it stands for, one inside
it nothing; a mean weighs as many keys as its stratum has outside. A program owns BLOCK_M queries
that follow one another in the plan's order: it gathers their rows, and those of keys, through the
order, and writes the result back in place, so nothing is permuted in memory.

Causal attention is a launch a level, exact ones too, whose windows are whole segments. Each
continues the softmax of the last: (out, lse) of the keys so far are the state acc = out,
row_max = lse, row_sum = 1. Between levels out is fp32. Scores and sums are fp32 (fp64 for fp64).
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .._aot import ARCHS, AotCase
from .._attention import (
    LN2,
    LOG2E,
    MAX_REGISTERS,
    Config,
    columns,
    configs,
    head_of,
    key_places,
    launch_options,
    of_tables,
    online_softmax,
    row_values,
    scale_of,
    scale_parts,
)
from .._tiles import offset, split
from .level_table import (
    K_BEGIN,
    K_OFFSET,
    KEYS,
    SEGMENT,
    STEP,
    level_of,
    level_table,
    of_level,
)
from .plan import QUERY_BLOCK, Choices, Level, Spec, is_in_parts, levels

# As the tables of xl_attention: chosen by reading the code that comes out, not yet by time.
# A tile lies within a query block.
FORWARD = {
    "fast": {
        64: (Config(128, 64, 8, 3), Config(64, 64, 4, 3)),
        128: (Config(128, 64, 8, 2),),
        256: (Config(64, 32, 8, 2),),
    },
    "ampere": {
        64: (Config(64, 32, 4, 2),),
        128: (Config(64, 32, 8, 2),),
        256: (Config(32, 32, 8, 2),),
    },
    "any": {
        64: (Config(32, 32, 8, 1),),
        128: (Config(32, 32, 8, 1),),
        256: (Config(16, 16, 8, 1),),
    },
    "wide": {
        64: (Config(32, 16, 8, 1),),
        128: (Config(16, 16, 8, 1, 64),),
        256: (Config(16, 16, 8, 1, 64),),
    },
    "tf32": {
        64: (Config(32, 32, 8, 1),),
        128: (Config(16, 16, 8, 1),),
    },
}


@triton.jit
def rows_of(base, strides, index, offs_d):
    """Pointers `[rows, len(offs_d)]` of rows `index` of a head."""
    return base + offset(index, strides[2])[:, None] + offset(offs_d, strides[3])[None, :]


@triton.jit
def ordered(order_ptr, place, mask, first, ORDERED: tl.constexpr):
    """Which token is at `place` of a segment's order; `first` is the segment's first token."""
    if ORDERED:
        return tl.load(order_ptr + place, mask=mask, other=0)
    return first + place


@triton.jit
def key_tile(
    key, index, mask, offs_d, IS_MEAN: tl.constexpr, HEAD_DIM: tl.constexpr,
    HAS_MEMORY: tl.constexpr,
):  # fmt: skip
    """Keys `index`, counted through memory, or means `[rows, len(offs_d)]`; 0 past the masks.

    key: (pointer to the head, to memory's, strides, memory's strides, length of memory, pointer to
    the means).
    """
    if IS_MEAN:
        ptrs = key[5] + (index * HEAD_DIM)[:, None] + offs_d[None, :]
    else:
        ptrs = key_places(key[0], key[1], key[2], key[3], index, key[4], offs_d, HAS_MEMORY)
    return tl.load(ptrs, mask=mask[:, None] & (offs_d < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def row_products(
    row, key, index, mask, HAS_MEMORY: tl.constexpr, IS_MEAN: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Products `[M, N]` of rows with keys, BLOCK_C columns at a time.

    row: (pointer to the head, strides, which rows, their mask). Without tensor cores a thread of a
    dot holds whole rows; wide ones do not fit in registers.
    """
    total = tl.zeros([M, N], ACC)
    for column in tl.range(0, HEAD_DIM, BLOCK_C, disable_licm=True):
        offs_c = column + tl.arange(0, BLOCK_C)
        mask_a = row[3][:, None] & (offs_c < HEAD_DIM)[None, :]
        a = tl.load(rows_of(row[0], row[1], row[2], offs_c), mask=mask_a, other=0.0)
        b = key_tile(key, index, mask, offs_c, IS_MEAN, HEAD_DIM, HAS_MEMORY)
        total = tl.dot(a, tl.trans(b), total, input_precision=PRECISION, out_dtype=ACC)
    return total


@triton.jit
def residual_index(key_ptr, j, num_residual, RESIDUAL: tl.constexpr):
    """Which rows residual keys j are: of the means, or of all keys."""
    if RESIDUAL == "mean":
        return j
    return tl.load(key_ptr + j, mask=j < num_residual, other=0)


@triton.jit
def stratum(j, num_keys, num_residual):
    """Where stratum j of the ordered keys begins: the first ones have a key more."""
    size = num_keys // num_residual
    return j * size + tl.minimum(j, num_keys - size * num_residual)


@triton.jit
def sample_weight(
    place_ptr, start, width, num_keys, num_residual, PLACES: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """log2 of how many keys outside a window one of the samples there stands for."""
    offs = tl.arange(0, PLACES)
    place = tl.load(place_ptr + offs, mask=offs < num_residual, other=0)
    outside = ((place < start) | (place >= start + width)) & (offs < num_residual)
    count = tl.maximum(tl.sum(outside.to(tl.int32), 0), 1)
    return tl.log2((num_keys - width).to(ACC)) - tl.log2(count.to(ACC))


@triton.jit
def residual_weight(
    place_ptr, j, start, width, num_keys, num_residual, of_sample, RESIDUAL: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """log2 of the weight of residual keys j for a query block, -inf where there is none."""
    if RESIDUAL == "mean":
        begin = stratum(j, num_keys, num_residual)
        end = stratum(j + 1, num_keys, num_residual)
        inside = tl.minimum(end, start + width) - tl.maximum(begin, start)
        outside = end - begin - tl.maximum(inside, 0)
        seen = (j < num_residual) & (outside > 0)
        return tl.where(seen, tl.log2(tl.maximum(outside, 1).to(ACC)), float("-inf"))
    place = tl.load(place_ptr + j, mask=j < num_residual, other=0)
    seen = (j < num_residual) & ((place < start) | (place >= start + width))
    return tl.where(seen, of_sample, float("-inf"))


@triton.jit
def _scores(
    q, q_row, key, index, mask, scale_log2, offs_d, HAS_MEMORY: tl.constexpr,
    IS_MEAN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Scores `[BLOCK_M, BLOCK_N]`, log2, of queries and keys `index`."""
    if BLOCK_C == BLOCK_D:
        k = key_tile(key, index, mask, offs_d, IS_MEAN, HEAD_DIM, HAS_MEMORY)
        score = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=ACC)
    else:
        score = row_products(
            q_row, key, index, mask, HAS_MEMORY, IS_MEAN, BLOCK_M, BLOCK_N, HEAD_DIM, BLOCK_C,
            PRECISION, ACC,
        )  # fmt: skip
    return score * scale_log2


@triton.jit
def _attend(
    acc, row_max, row_sum, q, q_row, key, value, order_ptr, k_first, start, begin, end, limit, row,
    scale_log2, offs_d, MASKED: tl.constexpr, IS_CAUSAL: tl.constexpr, ORDERED: tl.constexpr,
    HAS_MEMORY: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Online softmax over keys [begin, end) of a window that starts at `start` and has `limit`."""
    offs_n = tl.arange(0, BLOCK_N)
    for first in tl.range(begin, end, BLOCK_N, disable_licm=True):
        place = first + offs_n
        mask = place < limit
        index = ordered(order_ptr, start + place, mask, k_first, ORDERED)
        score = _scores(
            q, q_row, key, index, mask, scale_log2, offs_d, HAS_MEMORY, False, BLOCK_M, BLOCK_N,
            HEAD_DIM, BLOCK_D, BLOCK_C, PRECISION, ACC,
        )  # fmt: skip
        v = key_tile(value, index, mask, offs_d, False, HEAD_DIM, HAS_MEMORY)
        if MASKED:
            seen = mask[None, :]
            if IS_CAUSAL:
                seen = seen & (place[None, :] <= row[:, None])
            score = tl.where(seen, score, float("-inf"))
        acc, row_max, row_sum = online_softmax(
            acc, row_max, row_sum, score, v, MASKED, PRECISION, ACC
        )
    return acc, row_max, row_sum


@triton.jit
def _hyper_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, mk_ptr, mv_ptr, mean_k_ptr, mean_v_ptr, out_ptr, lse_ptr,
    q_order_ptr, k_order_ptr, start_ptr, place_ptr, residual_ptr,
    q_strides, k_strides, v_strides, mk_strides, mv_strides, out_strides, lse_strides,
    q_order_row, k_order_row, start_row, residual_row, mean_segments, mean_row, scale_parts,
    num_heads, group, len_m, segments, step, q_begin, num_queries, q_end, k_begin, num_keys, k_end,
    width, num_residual,
    PART: tl.constexpr, RESIDUAL: tl.constexpr, ORDERED: tl.constexpr, HAS_MEMORY: tl.constexpr,
    ACCUMULATE: tl.constexpr, PLACES: tl.constexpr, QUERY_BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """out `[B, H, L, D]` and lse `[B, H, L]` of BLOCK_M ordered queries of a segment of a level."""
    pid_bhs, tile = split(tl.program_id(0), tl.cdiv(num_queries, BLOCK_M))
    pid_bh, segment = split(pid_bhs, segments)
    pid_b, pid_h = split(pid_bh, num_heads)
    pid_g = pid_h // group
    pid_bg = pid_b * (num_heads // group) + pid_g
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    q_first = q_begin + segment * step
    k_first = k_begin + segment * step
    mask_m = row < tl.minimum(num_queries, q_end - q_first)
    scale_log2 = scale_of(scale_parts, ACC) * LOG2E

    q_order = q_order_ptr + offset(pid_bh, q_order_row) + segment * num_queries
    offs_m = ordered(q_order, row, mask_m, q_first, ORDERED)
    mask_q = mask_m[:, None] & (offs_d < HEAD_DIM)[None, :]
    q_row = (head_of(q_ptr, pid_b, pid_h, q_strides), q_strides, offs_m, mask_m)
    q = mask_m  # not used where rows are taken in pieces
    if BLOCK_C == BLOCK_D:
        q = tl.load(rows_of(q_row[0], q_strides, offs_m, offs_d), mask=mask_q, other=0.0)
    out_base = head_of(out_ptr, pid_b, pid_h, out_strides)
    out_ptrs = rows_of(out_base, out_strides, offs_m, offs_d)
    lse_ptrs = head_of(lse_ptr, pid_b, pid_h, lse_strides) + offset(offs_m, lse_strides[2])
    if ACCUMULATE:
        acc = tl.load(out_ptrs, mask=mask_q, other=0.0).to(ACC)
        row_max = tl.load(lse_ptrs, mask=mask_m, other=float("-inf")) * LOG2E
        row_sum = tl.where(row_max == float("-inf"), 0.0, 1.0).to(ACC)
    else:
        acc = tl.zeros([BLOCK_M, BLOCK_D], ACC)
        row_max = tl.full([BLOCK_M], float("-inf"), ACC)
        row_sum = tl.zeros([BLOCK_M], ACC)

    means = offset(pid_bg * mean_segments + segment, mean_row)
    key = (
        head_of(k_ptr, pid_b, pid_g, k_strides), head_of(mk_ptr, pid_b, pid_g, mk_strides),
        k_strides, mk_strides, len_m, mean_k_ptr + means,
    )  # fmt: skip
    value = (
        head_of(v_ptr, pid_b, pid_g, v_strides), head_of(mv_ptr, pid_b, pid_g, mv_strides),
        v_strides, mv_strides, len_m, mean_v_ptr + means,
    )  # fmt: skip
    k_order = k_order_ptr + offset(pid_bg, k_order_row) + segment * num_keys
    IS_CAUSAL: tl.constexpr = PART == "causal"
    start = 0
    if PART == "window":
        block = tile * BLOCK_M // QUERY_BLOCK
        blocks = tl.cdiv(num_queries, QUERY_BLOCK)
        start = tl.load(start_ptr + offset(pid_bh, start_row) + segment * blocks + block)
    whole, limit = width, width
    if IS_CAUSAL:
        limit = tl.minimum(tile * BLOCK_M + BLOCK_M, k_end - k_first)
        whole = tl.minimum(tile * BLOCK_M, limit)
    whole = whole // BLOCK_N * BLOCK_N
    acc, row_max, row_sum = _attend(
        acc, row_max, row_sum, q, q_row, key, value, k_order, k_first, start, 0, whole, limit, row,
        scale_log2, offs_d, False, False, ORDERED, HAS_MEMORY, BLOCK_M, BLOCK_N, HEAD_DIM, BLOCK_D,
        BLOCK_C, PRECISION, ACC,
    )  # fmt: skip
    acc, row_max, row_sum = _attend(
        acc, row_max, row_sum, q, q_row, key, value, k_order, k_first, start, whole, limit, limit,
        row, scale_log2, offs_d, True, IS_CAUSAL, ORDERED, HAS_MEMORY, BLOCK_M, BLOCK_N, HEAD_DIM,
        BLOCK_D, BLOCK_C, PRECISION, ACC,
    )  # fmt: skip

    if RESIDUAL != "none":
        place = place_ptr + segment * num_residual
        residual = residual_ptr + offset(pid_bg, residual_row) + segment * num_residual
        of_sample = 0.0
        if RESIDUAL == "sample":
            of_sample = sample_weight(place, start, width, num_keys, num_residual, PLACES, ACC)
        for first in tl.range(0, num_residual, BLOCK_N, disable_licm=True):
            j = first + tl.arange(0, BLOCK_N)
            mask = j < num_residual
            index = residual_index(residual, j, num_residual, RESIDUAL)
            score = _scores(
                q, q_row, key, index, mask, scale_log2, offs_d, HAS_MEMORY, RESIDUAL == "mean",
                BLOCK_M, BLOCK_N, HEAD_DIM, BLOCK_D, BLOCK_C, PRECISION, ACC,
            )  # fmt: skip
            v = key_tile(value, index, mask, offs_d, RESIDUAL == "mean", HEAD_DIM, HAS_MEMORY)
            weight = residual_weight(
                place, j, start, width, num_keys, num_residual, of_sample, RESIDUAL, ACC
            )
            acc, row_max, row_sum = online_softmax(
                acc, row_max, row_sum, score + weight[None, :], v, True, PRECISION, ACC
            )

    # A row without keys gives 0 and an lse of -inf.
    acc = acc / tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]
    lse = (row_max + tl.log2(row_sum)) * LN2
    lse = tl.where(row_sum == 0.0, float("-inf"), lse)
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask_q)
    tl.store(lse_ptrs, lse, mask=mask_m)


@triton.jit
def _hyper_attention_mean_kernel(
    table_ptr, k_ptr, v_ptr, mk_ptr, mv_ptr, mean_k_ptr, mean_v_ptr, k_order_ptr,
    k_strides, v_strides, mk_strides, mv_strides, k_order_row, mean_row, num_key_heads, len_m,
    segments, num_residual,
    ORDERED: tl.constexpr, HAS_MEMORY: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Mean key and value `[B groups, segments of all levels, m, D]` of a stratum."""
    pid_bgs, j = split(tl.program_id(0), num_residual)
    pid_bg, place = split(pid_bgs, segments)
    pid_b, pid_g = split(pid_bg, num_key_heads)
    level = level_of(table_ptr, SEGMENT, place)
    segment = place - of_level(table_ptr, SEGMENT, level)
    num_keys = of_level(table_ptr, KEYS, level).to(tl.int32)
    offs_d, row = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    key = (
        head_of(k_ptr, pid_b, pid_g, k_strides), head_of(mk_ptr, pid_b, pid_g, mk_strides),
        k_strides, mk_strides, len_m, mean_k_ptr,
    )  # fmt: skip
    value = (
        head_of(v_ptr, pid_b, pid_g, v_strides), head_of(mv_ptr, pid_b, pid_g, mv_strides),
        v_strides, mv_strides, len_m, mean_v_ptr,
    )  # fmt: skip
    k_first = of_level(table_ptr, K_BEGIN, level) + segment * of_level(table_ptr, STEP, level)
    k_first = k_first.to(tl.int32)
    k_order = k_order_ptr + offset(pid_bg, k_order_row) + of_level(table_ptr, K_OFFSET, level)
    k_order += segment * num_keys
    begin, end = stratum(j, num_keys, num_residual), stratum(j + 1, num_keys, num_residual)
    k_sum, v_sum = tl.zeros([BLOCK_D], ACC), tl.zeros([BLOCK_D], ACC)
    for first in range(begin, end, BLOCK_N):
        mask = first + row < end
        index = ordered(k_order, first + row, mask, k_first, ORDERED)
        k = key_tile(key, index, mask, offs_d, False, HEAD_DIM, HAS_MEMORY)
        v = key_tile(value, index, mask, offs_d, False, HEAD_DIM, HAS_MEMORY)
        k_sum += tl.sum(k.to(ACC), 0)
        v_sum += tl.sum(v.to(ACC), 0)
    size = (end - begin).to(ACC)
    mask = offs_d < HEAD_DIM
    dtype = mean_k_ptr.dtype.element_ty
    mean = offset(pid_bgs, mean_row) + j * HEAD_DIM + offs_d
    tl.store(mean_k_ptr + mean, (k_sum / size).to(dtype), mask=mask)
    tl.store(mean_v_ptr + mean, (v_sum / size).to(dtype), mask=mask)


def part_of(level: Level, spec: Spec) -> dict:
    """The constants that tell one kind of level from another."""
    if level.is_exact:
        part = "causal" if level.is_causal else "exact"
        return {"PART": part, "RESIDUAL": "none", "ORDERED": False, "PLACES": 1}
    residual = "sample" if spec.residual == "uniform" else spec.residual
    places = triton.next_power_of_2(level.num_residual) if residual == "sample" else 1
    kind = {"PART": "window", "RESIDUAL": residual}
    return {**kind, "ORDERED": spec.is_ordered, "PLACES": places}


def place_of(level: Level, choices: Choices) -> tuple[list[torch.Tensor], list[int]]:
    """The level's part of the plan's tensors, and how far apart the heads of each lie."""
    q_order = choices.query_order[:, :, level.q_offset :]
    k_order = choices.key_order[:, :, level.k_offset :]
    starts = choices.window_start[:, :, level.block_offset :]
    places = choices.residual_place[level.residual_offset :]
    residual = choices.residual_key[:, :, level.residual_offset :]
    rows = [t.stride(1) for t in (q_order, k_order, starts, residual)]
    return [q_order, k_order, starts, places, residual], rows


# Results and scratch, in functions of their own so that a test can put them elsewhere.
def like(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A result of the size and layout of `tensor`."""
    return torch.empty_like(tensor, dtype=dtype)


def rows_for(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Scratch for residual rows `[..., m, D]`."""
    return torch.empty(shape, dtype=dtype, device=device)


class Means(NamedTuple):
    """Mean keys and values `[B groups, segments of all levels, m, D]`, if there are any."""

    key: torch.Tensor
    value: torch.Tensor
    exist: bool

    def of(self, level: Level) -> tuple[list[torch.Tensor], tuple[int, int]]:
        """The level's part of both, the segments of a head, and how far apart they lie."""
        first = level.first_segment if self.exist else 0
        parts = [means[:, first:] for means in (self.key, self.value)]
        return parts, (self.key.shape[1], self.key.stride(1))


def launch_means(
    key: torch.Tensor,
    value: torch.Tensor,
    memory: tuple[torch.Tensor, torch.Tensor],
    len_m: int,
    choices: Choices,
    spec: Spec,
    num_queries: int,
) -> Means:
    """The means of all levels."""
    batch, groups, num_keys, head_dim = key.shape
    if spec.residual != "mean":
        return Means(key, value, False)
    table = level_table(spec, num_queries, num_keys, len_m, key.device)
    shape = (batch * groups, table.segments, spec.sample_size, head_dim)
    means = [rows_for(shape, key.dtype, key.device) for _ in range(2)]
    block_d = triton.next_power_of_2(head_dim)
    programs = shape[0] * shape[1] * shape[2]
    if programs:
        _hyper_attention_mean_kernel[(programs,)](
            table.numbers, key, value, *memory, *means, choices.key_order,
            key.stride(), value.stride(), *[m.stride() for m in memory],
            choices.key_order.stride(1), means[0].stride(1), groups, len_m, table.segments,
            spec.sample_size,
            ORDERED=spec.is_ordered, HAS_MEMORY=len_m > 0, HEAD_DIM=head_dim, BLOCK_D=block_d,
            BLOCK_N=1024 // block_d, num_warps=4, num_stages=1,
            ACC=tl.float64 if key.dtype == torch.float64 else tl.float32,
        )  # fmt: skip
    return Means(*means, True)


def launch_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    memory_key: torch.Tensor | None,
    memory_value: torch.Tensor | None,
    choices: Choices,
    spec: Spec,
    scale: float,
    config: Config | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out `[B, H, L, D]`, lse `[B, H, L]`)."""
    batch, heads, length, _ = query.shape
    len_m = 0 if memory_key is None else memory_key.shape[2]
    memory = (memory_key, memory_value) if len_m else (key, value)
    lse = row_values(query)
    found = levels(spec, length, key.shape[2], len_m)
    several = is_in_parts(found)
    out = like(query, lse.dtype if several else None)
    if several:
        out.zero_()
        lse.fill_(float("-inf"))
    all_means = launch_means(key, value, memory, len_m, choices, spec, length)
    for level in found:
        means, mean_rows = all_means.of(level)
        chosen = config or configs(FORWARD, (query, key, value, *memory, out))[0]
        tiles = triton.cdiv(level.num_queries, chosen.block_m)
        programs = batch * heads * level.segments * tiles
        if not programs:
            continue
        tensors, rows = place_of(level, choices)
        _hyper_attention_fwd_kernel[(programs,)](
            query, key, value, *memory, *means, out, lse, *tensors,
            query.stride(), key.stride(), value.stride(), *[m.stride() for m in memory],
            out.stride(), lse.stride(), *rows, *mean_rows, scale_parts(scale),
            heads, heads // key.shape[1], len_m, level.segments, level.step, level.q_begin,
            level.num_queries, level.q_end, level.k_begin, level.num_keys, level.k_end,
            level.width, level.num_residual, **part_of(level, spec), HAS_MEMORY=len_m > 0,
            ACCUMULATE=several, QUERY_BLOCK=QUERY_BLOCK,
            BLOCK_C=columns(query.shape[3], chosen), **launch_options(query, chosen),
        )  # fmt: skip
    return out.to(query.dtype), lse


_HEAD, _ROWS = ("i64", "i64", "i32", 1), ("i32", "i32", 1)
# Which levels are compiled: a window with each residual, and what is exact.
_PARTS = {
    "sample": {"PART": "window", "RESIDUAL": "sample", "ORDERED": True, "PLACES": 256},
    "mean": {"PART": "window", "RESIDUAL": "mean", "ORDERED": True, "PLACES": 1},
    "tile": {"PART": "window", "RESIDUAL": "mean", "ORDERED": False, "PLACES": 1},
    "causal": {"PART": "causal", "RESIDUAL": "none", "ORDERED": False, "PLACES": 1},
}


def chunks(head_dim: int, config: Config) -> tuple[int, int]:
    """(BLOCK_C, BLOCK_O) of the query kernel: columns of a product, and of what it writes."""
    block_c, block_d = columns(head_dim, config), triton.next_power_of_2(head_dim)
    # Rows that are too wide for the registers are left to several programs.
    return block_c, block_d if block_c == block_d else min(block_d, 2 * block_c)


def aot_case(
    form: str, kernel, kind: str, dtype: str, head_dim: int, config: Config, part: str
) -> AotCase:
    """A kernel of an attention level as the launchers compile it, with memory."""
    names = kernel.arg_names
    element = "fp32" if kind in ("wide", "tf32") else dtype
    accumulate = part == "causal"
    wide = {"out_ptr", "dq_ptr", "dk_ptr", "dv_ptr", "dmk_ptr", "dmv_ptr"} if accumulate else set()
    integers = {"q_order_ptr", "k_order_ptr", "start_ptr", "place_ptr", "residual_ptr"}
    fp32 = {"lse_ptr", "dlse_ptr", "delta_ptr", "sums_ptr", "weight_ptr"} | wide
    signature = {}
    for name in names:
        if name.endswith("_ptr"):
            signature[name] = (
                "*i64"
                if name == "table_ptr"
                else "*i32"
                if name in integers
                else "*fp32"
                if name in fp32
                else f"*{element}"
            )
        elif name.endswith("_strides"):
            signature[name] = _ROWS if name in ("lse_strides", "dlse_strides") else _HEAD
        elif name == "scale_parts":
            signature[name] = ("fp32", "fp32")
        elif name.islower():
            signature[name] = "i32"
    signature.update({"table_ptr": "*i64"} if "table_ptr" in names else {})
    constants = {
        **_PARTS[part], "HAS_MEMORY": True, "NEEDS_MEMORY": True, "HAS_DLSE": True,
        "ACCUMULATE": accumulate, "QUERY_BLOCK": QUERY_BLOCK, "HEAD_DIM": head_dim,
        "BLOCK_D": triton.next_power_of_2(head_dim), "BLOCK_C": chunks(head_dim, config)[0],
        "BLOCK_O": chunks(head_dim, config)[1],
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n, "PRECISION": "tf32" if kind == "tf32" else "ieee",
        "ACC": tl.float32,
    }  # fmt: skip
    tile = f"{config.block_m}x{config.block_n}x{config.num_warps}x{config.num_stages}"
    # What the launchers tell apart.
    variants = {"fast": ("aligned",), "ampere": ("aligned",)}
    archs = {"fast": (90, 100), "ampere": (80,)}
    return AotCase(
        name=f"{form}-{kind}-{element}-d{head_dim}-{tile}-{part}",
        kernel=kernel,
        signature=signature,
        constexprs={name: value for name, value in constants.items() if name in names},
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        maxnreg=MAX_REGISTERS,
        has_dots=kind != "wide",
        pipelined=config.num_stages > 1,
        # fp32 is compiled the hard way alone: aligned, it takes fewer registers.
        variants=variants.get(kind, ("unaligned",)),
        archs=archs.get(kind, ARCHS),
    )


def aot_table(
    form: str, kernel, table: dict, parts: tuple[str, ...], everything: bool
) -> Iterator[AotCase]:
    """Every config of a table; the first at head dim 64 with each kind of level.

    everything: of every config each kind of level, both 16-bit types and a head dim between.
    """
    if everything:
        for kind, dtype, head_dim, config in of_tables(table):
            for part in parts:
                yield aot_case(form, kernel, kind, dtype, head_dim, config, part)
        return
    for number, (most, found) in enumerate(table["fast"].items()):
        for part in parts if most == 64 else parts[number % 2 : number % 2 + 1]:
            yield aot_case(form, kernel, "fast", "bf16", most, found[0], part)
        for config in found[1:]:
            yield aot_case(form, kernel, "fast", "bf16", most, config, parts[0])
    yield aot_case(form, kernel, "fast", "fp16", 80, table["fast"][128][0], parts[0])
    yield aot_case(form, kernel, "ampere", "fp16", 80, table["ampere"][128][0], parts[0])
    for kind in ("ampere", "any", "wide", "tf32"):
        for number, (most, (config, *_)) in enumerate(table[kind].items()):
            # The parts in turn.
            part = parts[number % len(parts)]
            yield aot_case(form, kernel, kind, "bf16", most, config, part)


def aot_cases(everything: bool = False) -> Iterator[AotCase]:
    """What the launchers compile, with memory."""
    parts = ("sample", "mean", "tile", "causal")
    yield from aot_table("fwd", _hyper_attention_fwd_kernel, FORWARD, parts, everything)
    dtypes = [("any", "bf16"), ("wide", "fp32"), *([("any", "fp16")] * everything)]
    kernel, both = _hyper_attention_mean_kernel, ("aligned", "unaligned")
    for kind, dtype in dtypes:
        for head_dim in (16, 64, 128, 256) if everything else (256,):
            config = Config(0, 1024 // head_dim, 4, 1)
            case = aot_case("mean", kernel, kind, dtype, head_dim, config, "mean")
            yield replace(case, has_dots=False, maxnreg=None, variants=both)
