# mypy: ignore-errors
"""Triton form of `xl_attention`: softmax attention over [memory, current], never concatenated.

    s_ij = scale q_i . k_j       j over memory, then over current keys (those not in the future)
    out_i = sum_j p_ij v_j       p_ij = exp(s_ij - lse_i),   lse_i = log sum_j exp(s_ij)

With D_i = dout_i . out_i - dlse_i and ds_ij = p_ij (dout_i . v_j - D_i):

    dq_i = scale sum_j ds_ij k_j     dk_j = scale sum_i ds_ij q_i     dv_j = sum_i p_ij dout_i

(Dao et al. 2022, algorithms 1 and 4; the lse gradient only shifts D.) Forward and dq: a program
owns BLOCK_M queries of one head and walks over the keys of memory, then over the current ones, with
one online softmax. dk, dv: a program owns BLOCK_N keys of a key head and walks over the queries of
its group; launched once for current keys, and once for memory if its gradient is wanted. So each
gradient has one writer and nothing is atomic. Kept for backward: out and lse (fp32, natural log).
Scores and sums are fp32 (fp64 for fp64); p and ds are rounded to the inputs' dtype for products.
"""

from collections.abc import Iterator

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
    launch_options,
    of_tables,
    online_softmax,
    row_values,
    scale_of,
    scale_parts,
)
from .._tiles import offset, split

# Chosen by reading the code that comes out (no spills, shared memory within sm_80's limit), not yet
# by measurement: the first of each is shipped. Keyed by the head dim up to which they hold.
# fast: 16-bit tensors whose rows are copied 16 bytes at a time; at least 16 rows a warp, or wgmma
# would split tiles between warps along the head dim. ampere: the same on sm_80, whose operands take
# registers. any: 16 bits, any strides. wide: fp32 (IEEE) and fp64. tf32: fp32 with TF32 products,
# up to head dim 128, beyond which they spill.
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
        128: (Config(32, 16, 8, 1),),
        256: (Config(32, 16, 8, 1),),
    },
    "wide": {
        64: (Config(32, 16, 8, 1),),
        128: (Config(16, 16, 8, 1),),
        256: (Config(16, 16, 8, 1),),
    },
    "tf32": {
        64: (Config(32, 32, 8, 1),),
        128: (Config(16, 16, 8, 1),),
    },
}
QUERY = {
    "fast": {
        64: (Config(128, 64, 8, 3), Config(64, 64, 4, 3)),
        128: (Config(128, 32, 8, 3), Config(128, 32, 8, 2)),
        256: (Config(64, 16, 8, 2),),
    },
    "ampere": {
        64: (Config(64, 32, 4, 2),),
        128: (Config(32, 32, 8, 2),),
        256: (Config(32, 16, 8, 2),),
    },
    "any": {
        64: (Config(64, 32, 8, 1),),
        128: (Config(32, 16, 8, 1),),
        256: (Config(16, 16, 8, 1),),
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
        # A second buffer of queries would spill.
        256: (Config(16, 64, 8, 1),),
    },
    "ampere": {
        64: (Config(16, 64, 4, 2),),
        128: (Config(32, 32, 8, 2),),
        256: (Config(16, 32, 8, 2),),
    },
    "any": {
        64: (Config(32, 64, 8, 1),),
        128: (Config(32, 16, 8, 1),),
        256: (Config(16, 32, 8, 1),),
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


@triton.jit
def _places(tile, offs_d, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Pointers `[rows, len(offs_d)]` of a tile and their mask.

    A tile is (pointer to the head, first row, strides of rows and columns, rows from there on, mask
    of rows); BLOCK_D is where its columns end.
    """
    ptr, first, strides, row, mask_row = tile
    ptrs = ptr + offset(first, strides[0]) + offset(row, strides[0])[:, None]
    ptrs += offset(offs_d, strides[1])[None, :]
    mask = mask_row[:, None]
    if HEAD_DIM != BLOCK_D:
        mask = mask & (offs_d < HEAD_DIM)[None, :]
    return ptrs, mask


@triton.jit
def _load(tile, offs_d, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of a tile, 0 past its mask and the head dim."""
    ptrs, mask = _places(tile, offs_d, HEAD_DIM, BLOCK_D)
    return tl.load(ptrs, mask=mask, other=0.0)


@triton.jit
def _store(tile, value, offs_d, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Writes the rows of a tile where its mask holds."""
    ptrs, mask = _places(tile, offs_d, HEAD_DIM, BLOCK_D)
    tl.store(ptrs, value.to(ptrs.dtype.element_ty), mask=mask)


@triton.jit
def _products(
    a_tile, b_tile, M: tl.constexpr, N: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_C: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """a b^T `[M, N]` of two tiles, BLOCK_C columns at a time.

    Without tensor cores a thread of a dot holds whole rows; wide ones do not fit in registers.
    """
    total = tl.zeros([M, N], ACC)
    last: tl.constexpr = (HEAD_DIM + BLOCK_C - 1) // BLOCK_C * BLOCK_C
    for column in tl.range(0, HEAD_DIM, BLOCK_C, disable_licm=True):
        offs_c = column + tl.arange(0, BLOCK_C)
        a = _load(a_tile, offs_c, HEAD_DIM, last)
        b = _load(b_tile, offs_c, HEAD_DIM, last)
        total = tl.dot(a, tl.trans(b), total, input_precision=PRECISION, out_dtype=ACC)
    return total


@triton.jit
def _visible(offs_m, offs_n, length, shift, IS_CAUSAL: tl.constexpr):
    """[queries, keys] that take part: keys inside `length`, and none in the future if causal."""
    mask = offs_n[None, :] < length
    if IS_CAUSAL:
        mask = mask & (offs_n[None, :] <= offs_m[:, None] + shift)
    return mask


@triton.jit
def _attend(
    acc, row_max, row_sum, q, k_ptr, v_ptr, k_strides, v_strides, begin, end, length, scale_log2,
    offs_m, offs_d, shift, MASKED: tl.constexpr, IS_CAUSAL: tl.constexpr, BLOCK_N: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Online softmax of a query tile over keys [begin, end) in blocks of BLOCK_N."""
    offs_n = tl.arange(0, BLOCK_N)
    for first in tl.range(begin, end, BLOCK_N, disable_licm=True):
        mask_n = first + offs_n < length
        k = _load((k_ptr, first, k_strides, offs_n, mask_n), offs_d, HEAD_DIM, BLOCK_D)
        v = _load((v_ptr, first, v_strides, offs_n, mask_n), offs_d, HEAD_DIM, BLOCK_D)
        score = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=ACC) * scale_log2
        if MASKED:
            seen = _visible(offs_m, first + offs_n, length, shift, IS_CAUSAL)
            score = tl.where(seen, score, float("-inf"))
        acc, row_max, row_sum = online_softmax(
            acc, row_max, row_sum, score, v, MASKED, PRECISION, ACC
        )
    return acc, row_max, row_sum


@triton.jit
def _xl_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, mk_ptr, mv_ptr, out_ptr, lse_ptr,
    q_strides, k_strides, v_strides, mk_strides, mv_strides, out_strides, lse_strides,
    scale_parts, num_heads, group, len_q, len_k, len_m,
    IS_CAUSAL: tl.constexpr, HAS_MEMORY: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """out `[B, H, L, D]` and lse `[B, H, L]` of BLOCK_M queries of one head."""
    blocks = tl.cdiv(len_q, BLOCK_M)
    pid_bh, pid_m = split(tl.program_id(0), blocks)
    if IS_CAUSAL:
        # The longest rows first, so that no long program ends the launch.
        pid_m = blocks - 1 - pid_m
    pid_b, pid_h = split(pid_bh, num_heads)
    pid_g = pid_h // group
    first = pid_m * BLOCK_M
    row = tl.arange(0, BLOCK_M)
    offs_m = first + row
    offs_d = tl.arange(0, BLOCK_D)
    mask_m = offs_m < len_q
    scale_log2 = scale_of(scale_parts, ACC) * LOG2E

    q_base = head_of(q_ptr, pid_b, pid_h, q_strides)
    q = _load((q_base, first, q_strides[2:], row, mask_m), offs_d, HEAD_DIM, BLOCK_D)
    acc = tl.zeros([BLOCK_M, BLOCK_D], ACC)
    row_max = tl.full([BLOCK_M], float("-inf"), ACC)
    row_sum = tl.zeros([BLOCK_M], ACC)

    if HAS_MEMORY:
        mk_base = head_of(mk_ptr, pid_b, pid_g, mk_strides)
        mv_base = head_of(mv_ptr, pid_b, pid_g, mv_strides)
        whole = len_m // BLOCK_N * BLOCK_N
        acc, row_max, row_sum = _attend(
            acc, row_max, row_sum, q, mk_base, mv_base, mk_strides[2:], mv_strides[2:], 0, whole,
            len_m, scale_log2, offs_m, offs_d, 0, False, False, BLOCK_N, HEAD_DIM, BLOCK_D,
            PRECISION, ACC,
        )  # fmt: skip
        acc, row_max, row_sum = _attend(
            acc, row_max, row_sum, q, mk_base, mv_base, mk_strides[2:], mv_strides[2:], whole,
            len_m, len_m, scale_log2, offs_m, offs_d, 0, True, False, BLOCK_N, HEAD_DIM, BLOCK_D,
            PRECISION, ACC,
        )  # fmt: skip

    k_base = head_of(k_ptr, pid_b, pid_g, k_strides)
    v_base = head_of(v_ptr, pid_b, pid_g, v_strides)
    shift = len_k - len_q
    whole, last = len_k, len_k
    if IS_CAUSAL:  # keys that the first row sees, and those that the last one does
        whole = tl.minimum(tl.maximum(first + shift + 1, 0), len_k)
        last = tl.minimum(tl.maximum(first + BLOCK_M + shift, 0), len_k)
    whole = whole // BLOCK_N * BLOCK_N
    acc, row_max, row_sum = _attend(
        acc, row_max, row_sum, q, k_base, v_base, k_strides[2:], v_strides[2:], 0, whole, len_k,
        scale_log2, offs_m, offs_d, shift, False, False, BLOCK_N, HEAD_DIM, BLOCK_D, PRECISION, ACC,
    )  # fmt: skip
    acc, row_max, row_sum = _attend(
        acc, row_max, row_sum, q, k_base, v_base, k_strides[2:], v_strides[2:], whole, last, len_k,
        scale_log2, offs_m, offs_d, shift, True, IS_CAUSAL, BLOCK_N, HEAD_DIM, BLOCK_D, PRECISION,
        ACC,
    )  # fmt: skip

    # A row without keys gives 0 and an lse of -inf.
    acc = acc / tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]
    lse = (row_max + tl.log2(row_sum)) * LN2
    lse = tl.where(row_sum == 0.0, float("-inf"), lse)
    out_base = head_of(out_ptr, pid_b, pid_h, out_strides)
    out_tile = (out_base, first, out_strides[2:], row, mask_m)
    _store(out_tile, acc, offs_d, HEAD_DIM, BLOCK_D)
    lse_ptrs = head_of(lse_ptr, pid_b, pid_h, lse_strides) + offset(offs_m, lse_strides[2])
    tl.store(lse_ptrs, lse, mask=mask_m)


@triton.jit
def _attend_bwd(
    dq, q, do, q_tile, do_tile, lse_log2, delta, k_ptr, v_ptr, k_strides, v_strides, begin, end,
    length, scale_log2, offs_m, offs_d, shift, MASKED: tl.constexpr, IS_CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Adds ds k over keys [begin, end) to dq."""
    offs_n = tl.arange(0, BLOCK_N)
    # Hoisted addresses would not fit in registers beside three tiles.
    for first in tl.range(begin, end, BLOCK_N, disable_licm=True):
        mask_n = first + offs_n < length
        k_tile = (k_ptr, first, k_strides, offs_n, mask_n)
        v_tile = (v_ptr, first, v_strides, offs_n, mask_n)
        k = _load(k_tile, offs_d, HEAD_DIM, BLOCK_D)
        if BLOCK_C == BLOCK_D:
            v = _load(v_tile, offs_d, HEAD_DIM, BLOCK_D)
            score = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=ACC)
            dp = tl.dot(do, tl.trans(v), input_precision=PRECISION, out_dtype=ACC)
        else:
            score = _products(q_tile, k_tile, BLOCK_M, BLOCK_N, HEAD_DIM, BLOCK_C, PRECISION, ACC)
            dp = _products(do_tile, v_tile, BLOCK_M, BLOCK_N, HEAD_DIM, BLOCK_C, PRECISION, ACC)
        p = tl.exp2(score * scale_log2 - lse_log2[:, None])
        if MASKED:
            p = tl.where(_visible(offs_m, first + offs_n, length, shift, IS_CAUSAL), p, 0.0)
        ds = (p * (dp - delta[:, None])).to(k.dtype)
        dq = tl.dot(ds, k, dq, input_precision=PRECISION, out_dtype=ACC)
    return dq


@triton.jit
def _xl_attention_bwd_query_kernel(
    q_ptr, k_ptr, v_ptr, mk_ptr, mv_ptr, out_ptr, do_ptr, lse_ptr, dlse_ptr, dq_ptr, delta_ptr,
    q_strides, k_strides, v_strides, mk_strides, mv_strides, out_strides, do_strides, dq_strides,
    lse_strides, dlse_strides, scale_parts, num_heads, group, len_q, len_k, len_m,
    IS_CAUSAL: tl.constexpr, HAS_MEMORY: tl.constexpr,
    HAS_DLSE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dq of BLOCK_M queries of one head, and D `[B, H, L]` for the kernel of dk and dv."""
    blocks = tl.cdiv(len_q, BLOCK_M)
    pid_bh, pid_m = split(tl.program_id(0), blocks)
    if IS_CAUSAL:
        pid_m = blocks - 1 - pid_m
    pid_b, pid_h = split(pid_bh, num_heads)
    pid_g = pid_h // group
    first = pid_m * BLOCK_M
    row = tl.arange(0, BLOCK_M)
    offs_m = first + row
    offs_d = tl.arange(0, BLOCK_D)
    mask_m = offs_m < len_q
    scale = scale_of(scale_parts, ACC)
    scale_log2 = scale * LOG2E

    q_base = head_of(q_ptr, pid_b, pid_h, q_strides)
    out_base = head_of(out_ptr, pid_b, pid_h, out_strides)
    do_base = head_of(do_ptr, pid_b, pid_h, do_strides)
    do_tile = (do_base, first, do_strides[2:], row, mask_m)
    do = _load(do_tile, offs_d, HEAD_DIM, BLOCK_D)
    out_tile = (out_base, first, out_strides[2:], row, mask_m)
    out = _load(out_tile, offs_d, HEAD_DIM, BLOCK_D)
    delta = tl.sum(do.to(ACC) * out.to(ACC), 1)
    if HAS_DLSE:
        dlse_ptrs = head_of(dlse_ptr, pid_b, pid_h, dlse_strides) + offset(offs_m, dlse_strides[2])
        delta -= tl.load(dlse_ptrs, mask=mask_m, other=0.0)
    delta_ptrs = head_of(delta_ptr, pid_b, pid_h, lse_strides) + offset(offs_m, lse_strides[2])
    tl.store(delta_ptrs, delta, mask=mask_m)
    lse_ptrs = head_of(lse_ptr, pid_b, pid_h, lse_strides) + offset(offs_m, lse_strides[2])
    lse_log2 = tl.load(lse_ptrs, mask=mask_m, other=0.0) * LOG2E
    # A row without keys has lse = -inf and no p but 0.
    lse_log2 = tl.where(lse_log2 == float("-inf"), 0.0, lse_log2)
    q_tile = (q_base, first, q_strides[2:], row, mask_m)
    q = _load(q_tile, offs_d, HEAD_DIM, BLOCK_D) if BLOCK_C == BLOCK_D else None
    dq = tl.zeros([BLOCK_M, BLOCK_D], ACC)

    if HAS_MEMORY:
        mk_base = head_of(mk_ptr, pid_b, pid_g, mk_strides)
        mv_base = head_of(mv_ptr, pid_b, pid_g, mv_strides)
        whole = len_m // BLOCK_N * BLOCK_N
        dq = _attend_bwd(
            dq, q, do, q_tile, do_tile, lse_log2, delta, mk_base, mv_base, mk_strides[2:],
            mv_strides[2:], 0, whole, len_m, scale_log2, offs_m, offs_d, 0, False, False, BLOCK_M,
            BLOCK_N, HEAD_DIM, BLOCK_D, BLOCK_C, PRECISION, ACC,
        )  # fmt: skip
        dq = _attend_bwd(
            dq, q, do, q_tile, do_tile, lse_log2, delta, mk_base, mv_base, mk_strides[2:],
            mv_strides[2:], whole, len_m, len_m, scale_log2, offs_m, offs_d, 0, True, False,
            BLOCK_M, BLOCK_N, HEAD_DIM, BLOCK_D, BLOCK_C, PRECISION, ACC,
        )  # fmt: skip

    k_base = head_of(k_ptr, pid_b, pid_g, k_strides)
    v_base = head_of(v_ptr, pid_b, pid_g, v_strides)
    shift = len_k - len_q
    whole, last = len_k, len_k
    if IS_CAUSAL:
        whole = tl.minimum(tl.maximum(first + shift + 1, 0), len_k)
        last = tl.minimum(tl.maximum(first + BLOCK_M + shift, 0), len_k)
    whole = whole // BLOCK_N * BLOCK_N
    dq = _attend_bwd(
        dq, q, do, q_tile, do_tile, lse_log2, delta, k_base, v_base, k_strides[2:], v_strides[2:],
        0, whole, len_k, scale_log2, offs_m, offs_d, shift, False, False, BLOCK_M, BLOCK_N,
        HEAD_DIM, BLOCK_D, BLOCK_C, PRECISION, ACC,
    )  # fmt: skip
    dq = _attend_bwd(
        dq, q, do, q_tile, do_tile, lse_log2, delta, k_base, v_base, k_strides[2:], v_strides[2:],
        whole, last, len_k, scale_log2, offs_m, offs_d, shift, True, IS_CAUSAL, BLOCK_M, BLOCK_N,
        HEAD_DIM, BLOCK_D, BLOCK_C, PRECISION, ACC,
    )  # fmt: skip

    dq = dq * scale
    dq_base = head_of(dq_ptr, pid_b, pid_h, dq_strides)
    _store((dq_base, first, dq_strides[2:], row, mask_m), dq, offs_d, HEAD_DIM, BLOCK_D)


@triton.jit
def _collect(
    dk, dv, k, v, q_ptr, do_ptr, lse_ptr, delta_ptr, q_strides, do_strides, lse_stride, begin,
    length, scale_log2, offs_n, offs_d, shift, IS_CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Adds ds^T q and p^T dout over queries [begin, length) to dk and dv.

    p and ds are computed transposed, [keys, queries]: a transposed accumulator as the left side of
    a dot is miscompiled on Hopper before Triton 3.7.1.
    """
    row = tl.arange(0, BLOCK_M)
    for first in tl.range(begin, length, BLOCK_M, disable_licm=True):
        offs_m = first + row
        mask_m = offs_m < length
        # Rows past the end are 0 in q, dout, lse and D: their p is 1, and adds 0 to dk and dv.
        q = _load((q_ptr, first, q_strides, row, mask_m), offs_d, HEAD_DIM, BLOCK_D)
        do = _load((do_ptr, first, do_strides, row, mask_m), offs_d, HEAD_DIM, BLOCK_D)
        place = offset(offs_m, lse_stride)
        lse_log2 = tl.load(lse_ptr + place, mask=mask_m, other=0.0) * LOG2E
        lse_log2 = tl.where(lse_log2 == float("-inf"), 0.0, lse_log2)
        delta = tl.load(delta_ptr + place, mask=mask_m, other=0.0)
        score = tl.dot(k, tl.trans(q), input_precision=PRECISION, out_dtype=ACC) * scale_log2
        p = tl.exp2(score - lse_log2[None, :])  # [BLOCK_N, BLOCK_M]
        if IS_CAUSAL:
            p = tl.where(offs_n[:, None] <= offs_m[None, :] + shift, p, 0.0)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION, out_dtype=ACC)
        dp = tl.dot(v, tl.trans(do), input_precision=PRECISION, out_dtype=ACC)
        ds = (p * (dp - delta[None, :])).to(q.dtype)
        dk = tl.dot(ds, q, dk, input_precision=PRECISION, out_dtype=ACC)
    return dk, dv


@triton.jit
def _xl_attention_bwd_key_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    q_strides, k_strides, v_strides, do_strides, dk_strides, dv_strides, lse_strides,
    scale_parts, num_key_heads, group, len_q, len_k,
    IS_CAUSAL: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dk and dv of BLOCK_N keys of one key head, over all queries of its group."""
    pid_bg, pid_n = split(tl.program_id(0), tl.cdiv(len_k, BLOCK_N))
    pid_b, pid_g = split(pid_bg, num_key_heads)
    first = pid_n * BLOCK_N
    row = tl.arange(0, BLOCK_N)
    offs_n = first + row
    offs_d = tl.arange(0, BLOCK_D)
    mask_n = offs_n < len_k
    scale = scale_of(scale_parts, ACC)
    scale_log2 = scale * LOG2E
    shift = len_k - len_q

    k_base = head_of(k_ptr, pid_b, pid_g, k_strides)
    v_base = head_of(v_ptr, pid_b, pid_g, v_strides)
    dk = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    dv = tl.zeros([BLOCK_N, BLOCK_D], ACC)

    begin = 0
    if IS_CAUSAL:  # the block of the first query that sees the first key
        begin = tl.minimum(tl.maximum(first - shift, 0), len_q) // BLOCK_M * BLOCK_M
    # Not hoisted, k and v included: addresses kept for the stores would not fit in registers.
    for member in tl.range(0, group, disable_licm=True):
        k = _load((k_base, first, k_strides[2:], row, mask_n), offs_d, HEAD_DIM, BLOCK_D)
        v = _load((v_base, first, v_strides[2:], row, mask_n), offs_d, HEAD_DIM, BLOCK_D)
        pid_h = pid_g * group + member
        q_base = head_of(q_ptr, pid_b, pid_h, q_strides)
        do_base = head_of(do_ptr, pid_b, pid_h, do_strides)
        lse_base = head_of(lse_ptr, pid_b, pid_h, lse_strides)
        delta_base = head_of(delta_ptr, pid_b, pid_h, lse_strides)
        dk, dv = _collect(
            dk, dv, k, v, q_base, do_base, lse_base, delta_base, q_strides[2:], do_strides[2:],
            lse_strides[2], begin, len_q, scale_log2, offs_n, offs_d, shift, IS_CAUSAL, BLOCK_M,
            HEAD_DIM, BLOCK_D, PRECISION, ACC,
        )  # fmt: skip

    dk_base = head_of(dk_ptr, pid_b, pid_g, dk_strides)
    dv_base = head_of(dv_ptr, pid_b, pid_g, dv_strides)
    dk_tile = (dk_base, first, dk_strides[2:], row, mask_n)
    dv_tile = (dv_base, first, dv_strides[2:], row, mask_n)
    _store(dk_tile, dk * scale, offs_d, HEAD_DIM, BLOCK_D)
    _store(dv_tile, dv, offs_d, HEAD_DIM, BLOCK_D)


# Results, in functions of their own so that a test can put them elsewhere.
def _like(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(tensor)


def launch_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    memory_key: torch.Tensor | None,
    memory_value: torch.Tensor | None,
    scale: float,
    is_causal: bool,
    config: Config | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out `[B, H, L, D]`, lse `[B, H, L]`)."""
    batch, heads, length, _ = query.shape
    out, lse = _like(query), row_values(query)
    has_memory = memory_key is not None and memory_key.shape[2] > 0
    mk, mv = (memory_key, memory_value) if has_memory else (key, value)
    config = config or configs(FORWARD, (query, key, value, mk, mv, out))[0]
    programs = batch * heads * triton.cdiv(length, config.block_m)
    if programs:
        _xl_attention_fwd_kernel[(programs,)](
            query, key, value, mk, mv, out, lse,
            query.stride(), key.stride(), value.stride(), mk.stride(), mv.stride(), out.stride(),
            lse.stride(), scale_parts(scale), heads, heads // key.shape[1], length, key.shape[2],
            mk.shape[2],
            IS_CAUSAL=is_causal, HAS_MEMORY=has_memory, **launch_options(query, config),
        )  # fmt: skip
    return out, lse


def launch_backward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    memory_key: torch.Tensor | None,
    memory_value: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    scale: float,
    is_causal: bool,
    needs_memory: bool,
    query_config: Config | None = None,
    key_config: Config | None = None,
) -> list[torch.Tensor]:
    """[dq, dk, dv], and dmk, dmv behind them if needs_memory."""
    batch, heads, length, _ = query.shape
    key_heads, group = key.shape[1], heads // key.shape[1]
    dq, delta = _like(query), row_values(query)
    dlse = lse if grad_lse is None else grad_lse
    has_memory = memory_key is not None and memory_key.shape[2] > 0
    mk, mv = (memory_key, memory_value) if has_memory else (key, value)
    tensors = (query, key, value, mk, mv, out, grad_out, dq)
    query_config = query_config or configs(QUERY, tensors)[0]
    programs = batch * heads * triton.cdiv(length, query_config.block_m)
    if programs:
        _xl_attention_bwd_query_kernel[(programs,)](
            query, key, value, mk, mv, out, grad_out, lse, dlse, dq, delta,
            query.stride(), key.stride(), value.stride(), mk.stride(), mv.stride(), out.stride(),
            grad_out.stride(), dq.stride(), lse.stride(), dlse.stride(),
            scale_parts(scale), heads, group, length, key.shape[2], mk.shape[2],
            IS_CAUSAL=is_causal, HAS_MEMORY=has_memory, HAS_DLSE=grad_lse is not None,
            BLOCK_C=columns(query.shape[-1], query_config),
            **launch_options(query, query_config),
        )  # fmt: skip

    def keys(k: torch.Tensor, v: torch.Tensor, causal: bool) -> tuple[torch.Tensor, torch.Tensor]:
        dk, dv = _like(k), _like(v)
        config = key_config or configs(KEY, (query, k, v, grad_out, dk, dv))[0]
        programs = batch * key_heads * triton.cdiv(k.shape[2], config.block_n)
        if programs:
            _xl_attention_bwd_key_kernel[(programs,)](
                query, k, v, grad_out, lse, delta, dk, dv,
                query.stride(), k.stride(), v.stride(), grad_out.stride(), dk.stride(), dv.stride(),
                lse.stride(), scale_parts(scale), key_heads, group, length, k.shape[2],
                IS_CAUSAL=causal, **launch_options(query, config),
            )  # fmt: skip
        return dk, dv

    grads = [dq, *keys(key, value, is_causal)]
    return [*grads, *keys(memory_key, memory_value, False)] if needs_memory else grads


def aot_cases(everything: bool = False) -> Iterator[AotCase]:
    """What the launchers compile, with memory: every config, causal or not.

    everything: of every config both 16-bit types, a head dim in its middle, and both masks.
    """
    heads_first = ("i64", "i64", "i32", 1)
    inputs, sizes = ("q", "k", "v", "mk", "mv"), ("len_q", "len_k", "len_m")
    # The kernel, its tables, tensors [B, H, L, D], tensors [B, H, L], and integers.
    forms = {
        "fwd": (
            _xl_attention_fwd_kernel,
            FORWARD,
            (*inputs, "out"),
            ("lse",),
            ("num_heads", "group", *sizes),
        ),
        "dq": (
            _xl_attention_bwd_query_kernel,
            QUERY,
            (*inputs, "out", "do", "dq"),
            ("lse", "dlse", "delta"),
            ("num_heads", "group", *sizes),
        ),
        "dkv": (
            _xl_attention_bwd_key_kernel,
            KEY,
            ("q", "k", "v", "do", "dk", "dv"),
            ("lse", "delta"),
            ("num_key_heads", "group", *sizes[:2]),
        ),
    }
    flags = {"fwd": {"HAS_MEMORY": True}, "dq": {"HAS_MEMORY": True, "HAS_DLSE": True}, "dkv": {}}

    # What the launchers tell apart.
    variants = {"fast": ("aligned",), "ampere": ("aligned",), "any": ("unaligned",)}
    archs = {"fast": (90, 100), "ampere": (80,)}

    def case(
        form: str, kind: str, dtype: str, head_dim: int, config: Config, is_causal: bool
    ) -> AotCase:
        kernel, _, tensors, rows, integers = forms[form]
        element = "fp32" if kind in ("wide", "tf32") else dtype
        tile = f"{config.block_m}x{config.block_n}x{config.num_warps}x{config.num_stages}"
        return AotCase(
            name=f"{form}-{kind}-{element}-d{head_dim}-{tile}{'-causal' if is_causal else ''}",
            kernel=kernel,
            signature={
                **{f"{t}_ptr": f"*{element}" for t in tensors},
                **{f"{t}_ptr": "*fp32" for t in rows},
                **{f"{t}_strides": heads_first for t in tensors},
                # D has the strides of lse.
                **{f"{t}_strides": ("i32", "i32", 1) for t in rows if t != "delta"},
                **dict.fromkeys(integers, "i32"),
                "scale_parts": ("fp32", "fp32"),
            },
            constexprs={
                "IS_CAUSAL": is_causal,
                "HEAD_DIM": head_dim,
                "BLOCK_D": triton.next_power_of_2(head_dim),
                "BLOCK_M": config.block_m,
                "BLOCK_N": config.block_n,
                "PRECISION": "tf32" if dtype == "tf32" else "ieee",
                "ACC": tl.float32,
                **flags[form],
                **({"BLOCK_C": columns(head_dim, config)} if form == "dq" else {}),
            },
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            maxnreg=MAX_REGISTERS,
            has_dots=dtype != "fp32",
            pipelined=config.num_stages > 1,
            variants=variants.get(kind, ("aligned", "unaligned")),
            archs=archs.get(kind, ARCHS),
        )

    for form, (_, table, *_) in forms.items():
        if everything:
            for kind, dtype, head_dim, config in of_tables(table):
                for is_causal in (False, True):
                    yield case(form, kind, dtype, head_dim, config, is_causal)
            continue
        for most, found in table["fast"].items():
            for config in found:
                yield case(form, "fast", "bf16", most, config, True)
            yield case(form, "fast", "bf16", most, found[0], False)
        yield case(form, "fast", "fp16", 80, table["fast"][128][0], True)
        yield case(form, "ampere", "fp16", 80, table["ampere"][128][0], True)
        for most, (config, *_) in table["ampere"].items():
            yield case(form, "ampere", "bf16", most, config, True)
        for most, (config, *_) in table["any"].items():
            yield case(form, "any", "bf16", most, config, True)
        for most, (config, *_) in table["wide"].items():
            yield case(form, "wide", "fp32", most, config, True)
        for most, (config, *_) in table["tf32"].items():
            yield case(form, "tf32", "tf32", most, config, True)
