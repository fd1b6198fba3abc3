# mypy: ignore-errors
"""Triton backward of `hyper_attention`: the derivative for a fixed plan.

With p_ij = exp(s_ij - lse_i), D_i = dout_i . out_i - dlse_i and ds_ij = p_ij (dout_i . v_j - D_i),

    dq_i = scale sum_j ds_ij k_j     dk_j = scale sum_i ds_ij q_i     dv_j = sum_i p_ij dout_i

over the pairs that the forward saw. Four launches a level, each gradient with one writer:

    query     dq of BLOCK_M ordered queries, over their window and the residual keys; and D
    residual  what all queries of a slice give to BLOCK_N residual keys: fp32 partial sums, which
              are then added up (split-K)
    key       dk and dv of BLOCK_N ordered keys, over the query blocks whose windows hold them.
              Window starts never fall, so these blocks are a range, found by bisection. A key that
              is a sample takes its residual's sum as a start, a member of a stratum its share.

Levels add to fp32 gradients, in their order. Sums are fp32 (fp64 for fp64); p and ds are rounded to
the inputs' dtype for products.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from .._aot import AotCase
from .._attention import (
    LOG2E,
    Config,
    configs,
    head_of,
    key_places,
    launch_options,
    row_values,
    scale_of,
    scale_parts,
)
from .._tiles import hidden_zero, offset, split
from .forward import (
    aot_case,
    aot_table,
    chunks,
    key_tile,
    launch_means,
    like,
    ordered,
    part_of,
    place_of,
    residual_index,
    residual_weight,
    row_products,
    rows_for,
    rows_of,
    sample_weight,
)
from .plan import QUERY_BLOCK, Choices, Spec, is_in_parts, levels

# As the tables of xl_attention: chosen by reading the code that comes out, not yet by time.
QUERY = {
    "fast": {
        64: (Config(128, 64, 8, 3), Config(64, 64, 4, 3)),
        128: (Config(128, 32, 8, 2),),
        256: (Config(64, 16, 8, 2),),
    },
    "ampere": {
        64: (Config(32, 32, 4, 2),),
        128: (Config(32, 32, 8, 2),),
        256: (Config(32, 16, 8, 2),),
    },
    "any": {
        64: (Config(64, 32, 8, 1),),
        128: (Config(16, 32, 8, 1, 64),),
        256: (Config(16, 16, 4, 1, 32),),
    },
    "wide": {
        64: (Config(16, 32, 8, 1),),
        128: (Config(16, 16, 8, 1, 64),),
        256: (Config(16, 16, 8, 1, 64),),
    },
    "tf32": {
        64: (Config(16, 32, 8, 1),),
        128: (Config(16, 16, 8, 1),),
    },
}
KEY = {
    "fast": {
        64: (Config(32, 128, 8, 3), Config(32, 64, 4, 3)),
        128: (Config(32, 64, 8, 2),),
        256: (Config(16, 32, 8, 1),),
    },
    "ampere": {
        64: (Config(16, 64, 4, 2),),
        128: (Config(32, 32, 8, 2),),
        256: (Config(16, 32, 8, 2),),
    },
    "any": {
        64: (Config(32, 32, 8, 1),),
        128: (Config(32, 16, 8, 1),),
        256: (Config(16, 16, 8, 1),),
    },
    "wide": {
        64: (Config(16, 32, 8, 1),),
        128: (Config(16, 16, 4, 1),),
        256: (Config(16, 16, 8, 1),),
    },
    "tf32": {
        64: (Config(16, 32, 8, 1),),
        128: (Config(16, 16, 8, 1),),
    },
}
# The residual's kernel weighs keys too, which takes registers.
RESIDUAL = {
    **KEY,
    "fast": {**KEY["fast"], 64: (Config(16, 128, 8, 3),), 128: (Config(16, 64, 8, 2),)},
    "ampere": {
        64: (Config(32, 32, 4, 2),),
        128: (Config(32, 32, 8, 2),),
        256: (Config(16, 16, 8, 2),),
    },
    "wide": {**KEY["wide"], 128: (Config(16, 16, 8, 1),)},
}
# Query blocks of a slice of the residual's sums, and how many slices there are at most.
_SLICE_BLOCKS, _MOST_SLICES = 8, 64


@triton.jit
def _query_gradient(
    dq, q, do, q_row, do_row, key, value, index, mask, weight, lse_log2, delta, scale_log2, offs_o,
    HAS_MEMORY: tl.constexpr, IS_MEAN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Adds ds k of a tile of keys to dq; weight `[queries or 1, keys]` is log2, or -inf."""
    k = key_tile(key, index, mask, offs_o, IS_MEAN, HEAD_DIM, HAS_MEMORY)
    if BLOCK_C == BLOCK_D:
        v = key_tile(value, index, mask, offs_o, IS_MEAN, HEAD_DIM, HAS_MEMORY)
        score = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=ACC)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION, out_dtype=ACC)
    else:
        score = row_products(
            q_row, key, index, mask, HAS_MEMORY, IS_MEAN, BLOCK_M, BLOCK_N, HEAD_DIM, BLOCK_C,
            PRECISION, ACC,
        )  # fmt: skip
        dp = row_products(
            do_row, value, index, mask, HAS_MEMORY, IS_MEAN, BLOCK_M, BLOCK_N, HEAD_DIM, BLOCK_C,
            PRECISION, ACC,
        )  # fmt: skip
    p = tl.exp2(score * scale_log2 - lse_log2[:, None] + weight)
    ds = (p * (dp - delta[:, None])).to(k.dtype)
    return tl.dot(ds, k, dq, input_precision=PRECISION, out_dtype=ACC)


@triton.jit
def _hyper_attention_bwd_query_kernel(
    q_ptr, k_ptr, v_ptr, mk_ptr, mv_ptr, mean_k_ptr, mean_v_ptr, out_ptr, do_ptr, lse_ptr, dlse_ptr,
    dq_ptr, delta_ptr, weight_ptr, q_order_ptr, k_order_ptr, start_ptr, place_ptr, residual_ptr,
    q_strides, k_strides, v_strides, mk_strides, mv_strides, out_strides, do_strides, dq_strides,
    lse_strides, dlse_strides,
    q_order_row, k_order_row, start_row, residual_row, weight_row, mean_segments, mean_row,
    scale_parts, num_heads, group, len_m, segments, step, q_begin, num_queries, q_end, k_begin,
    num_keys, k_end, width, num_residual,
    PART: tl.constexpr, RESIDUAL: tl.constexpr, ORDERED: tl.constexpr, HAS_MEMORY: tl.constexpr,
    HAS_DLSE: tl.constexpr, ACCUMULATE: tl.constexpr, PLACES: tl.constexpr,
    QUERY_BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """dq of BLOCK_M ordered queries of a segment of a level, and their D `[B, H, L]`.

    The first program of a query block leaves the weight of its samples `[B, H, segments blocks]`
    for the next launch. The second axis of programs has BLOCK_O of the columns each.
    """
    pid_bhs, tile = split(tl.program_id(0), tl.cdiv(num_queries, BLOCK_M))
    pid_bh, segment = split(pid_bhs, segments)
    pid_b, pid_h = split(pid_bh, num_heads)
    pid_g = pid_h // group
    pid_bg = pid_b * (num_heads // group) + pid_g
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d, offs_n = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    q_first = q_begin + segment * step
    k_first = k_begin + segment * step
    mask_m = row < tl.minimum(num_queries, q_end - q_first)
    scale = scale_of(scale_parts, ACC)
    scale_log2 = scale * LOG2E

    q_order = q_order_ptr + offset(pid_bh, q_order_row) + segment * num_queries
    offs_m = ordered(q_order, row, mask_m, q_first, ORDERED)
    out_base = head_of(out_ptr, pid_b, pid_h, out_strides)
    do_base = head_of(do_ptr, pid_b, pid_h, do_strides)
    q_base = head_of(q_ptr, pid_b, pid_h, q_strides)
    delta = tl.zeros([BLOCK_M], ACC)
    if BLOCK_C == BLOCK_D:
        mask_q = mask_m[:, None] & (offs_d < HEAD_DIM)[None, :]
        out = tl.load(rows_of(out_base, out_strides, offs_m, offs_d), mask=mask_q, other=0.0)
        do = tl.load(rows_of(do_base, do_strides, offs_m, offs_d), mask=mask_q, other=0.0)
        q = tl.load(rows_of(q_base, q_strides, offs_m, offs_d), mask=mask_q, other=0.0)
        delta += tl.sum(do.to(ACC) * out.to(ACC), 1)
    else:
        q, do = delta, delta  # not used: rows are taken in pieces
        for column in tl.range(0, HEAD_DIM, BLOCK_C, disable_licm=True):
            offs_c = column + tl.arange(0, BLOCK_C)
            mask_q = mask_m[:, None] & (offs_c < HEAD_DIM)[None, :]
            out_c = tl.load(rows_of(out_base, out_strides, offs_m, offs_c), mask=mask_q, other=0.0)
            do_c = tl.load(rows_of(do_base, do_strides, offs_m, offs_c), mask=mask_q, other=0.0)
            delta += tl.sum(do_c.to(ACC) * out_c.to(ACC), 1)
    if HAS_DLSE:
        dlse_ptrs = head_of(dlse_ptr, pid_b, pid_h, dlse_strides) + offset(offs_m, dlse_strides[2])
        delta -= tl.load(dlse_ptrs, mask=mask_m, other=0.0)
    row_place = offset(offs_m, lse_strides[2])
    pid_o = tl.program_id(1)
    delta_ptrs = head_of(delta_ptr, pid_b, pid_h, lse_strides) + row_place
    tl.store(delta_ptrs, delta, mask=mask_m & (pid_o == 0))
    lse_ptrs = head_of(lse_ptr, pid_b, pid_h, lse_strides) + row_place
    lse_log2 = tl.load(lse_ptrs, mask=mask_m, other=0.0) * LOG2E
    q_row = (q_base, q_strides, offs_m, mask_m)
    do_row = (do_base, do_strides, offs_m, mask_m)

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
    start = 0
    block = segment * tl.cdiv(num_queries, QUERY_BLOCK) + tile * BLOCK_M // QUERY_BLOCK
    if PART == "window":
        start = tl.load(start_ptr + offset(pid_bh, start_row) + block)
    limit = width
    if PART == "causal":
        limit = tl.minimum(tile * BLOCK_M + BLOCK_M, k_end - k_first)
    offs_o = pid_o * BLOCK_O + tl.arange(0, BLOCK_O)
    dq = tl.zeros([BLOCK_M, BLOCK_O], ACC)
    # Hoisted addresses would not fit in registers beside three tiles.
    for first in tl.range(0, limit, BLOCK_N, disable_licm=True):
        place = first + offs_n
        mask = place < limit
        index = ordered(k_order, start + place, mask, k_first, ORDERED)
        weight = tl.where(mask, 0.0, float("-inf"))[None, :]
        if PART == "causal":
            weight = tl.where(place[None, :] <= row[:, None], weight, float("-inf"))
        dq = _query_gradient(
            dq, q, do, q_row, do_row, key, value, index, mask, weight, lse_log2, delta, scale_log2,
            offs_o, HAS_MEMORY, False, BLOCK_M, BLOCK_N, HEAD_DIM, BLOCK_D, BLOCK_C, PRECISION, ACC,
        )  # fmt: skip
    if RESIDUAL != "none":
        sample_place = place_ptr + segment * num_residual
        residual = residual_ptr + offset(pid_bg, residual_row) + segment * num_residual
        of_sample = 0.0
        if RESIDUAL == "sample":
            of_sample = sample_weight(
                sample_place, start, width, num_keys, num_residual, PLACES, ACC
            )
            is_first = (tile * BLOCK_M % QUERY_BLOCK == 0) & (pid_o == 0)
            tl.store(weight_ptr + offset(pid_bh, weight_row) + block, of_sample, mask=is_first)
        for first in tl.range(0, num_residual, BLOCK_N, disable_licm=True):
            j = first + offs_n
            mask = j < num_residual
            index = residual_index(residual, j, num_residual, RESIDUAL)
            weight = residual_weight(
                sample_place, j, start, width, num_keys, num_residual, of_sample, RESIDUAL, ACC
            )
            dq = _query_gradient(
                dq, q, do, q_row, do_row, key, value, index, mask, weight[None, :], lse_log2,
                delta, scale_log2, offs_o, HAS_MEMORY, RESIDUAL == "mean", BLOCK_M, BLOCK_N,
                HEAD_DIM, BLOCK_D, BLOCK_C, PRECISION, ACC,
            )  # fmt: skip

    dq_base = head_of(dq_ptr, pid_b, pid_h, dq_strides)
    dq_ptrs = rows_of(dq_base, dq_strides, offs_m, offs_o)
    mask_q = mask_m[:, None] & (offs_o < HEAD_DIM)[None, :]
    dq = dq * scale
    if ACCUMULATE:
        dq += tl.load(dq_ptrs, mask=mask_q, other=0.0)
    tl.store(dq_ptrs, dq.to(dq_ptr.dtype.element_ty), mask=mask_q)


@triton.jit
def _collect(
    dk, dv, k, v, weight, rows, offs_m, mask_m, scale_log2, offs_d, HEAD_DIM: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Adds what queries offs_m give to a tile of keys; weight `[keys, queries or 1]` is log2.

    rows: pointers to a head of (query, dout, lse, D), and the strides of the first three. p and ds
    are computed transposed, [keys, queries]: a transposed accumulator as the left side of a dot is
    miscompiled on Hopper before Triton 3.7.1.
    """
    mask_q = mask_m[:, None] & (offs_d < HEAD_DIM)[None, :]
    # Queries past the mask have lse = inf, so that p is 0: a weight alone could overflow fp16.
    q = tl.load(rows_of(rows[0], rows[4], offs_m, offs_d), mask=mask_q, other=0.0)
    do = tl.load(rows_of(rows[1], rows[5], offs_m, offs_d), mask=mask_q, other=0.0)
    place = offset(offs_m, rows[6][2])
    lse_log2 = tl.load(rows[2] + place, mask=mask_m, other=float("inf")) * LOG2E
    delta = tl.load(rows[3] + place, mask=mask_m, other=0.0)
    score = tl.dot(k, tl.trans(q), input_precision=PRECISION, out_dtype=ACC) * scale_log2
    p = tl.exp2(score - lse_log2[None, :] + weight)  # [BLOCK_N, BLOCK_M]
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION, out_dtype=ACC)
    dp = tl.dot(v, tl.trans(do), input_precision=PRECISION, out_dtype=ACC)
    ds = (p * (dp - delta[None, :])).to(q.dtype)
    dk = tl.dot(ds, q, dk, input_precision=PRECISION, out_dtype=ACC)
    return dk, dv


@triton.jit
def _hyper_attention_bwd_residual_kernel(
    q_ptr, k_ptr, v_ptr, mk_ptr, mv_ptr, mean_k_ptr, mean_v_ptr, do_ptr, lse_ptr, delta_ptr,
    sums_ptr, weight_ptr, q_order_ptr, k_order_ptr, start_ptr, place_ptr, residual_ptr,
    q_strides, k_strides, v_strides, mk_strides, mv_strides, do_strides, lse_strides,
    q_order_row, k_order_row, start_row, residual_row, weight_row, mean_segments, mean_row,
    sums_row, scale_parts, num_key_heads, group, len_m,
    segments, step, q_begin, num_queries, q_end, k_begin, num_keys, k_end, width, num_residual,
    slice_blocks, programs,
    PART: tl.constexpr, RESIDUAL: tl.constexpr, ORDERED: tl.constexpr, HAS_MEMORY: tl.constexpr,
    PLACES: tl.constexpr, QUERY_BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Partial dk (not yet times scale) and dv `[slices, 2 B groups segments, m, D]`."""
    pid_sbgs, tile = split(tl.program_id(0), tl.cdiv(num_residual, BLOCK_N))
    pid_s, pid_bgs = split(pid_sbgs, programs)
    pid_bg, segment = split(pid_bgs, segments)
    pid_b, pid_g = split(pid_bg, num_key_heads)
    j = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    q_first = q_begin + segment * step
    count = tl.minimum(num_queries, q_end - q_first)
    scale_log2 = scale_of(scale_parts, ACC) * LOG2E
    means = offset(pid_bg * mean_segments + segment, mean_row)
    key = (
        head_of(k_ptr, pid_b, pid_g, k_strides), head_of(mk_ptr, pid_b, pid_g, mk_strides),
        k_strides, mk_strides, len_m, mean_k_ptr + means,
    )  # fmt: skip
    value = (
        head_of(v_ptr, pid_b, pid_g, v_strides), head_of(mv_ptr, pid_b, pid_g, mv_strides),
        v_strides, mv_strides, len_m, mean_v_ptr + means,
    )  # fmt: skip
    place = place_ptr + segment * num_residual
    residual = residual_ptr + offset(pid_bg, residual_row) + segment * num_residual
    index = residual_index(residual, j, num_residual, RESIDUAL)
    k = key_tile(key, index, j < num_residual, offs_d, RESIDUAL == "mean", HEAD_DIM, HAS_MEMORY)
    v = key_tile(value, index, j < num_residual, offs_d, RESIDUAL == "mean", HEAD_DIM, HAS_MEMORY)
    dk = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    dv = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    begin = pid_s * slice_blocks * QUERY_BLOCK
    end = tl.minimum(begin + slice_blocks * QUERY_BLOCK, count)
    blocks = tl.cdiv(num_queries, QUERY_BLOCK)
    for member in range(0, group):
        pid_h = pid_g * group + member
        pid_bh = pid_bg * group + member
        q_order = q_order_ptr + offset(pid_bh, q_order_row) + segment * num_queries
        starts = start_ptr + offset(pid_bh, start_row) + segment * blocks
        weights = weight_ptr + offset(pid_bh, weight_row) + segment * blocks
        rows = (
            head_of(q_ptr, pid_b, pid_h, q_strides), head_of(do_ptr, pid_b, pid_h, do_strides),
            head_of(lse_ptr, pid_b, pid_h, lse_strides),
            head_of(delta_ptr, pid_b, pid_h, lse_strides), q_strides, do_strides, lse_strides,
        )  # fmt: skip
        for block in range(begin, end, QUERY_BLOCK):
            start = tl.load(starts + block // QUERY_BLOCK)
            of_sample = 0.0
            if RESIDUAL == "sample":
                of_sample = tl.load(weights + block // QUERY_BLOCK)
            weight = residual_weight(
                place, j, start, width, num_keys, num_residual, of_sample, RESIDUAL, ACC
            )
            for first in tl.range(
                block, tl.minimum(block + QUERY_BLOCK, end), BLOCK_M, disable_licm=True
            ):
                row = first + tl.arange(0, BLOCK_M)
                mask_m = row < count
                offs_m = ordered(q_order, row, mask_m, q_first, ORDERED)
                dk, dv = _collect(
                    dk, dv, k, v, weight[:, None], rows, offs_m, mask_m, scale_log2, offs_d,
                    HEAD_DIM, PRECISION, ACC,
                )  # fmt: skip

    mask = (j < num_residual)[:, None] & (offs_d < HEAD_DIM)[None, :]
    ptrs = sums_ptr + offset(pid_s * 2 * programs + pid_bgs, sums_row)
    ptrs += (j * HEAD_DIM)[:, None] + offs_d[None, :]
    tl.store(ptrs, dk, mask=mask)
    tl.store(ptrs + offset(programs, sums_row), dv, mask=mask)


@triton.jit
def _first_at_least(ptr, count, x, steps):
    """The first i in [0, count] with ptr[i] >= x, for ascending values; x a scalar or a tensor."""
    low = x * 0
    high = low + count
    for _ in range(0, steps):
        middle = (low + high) // 2
        value = tl.load(ptr + middle, mask=low < high, other=0)
        below = (low < high) & (value < x)
        high = tl.where(below, high, middle)
        low = tl.where(below, middle + 1, low)
    return low


@triton.jit
def _hyper_attention_bwd_key_kernel(
    q_ptr, k_ptr, v_ptr, mk_ptr, mv_ptr, do_ptr, lse_ptr, delta_ptr, sums_ptr, dk_ptr, dv_ptr,
    dmk_ptr, dmv_ptr, q_order_ptr, k_order_ptr, start_ptr, place_ptr,
    q_strides, k_strides, v_strides, mk_strides, mv_strides, do_strides, lse_strides, dk_strides,
    dv_strides, dmk_strides, dmv_strides,
    q_order_row, k_order_row, start_row, sums_row, scale_parts, num_key_heads, group, len_m,
    segments, step, q_begin, num_queries, q_end, k_begin, num_keys, k_end, width, num_residual,
    steps, programs,
    PART: tl.constexpr, RESIDUAL: tl.constexpr, ORDERED: tl.constexpr, HAS_MEMORY: tl.constexpr,
    NEEDS_MEMORY: tl.constexpr, ACCUMULATE: tl.constexpr, PLACES: tl.constexpr,
    QUERY_BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dk and dv of BLOCK_N ordered keys of a segment of a level."""
    pid_bgs, tile = split(tl.program_id(0), tl.cdiv(num_keys, BLOCK_N))
    pid_bg, segment = split(pid_bgs, segments)
    pid_b, pid_g = split(pid_bg, num_key_heads)
    place = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    q_first = q_begin + segment * step
    k_first = k_begin + segment * step
    mask_n = place < tl.minimum(num_keys, k_end - k_first)
    mask_k = mask_n[:, None] & (offs_d < HEAD_DIM)[None, :]
    count = tl.minimum(num_queries, q_end - q_first)
    scale = scale_of(scale_parts, ACC)
    scale_log2 = scale * LOG2E
    k_order = k_order_ptr + offset(pid_bg, k_order_row) + segment * num_keys
    index = ordered(k_order, place, mask_n, k_first, ORDERED)

    dk = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    dv = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    if RESIDUAL != "none":
        if RESIDUAL == "mean":
            # The stratum that the key is a member of gives each of its members a share.
            size = num_keys // num_residual
            more = num_keys - size * num_residual
            j = tl.maximum(place // (size + 1), (place - more) // size)
            share = 1.0 / (size + (j < more).to(tl.int32)).to(ACC)
            mask_r = mask_k
        else:
            # As often as the key was drawn, its residual's sum.
            places = place_ptr + segment * num_residual
            j = _first_at_least(places, num_residual, place, steps)
            drawn = _first_at_least(places, num_residual, place + 1, steps) - j
            share = drawn.to(ACC)
            mask_r = mask_k & (drawn > 0)[:, None]
        ptrs = sums_ptr + offset(pid_bgs, sums_row) + (j * HEAD_DIM)[:, None] + offs_d[None, :]
        dk += tl.load(ptrs, mask=mask_r, other=0.0) * share[:, None]
        ptrs += offset(programs, sums_row)
        dv += tl.load(ptrs, mask=mask_r, other=0.0) * share[:, None]

    key = (
        head_of(k_ptr, pid_b, pid_g, k_strides), head_of(mk_ptr, pid_b, pid_g, mk_strides),
        k_strides, mk_strides, len_m, k_ptr,
    )  # fmt: skip
    value = (
        head_of(v_ptr, pid_b, pid_g, v_strides), head_of(mv_ptr, pid_b, pid_g, mv_strides),
        v_strides, mv_strides, len_m, v_ptr,
    )  # fmt: skip
    blocks = tl.cdiv(num_queries, QUERY_BLOCK)
    # Not hoisted, k and v included: addresses kept for the stores would not fit in registers.
    for member in tl.range(0, group, disable_licm=True):
        k = key_tile(key, index, mask_n, offs_d, False, HEAD_DIM, HAS_MEMORY)
        v = key_tile(value, index, mask_n, offs_d, False, HEAD_DIM, HAS_MEMORY)
        pid_h = pid_g * group + member
        pid_bh = pid_bg * group + member
        q_order = q_order_ptr + offset(pid_bh, q_order_row) + segment * num_queries
        starts = start_ptr + offset(pid_bh, start_row) + segment * blocks
        begin, end = 0, count
        if PART == "window":
            first_key = tile * BLOCK_N
            begin = _first_at_least(starts, blocks, first_key - width + 1, steps) * QUERY_BLOCK
            last = _first_at_least(starts, blocks, first_key + BLOCK_N, steps) * QUERY_BLOCK
            end = tl.minimum(last, count)
        if PART == "causal":
            begin = tile * BLOCK_N // BLOCK_M * BLOCK_M
        rows = (
            head_of(q_ptr, pid_b, pid_h, q_strides), head_of(do_ptr, pid_b, pid_h, do_strides),
            head_of(lse_ptr, pid_b, pid_h, lse_strides),
            head_of(delta_ptr, pid_b, pid_h, lse_strides), q_strides, do_strides, lse_strides,
        )  # fmt: skip
        for first in tl.range(begin, end, BLOCK_M, disable_licm=True):
            row = first + tl.arange(0, BLOCK_M)
            mask_m = row < count
            offs_m = ordered(q_order, row, mask_m, q_first, ORDERED)
            weight = tl.zeros([BLOCK_N], ACC)[:, None]
            if PART == "window":
                start = tl.load(starts + first // QUERY_BLOCK)
                seen = (place >= start) & (place < start + width)
                weight = tl.where(seen[:, None], weight, float("-inf"))
            if PART == "causal":
                weight = tl.where(place[:, None] <= row[None, :], weight, float("-inf"))
            dk, dv = _collect(
                dk, dv, k, v, weight, rows, offs_m, mask_m, scale_log2, offs_d, HEAD_DIM,
                PRECISION, ACC,
            )  # fmt: skip

    dk = dk * scale
    index = ordered(k_order, place + hidden_zero(num_queries), mask_n, k_first, ORDERED)
    dk_ptrs = key_places(
        head_of(dk_ptr, pid_b, pid_g, dk_strides), head_of(dmk_ptr, pid_b, pid_g, dmk_strides),
        dk_strides, dmk_strides, index, len_m, offs_d, HAS_MEMORY,
    )  # fmt: skip
    dv_ptrs = key_places(
        head_of(dv_ptr, pid_b, pid_g, dv_strides), head_of(dmv_ptr, pid_b, pid_g, dmv_strides),
        dv_strides, dmv_strides, index, len_m, offs_d, HAS_MEMORY,
    )  # fmt: skip
    if HAS_MEMORY:
        if not NEEDS_MEMORY:
            mask_k = mask_k & (index >= len_m)[:, None]
    if ACCUMULATE:
        dk += tl.load(dk_ptrs, mask=mask_k, other=0.0)
        dv += tl.load(dv_ptrs, mask=mask_k, other=0.0)
    tl.store(dk_ptrs, dk.to(dk_ptr.dtype.element_ty), mask=mask_k)
    tl.store(dv_ptrs, dv.to(dv_ptr.dtype.element_ty), mask=mask_k)


def launch_backward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    memory_key: torch.Tensor | None,
    memory_value: torch.Tensor | None,
    choices: Choices,
    out: torch.Tensor,
    lse: torch.Tensor,
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    spec: Spec,
    scale: float,
    needs_memory: bool,
    chosen: tuple[Config | None, Config | None] = (None, None),
) -> list[torch.Tensor]:
    """[dq, dk, dv], and dmk, dmv behind them if needs_memory; `chosen` for tests and tuning."""
    batch, heads, length, head_dim = query.shape
    groups = key.shape[1]
    len_m = 0 if memory_key is None else memory_key.shape[2]
    memory = (memory_key, memory_value) if len_m else (key, value)
    found = levels(spec, length, key.shape[2], len_m)
    several = is_in_parts(found)
    delta = row_values(query)
    inputs = [query, key, value, *((memory_key, memory_value) if needs_memory else ())]
    grads = [like(t, delta.dtype if several else None) for t in inputs]
    if several:
        for grad in grads:
            grad.zero_()
    dq, dk, dv, *dm = grads
    dmk, dmv = dm if needs_memory and len_m else (dk, dv)
    dlse = lse if grad_lse is None else grad_lse
    parts = scale_parts(scale)
    tensors = (query, key, value, *memory, out, grad_out)
    query_config = chosen[0] or configs(QUERY, (*tensors, dq))[0]
    key_config = chosen[1] or configs(KEY, (*tensors, dk, dv, dmk, dmv))[0]
    strides = [t.stride() for t in (query, key, value, *memory)]
    all_means = launch_means(key, value, memory, len_m, choices, spec, length)
    for level in found:
        means, mean_rows = all_means.of(level)
        plan_tensors, rows = place_of(level, choices)
        common = {**part_of(level, spec), "HAS_MEMORY": len_m > 0, "QUERY_BLOCK": QUERY_BLOCK}
        sizes = (
            level.segments, level.step, level.q_begin, level.num_queries, level.q_end,
            level.k_begin, level.num_keys, level.k_end, level.width, level.num_residual,
        )  # fmt: skip
        tiles = triton.cdiv(level.num_queries, query_config.block_m)
        programs = batch * heads * level.segments * tiles
        weight_shape = batch * heads, 1, level.segments * level.num_blocks
        weights = rows_for(weight_shape, delta.dtype, query.device)
        rows = [*rows, weights.stride(0)]
        if programs:
            block_c, block_o = chunks(head_dim, query_config)
            _hyper_attention_bwd_query_kernel[(programs, triton.cdiv(head_dim, block_o))](
                query, key, value, *memory, *means, out, grad_out, lse, dlse, dq, delta, weights,
                *plan_tensors, *strides, out.stride(), grad_out.stride(), dq.stride(),
                lse.stride(), dlse.stride(), *rows, *mean_rows, parts,
                heads, heads // groups, len_m, *sizes, **common, ACCUMULATE=several,
                HAS_DLSE=grad_lse is not None, BLOCK_C=block_c, BLOCK_O=block_o,
                **launch_options(query, query_config),
            )  # fmt: skip

        programs = batch * groups * level.segments
        sums = delta
        if common["RESIDUAL"] != "none" and programs:
            slice_blocks = max(_SLICE_BLOCKS, triton.cdiv(level.num_blocks, _MOST_SLICES))
            slices = triton.cdiv(level.num_blocks, slice_blocks)
            residual_config = chosen[1] or configs(RESIDUAL, tensors)[0]
            shape = (slices, 2 * programs, level.num_residual, head_dim)
            sums = rows_for(shape, delta.dtype, query.device)
            tiles = triton.cdiv(level.num_residual, residual_config.block_n)
            _hyper_attention_bwd_residual_kernel[(slices * programs * tiles,)](
                query, key, value, *memory, *means, grad_out, lse, delta, sums, weights,
                *plan_tensors, *strides, grad_out.stride(), lse.stride(), *rows,
                *mean_rows, sums.stride(1), parts, groups, heads // groups, len_m, *sizes,
                slice_blocks, programs, **common, **launch_options(query, residual_config),
            )  # fmt: skip
            sums = torch.sum(sums, 0, out=rows_for(shape[1:], delta.dtype, query.device))
        tiles = programs * triton.cdiv(level.num_keys, key_config.block_n)
        if tiles:
            steps = max(level.num_blocks, level.num_residual).bit_length()
            _hyper_attention_bwd_key_kernel[(tiles,)](
                query, key, value, *memory, grad_out, lse, delta, sums, dk, dv, dmk, dmv,
                *plan_tensors[:4], *strides, grad_out.stride(), lse.stride(), dk.stride(),
                dv.stride(), dmk.stride(), dmv.stride(), *rows[:3], sums.stride(0), parts,
                groups, heads // groups, len_m, *sizes, steps, programs, **common,
                NEEDS_MEMORY=needs_memory, ACCUMULATE=several,
                **launch_options(query, key_config),
            )  # fmt: skip
    return [g.to(t.dtype) for g, t in zip(grads, inputs, strict=True)]


def aot_cases(everything: bool = False) -> Iterator[AotCase]:
    """What the launchers compile, with memory."""
    parts = ("sample", "mean", "tile", "causal")
    yield from aot_table("dq", _hyper_attention_bwd_query_kernel, QUERY, parts, everything)
    parts_of = ("sample", "tile", "mean")
    kernel = _hyper_attention_bwd_residual_kernel
    yield from aot_table("residual", kernel, RESIDUAL, parts_of, everything)
    # Where registers are scarcest, the other parts too.
    for kind, dtype in () if everything else (("any", "bf16"), ("wide", "fp32")):
        for part in parts_of[:2]:
            yield aot_case("residual", kernel, kind, dtype, 256, RESIDUAL[kind][256][0], part)
    yield from aot_table("dkv", _hyper_attention_bwd_key_kernel, KEY, parts, everything)
