# mypy: ignore-errors
"""Triton form of `selective_scan`: Mamba's recurrence (Gu and Dao 2023, algorithm 2).

    d_t = softplus(delta_t + bias)         a_t = exp(d_t A)
    h_t = a_t h_{t-1} + d_t u_t B_t        out_t = (C_t . h_t + D u_t) silu(z_t)

Backward, with dy_t = dout_t silu(z_t): the state's gradient runs from the last token to the first,
g_t = dy_t C_t + a_{t+1} g_{t+1}, and

    dB_t = sum_d g_t d_t u_t       du_t = d_t (g_t . B_t) + D dy_t       w_t = g_t a_t h_{t-1}
    dC_t = sum_d dy_t h_t          dd_t = u_t (g_t . B_t) + A . w_t      dA = sum_t d_t w_t

A program owns a tile of channels of one batch item and walks over a segment of the tokens with the
states in registers. One segment is enough where batch and channels fill the GPU. Else there are
several: one launch walks over each from a zero state, one carries the states from segment to
segment, and then each is walked over from its true state; backward likewise, in reverse. Kept for
backward: the state at the start of each chunk of tokens. Everything inside is fp32 (fp64
for fp64). dB and dC are sums over channels, dA, dD and dbias over tokens and batch: programs write
their parts, and a sum of its own adds them up, so that nothing is atomic.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import torch
import triton
import triton.language as tl

from .._aot import ARCHS, AotCase
from .._tiles import offset, split
from .ops import CHUNK

LOG2E = tl.constexpr(1.4426950408889634)
CARRY_CHANNELS = 8
# All that a thread can have: without the number ptxas spills a few for more threads at a time.
MAX_REGISTERS = 255


@dataclass(frozen=True)
class Config:
    """A warp owns `channels` channels, and takes `tokens` of them at a time from memory."""

    channels: int
    tokens: int


# Chosen by reading the code that comes out (no spills), not yet by measurement. With 32 channels a
# thread holds all states of one, and sums over states need no shuffle. Keyed by the N up to which
# they hold.
FORWARD = {
    16: (Config(32, 4),),
    32: (Config(16, 2),),
    64: (Config(8, 2),),
}
BACKWARD = {
    16: (Config(16, 2),),
    32: (Config(4, 2),),
    64: (Config(4, 1),),
}
# For tensors whose rows are not copied 16 bytes at a time: their addresses take registers, and more
# tokens at a time would save no loads.
BACKWARD_ANY = {
    16: (Config(4, 2),),
    32: (Config(4, 1),),
    64: (Config(2, 1),),
}


@triton.jit
def _softplus(x):
    """log(1 + exp(x)), to a few roundings also where it is tiny."""
    y = tl.exp(-tl.abs(x))
    w = 1.0 + y
    # log(w) y / (w - 1) undoes the rounding of 1 + y.
    log1p = tl.where(w == 1.0, y, tl.log(w) * (y / tl.where(w == 1.0, 1.0, w - 1.0)))
    return tl.maximum(x, 0.0) + log1p


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _columns(tile, X: tl.constexpr, SHAPE: tl.constexpr, LOG_T: tl.constexpr):
    """The tokens of a tile `[X, T]` one by one, each in SHAPE.

    No instruction where a thread holds all tokens of a row.
    """
    parts = (tile,)
    for j in tl.static_range(LOG_T):
        evens, odds = (), ()
        for k in tl.static_range(1 << j):
            even, odd = tl.split(tl.reshape(parts[k], [X, 1 << (LOG_T - j - 1), 2]))
            evens, odds = evens + (even,), odds + (odd,)  # noqa: RUF005 (Triton has no star)
        parts = evens + odds  # part k holds the tokens whose last j + 1 bits are k
    columns = ()
    for k in tl.static_range(1 << LOG_T):
        columns = columns + (tl.reshape(parts[k], SHAPE),)  # noqa: RUF005
    return columns


@triton.jit
def _tile_of(pid_b, pid_t, group_dim, BLOCK_D: tl.constexpr):
    """(group, place) of a channel tile; a place is (batch item, first channel, offsets, mask)."""
    pid_g, tile = split(pid_t, tl.cdiv(group_dim, BLOCK_D))
    offs_d = tl.arange(0, BLOCK_D)
    first = tile * BLOCK_D
    return pid_g, (pid_b, pid_g * group_dim + first, offs_d, first + offs_d < group_dim)


@triton.jit
def _channel_ptrs(ptr, strides, place, first, mask_t, T: tl.constexpr):
    """Pointers `[BLOCK_D, T]` to tokens [first, first + T) of `[B, D, L]`, and their mask."""
    pid_b, channel, offs_d, mask_d = place
    base = ptr + offset(pid_b, strides[0]) + offset(channel, strides[1]) + offset(first, strides[2])
    ptrs = base + offset(offs_d, strides[1])[:, None]
    ptrs += offset(tl.arange(0, T), strides[2])[None, :]
    return ptrs, mask_d[:, None] & mask_t[None, :]


@triton.jit
def _load_channels(ptr, strides, place, first, mask_t, T: tl.constexpr, ACC: tl.constexpr):
    ptrs, mask = _channel_ptrs(ptr, strides, place, first, mask_t, T)
    return tl.load(ptrs, mask=mask, other=0.0).to(ACC)


@triton.jit
def _store_channels(ptr, strides, place, first, mask_t, value, T: tl.constexpr):
    ptrs, mask = _channel_ptrs(ptr, strides, place, first, mask_t, T)
    tl.store(ptrs, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _load_projection(
    ptr, strides, pid_b, pid_g, states, first, mask_t, N: tl.constexpr, T: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Tokens [first, first + T) of `[B, G, N, L]` for one group, `[N, T]`."""
    offs_n = tl.arange(0, N)
    base = ptr + offset(pid_b, strides[0]) + offset(pid_g, strides[1]) + offset(first, strides[3])
    ptrs = base + offset(offs_n, strides[2])[:, None]
    ptrs += offset(tl.arange(0, T), strides[3])[None, :]
    mask = (offs_n < states)[:, None] & mask_t[None, :]
    return tl.load(ptrs, mask=mask, other=0.0).to(ACC)


@triton.jit
def _state_ptrs(ptr, strides, row, place, states, N: tl.constexpr):
    """Pointers `[N, BLOCK_D]` into `[B, rows, N, D]`, and their mask."""
    pid_b, channel, offs_d, mask_d = place
    offs_n = tl.arange(0, N)
    base = ptr + offset(pid_b, strides[0]) + offset(row, strides[1]) + offset(channel, strides[3])
    ptrs = base + offset(offs_n, strides[2])[:, None] + offset(offs_d, strides[3])[None, :]
    return ptrs, (offs_n < states)[:, None] & mask_d[None, :]


@triton.jit
def _load_state(
    ptr, strides, row, place, states, HAS: tl.constexpr, N: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """A tile of states; zero if there are none."""
    ptrs, mask = _state_ptrs(ptr, strides, row, place, states, N)
    if HAS:
        state = tl.load(ptrs, mask=mask, other=0.0).to(ACC)
    else:
        state = tl.zeros(mask.shape, ACC)
    return state


@triton.jit
def _store_state(ptr, strides, row, place, states, value, N: tl.constexpr):
    ptrs, mask = _state_ptrs(ptr, strides, row, place, states, N)
    tl.store(ptrs, value, mask=mask)


@triton.jit
def _sum_ptrs(ptr, strides, row, place):
    """Pointers `[BLOCK_D]` into `[B, rows, D]`."""
    pid_b, channel, offs_d, _ = place
    base = ptr + offset(pid_b, strides[0]) + offset(row, strides[1])
    return base + offset(channel, strides[2]) + offset(offs_d, strides[2])


@triton.jit
def _load_vector(ptr, place, HAS: tl.constexpr, ACC: tl.constexpr):
    """A tile of a contiguous `[D]` as `[BLOCK_D, 1]`; zero if there is none."""
    _, channel, offs_d, mask_d = place
    if HAS:
        value = tl.load(ptr + channel + offs_d, mask=mask_d, other=0.0).to(ACC)
    else:
        value = tl.zeros(offs_d.shape, ACC)
    return value[:, None]


@triton.jit
def _step(raw, bias, mask_t, SOFTPLUS: tl.constexpr):
    """d of a tile from delta; 0 for tokens that are not there, which leave the state as it is."""
    raw = raw + bias
    if SOFTPLUS:
        raw = _softplus(raw)
    return tl.where(mask_t[None, :], raw, 0.0)


@triton.jit
def _walk(
    h, step, x, b, c, a, N: tl.constexpr, BLOCK_D: tl.constexpr, LOG_T: tl.constexpr
):  # fmt: skip
    """(h behind the tokens of a tile, C . h of each, `[BLOCK_D, T]`)."""
    offs_t = tl.arange(0, 1 << LOG_T)
    # Folded into A, log2(e) would shift all tokens alike.
    steps = _columns(step * LOG2E, BLOCK_D, [1, BLOCK_D], LOG_T)
    xs = _columns(x, BLOCK_D, [1, BLOCK_D], LOG_T)
    bs = _columns(b, N, [N, 1], LOG_T)
    cs = _columns(c, N, [N, 1], LOG_T)
    y = tl.zeros([BLOCK_D, 1 << LOG_T], x.dtype)
    for i in tl.static_range(1 << LOG_T):
        h = tl.exp2(steps[i] * a) * h + xs[i] * bs[i]
        y = tl.where((offs_t == i)[None, :], tl.sum(h * cs[i], 0)[:, None], y)
    return h, y


@triton.jit
def _advance(
    h, step, x, b, a, N: tl.constexpr, BLOCK_D: tl.constexpr, LOG_T: tl.constexpr,
    REVERSE: tl.constexpr,
):  # fmt: skip
    """h = a h + x b over the tokens of a tile, or from the last to the first h = a (h + x b)."""
    # Folded into A, log2(e) would shift all tokens alike.
    steps = _columns(step * LOG2E, BLOCK_D, [1, BLOCK_D], LOG_T)
    xs = _columns(x, BLOCK_D, [1, BLOCK_D], LOG_T)
    bs = _columns(b, N, [N, 1], LOG_T)
    if REVERSE:
        for i in tl.static_range((1 << LOG_T) - 1, -1, -1):
            h = tl.exp2(steps[i] * a) * (h + xs[i] * bs[i])
    else:
        for i in tl.static_range(1 << LOG_T):
            h = tl.exp2(steps[i] * a) * h + xs[i] * bs[i]
    return h


@triton.jit
def _selective_scan_segment_kernel(
    in_ptr, delta_ptr, a_ptr, p_ptr, z_ptr, bias_ptr, end_ptr, total_ptr,
    in_strides, delta_strides, a_strides, p_strides, z_strides, end_strides, total_strides,
    group_dim, tiles, states, length, segments, segment_len,
    HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr,
    BLOCK_D: tl.constexpr, N: tl.constexpr, LOG_T: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """What a segment makes of a zero state, and the sum of its d.

    Forward: in = u, p = B; end is the state behind the segment. REVERSE: in = dout, p = C; end is
    the gradient of the state before it. end `[B, segments, N, D]`, total `[B, segments, D]`.
    """
    T: tl.constexpr = 1 << LOG_T
    pid_bs, pid_t = split(tl.program_id(0), tiles)
    pid_b, pid_s = split(pid_bs, segments)
    pid_g, place = _tile_of(pid_b, pid_t, group_dim, BLOCK_D)
    a = _load_state(a_ptr, a_strides, 0, place, states, True, N, ACC)
    bias = _load_vector(bias_ptr, place, HAS_BIAS, ACC)
    begin = pid_s * segment_len
    end = tl.minimum(begin + segment_len, length)
    count = tl.cdiv(end - begin, T)
    h = tl.zeros([N, BLOCK_D], ACC)
    total = tl.zeros([BLOCK_D], ACC)
    for k in tl.range(0, count, disable_licm=True):
        first = begin + k * T
        if REVERSE:
            first = begin + (count - 1 - k) * T
        mask_t = first + tl.arange(0, T) < end
        raw = _load_channels(delta_ptr, delta_strides, place, first, mask_t, T, ACC)
        step = _step(raw, bias, mask_t, SOFTPLUS)
        x = _load_channels(in_ptr, in_strides, place, first, mask_t, T, ACC)
        if REVERSE:
            if HAS_Z:
                z = _load_channels(z_ptr, z_strides, place, first, mask_t, T, ACC)
                x = x * z * _sigmoid(z)
        else:
            x = x * step
        p = _load_projection(p_ptr, p_strides, pid_b, pid_g, states, first, mask_t, N, T, ACC)
        h = _advance(h, step, x, p, a, N, BLOCK_D, LOG_T, REVERSE)
        total += tl.sum(step, 1)
    _store_state(end_ptr, end_strides, pid_s, place, states, h, N)
    tl.store(_sum_ptrs(total_ptr, total_strides, pid_s, place), total, mask=place[3])


@triton.jit
def _selective_scan_carry_kernel(
    a_ptr, start_ptr, end_ptr, total_ptr, a_strides, start_strides, end_strides, total_strides,
    dim, states, segments, HAS_START: tl.constexpr, REVERSE: tl.constexpr,
    BLOCK_D: tl.constexpr, N: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Puts in the place of each segment's `end` the true state that the segment starts from."""
    pid_b, pid_t = split(tl.program_id(0), tl.cdiv(dim, BLOCK_D))
    _, place = _tile_of(pid_b, pid_t, dim, BLOCK_D)
    a = _load_state(a_ptr, a_strides, 0, place, states, True, N, ACC)
    h = _load_state(start_ptr, start_strides, 0, place, states, HAS_START, N, ACC)
    for k in tl.range(0, segments, disable_licm=True):
        row = k
        if REVERSE:
            row = segments - 1 - k
        ptrs, mask = _state_ptrs(end_ptr, end_strides, row, place, states, N)
        end = tl.load(ptrs, mask=mask, other=0.0)
        total_ptrs = _sum_ptrs(total_ptr, total_strides, row, place)
        total = tl.load(total_ptrs, mask=place[3], other=0.0)
        tl.store(ptrs, h, mask=mask)
        h = tl.exp2((total * LOG2E)[None, :] * a) * h + end


@triton.jit
def _selective_scan_fwd_kernel(
    u_ptr, delta_ptr, a_ptr, b_ptr, c_ptr, d_ptr, z_ptr, bias_ptr, start_ptr, out_ptr, last_ptr,
    kept_ptr,
    u_strides, delta_strides, a_strides, b_strides, c_strides, z_strides, start_strides,
    out_strides, last_strides, kept_strides,
    group_dim, tiles, states, length, segments, segment_len,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_START: tl.constexpr,
    SOFTPLUS: tl.constexpr, KEEP: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_D: tl.constexpr, N: tl.constexpr, LOG_T: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """out of a segment, the states at its chunks, and behind the last segment the last state.

    start: `[B, segments, N, D]`.
    """
    T: tl.constexpr = 1 << LOG_T
    pid_bs, pid_t = split(tl.program_id(0), tiles)
    pid_b, pid_s = split(pid_bs, segments)
    pid_g, place = _tile_of(pid_b, pid_t, group_dim, BLOCK_D)
    a = _load_state(a_ptr, a_strides, 0, place, states, True, N, ACC)
    bias = _load_vector(bias_ptr, place, HAS_BIAS, ACC)
    skip = _load_vector(d_ptr, place, HAS_D, ACC)
    begin = pid_s * segment_len
    end = tl.minimum(begin + segment_len, length)
    h = _load_state(start_ptr, start_strides, pid_s, place, states, HAS_START, N, ACC)
    for first in tl.range(begin, end, T, disable_licm=True):
        if KEEP:
            if first % CHUNK == 0:
                _store_state(kept_ptr, kept_strides, first // CHUNK, place, states, h, N)
        mask_t = first + tl.arange(0, T) < end
        u = _load_channels(u_ptr, u_strides, place, first, mask_t, T, ACC)
        raw = _load_channels(delta_ptr, delta_strides, place, first, mask_t, T, ACC)
        b = _load_projection(b_ptr, b_strides, pid_b, pid_g, states, first, mask_t, N, T, ACC)
        c = _load_projection(c_ptr, c_strides, pid_b, pid_g, states, first, mask_t, N, T, ACC)
        step = _step(raw, bias, mask_t, SOFTPLUS)
        h, y = _walk(h, step, step * u, b, c, a, N, BLOCK_D, LOG_T)
        if HAS_D:
            y += skip * u
        if HAS_Z:
            z = _load_channels(z_ptr, z_strides, place, first, mask_t, T, ACC)
            y = y * z * _sigmoid(z)
        _store_channels(out_ptr, out_strides, place, first, mask_t, y, T)
    if pid_s == segments - 1:
        _store_state(last_ptr, last_strides, 0, place, states, h, N)


@triton.jit
def _selective_scan_bwd_kernel(
    u_ptr, delta_ptr, a_ptr, b_ptr, c_ptr, d_ptr, z_ptr, bias_ptr, kept_ptr, do_ptr, last_ptr,
    space_ptr, du_ptr, ddelta_ptr, dz_ptr, db_ptr, dc_ptr, da_ptr, dskip_ptr, dbias_ptr, dstart_ptr,
    u_strides, delta_strides, a_strides, b_strides, c_strides, z_strides, kept_strides, do_strides,
    last_strides, space_stride, du_strides, ddelta_strides, dz_strides, part_strides, da_strides,
    sum_strides, dstart_strides,
    group_dim, tiles, states, length, segments, segment_len,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_LAST: tl.constexpr,
    SOFTPLUS: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_D: tl.constexpr, N: tl.constexpr, LOG_T: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Gradients of a segment, chunk by chunk from the last to the first.

    A chunk is walked over once to note the state before each tile of tokens in `space`
    (CHUNK / T states a program), then back: a tile's states are computed again and held in
    registers. last: gradient behind each segment, `[B, segments, N, D]`. Parts that are summed
    later: db, dc `[B, tiles, L, N]`; da `[B, segments, N, D]`; dskip, dbias `[B, segments, D]`.
    """
    T: tl.constexpr = 1 << LOG_T
    pid_bs, pid_t = split(tl.program_id(0), tiles)
    pid_b, pid_s = split(pid_bs, segments)
    pid_g, place = _tile_of(pid_b, pid_t, group_dim, BLOCK_D)
    a = _load_state(a_ptr, a_strides, 0, place, states, True, N, ACC)
    bias = _load_vector(bias_ptr, place, HAS_BIAS, ACC)
    skip = _load_vector(d_ptr, place, HAS_D, ACC)
    offs_t, offs_n, offs_d = tl.arange(0, T), tl.arange(0, N), tl.arange(0, BLOCK_D)
    begin = pid_s * segment_len
    end = tl.minimum(begin + segment_len, length)
    g = _load_state(last_ptr, last_strides, pid_s, place, states, HAS_LAST, N, ACC)
    da = tl.zeros([N, BLOCK_D], ACC)
    dskip = tl.zeros([BLOCK_D], ACC)
    dbias = tl.zeros([BLOCK_D], ACC)
    space = space_ptr + offset(tl.program_id(0), space_stride)
    space += offs_n[:, None] * BLOCK_D + offs_d[None, :]
    part = offset(pid_b, part_strides[0]) + offset(pid_t, part_strides[1])
    part += offset(offs_n, part_strides[3])

    chunks = tl.cdiv(end - begin, CHUNK)
    for chunk in tl.range(0, chunks, disable_licm=True):
        chunk_begin = begin + (chunks - 1 - chunk) * CHUNK
        count = tl.cdiv(tl.minimum(chunk_begin + CHUNK, end) - chunk_begin, T)
        row = chunk_begin // CHUNK
        h = _load_state(kept_ptr, kept_strides, row, place, states, True, N, ACC)
        for k in tl.range(0, count, disable_licm=True):
            first = chunk_begin + k * T
            mask_t = first + offs_t < end
            tl.store(space + k * (N * BLOCK_D), h)
            u = _load_channels(u_ptr, u_strides, place, first, mask_t, T, ACC)
            raw = _load_channels(delta_ptr, delta_strides, place, first, mask_t, T, ACC)
            b = _load_projection(b_ptr, b_strides, pid_b, pid_g, states, first, mask_t, N, T, ACC)
            step = _step(raw, bias, mask_t, SOFTPLUS)
            h = _advance(h, step, step * u, b, a, N, BLOCK_D, LOG_T, False)
        tl.debug_barrier()  # threads read what others wrote to `space`
        for k in tl.range(0, count, disable_licm=True):
            tile = count - 1 - k
            first = chunk_begin + tile * T
            mask_t = first + offs_t < end
            h = tl.load(space + tile * (N * BLOCK_D))
            u = _load_channels(u_ptr, u_strides, place, first, mask_t, T, ACC)
            raw = _load_channels(delta_ptr, delta_strides, place, first, mask_t, T, ACC)
            b = _load_projection(b_ptr, b_strides, pid_b, pid_g, states, first, mask_t, N, T, ACC)
            c = _load_projection(c_ptr, c_strides, pid_b, pid_g, states, first, mask_t, N, T, ACC)
            dy = _load_channels(do_ptr, do_strides, place, first, mask_t, T, ACC)
            step = _step(raw, bias, mask_t, SOFTPLUS)
            x = step * u
            if HAS_Z:
                z = _load_channels(z_ptr, z_strides, place, first, mask_t, T, ACC)
                gate = _sigmoid(z)
                # d silu(z) = sigmoid(z) (1 + z (1 - sigmoid(z)))
                slope = dy * gate * (1.0 + z * (1.0 - gate))
                dy = dy * z * gate
            steps = _columns(step, BLOCK_D, [1, BLOCK_D], LOG_T)
            exponents = _columns(step * LOG2E, BLOCK_D, [1, BLOCK_D], LOG_T)
            xs = _columns(x, BLOCK_D, [1, BLOCK_D], LOG_T)
            dys = _columns(dy, BLOCK_D, [1, BLOCK_D], LOG_T)
            bs = _columns(b, N, [N, 1], LOG_T)
            cs = _columns(c, N, [N, 1], LOG_T)
            y = tl.zeros([BLOCK_D, T], ACC)
            decayed = ()  # of each token: a_t h_{t-1}
            for i in tl.static_range(T):
                h = tl.exp2(exponents[i] * a) * h
                decayed = decayed + (h,)  # noqa: RUF005
                h += xs[i] * bs[i]
                if HAS_Z:
                    y = tl.where((offs_t == i)[None, :], tl.sum(h * cs[i], 0)[:, None], y)
            if HAS_Z:
                dz = slope * (y + skip * u)
                _store_channels(dz_ptr, dz_strides, place, first, mask_t, dz, T)
            dx = tl.zeros([BLOCK_D, T], ACC)
            dstep = tl.zeros([BLOCK_D, T], ACC)
            for i in tl.static_range(T - 1, -1, -1):
                g += dys[i] * cs[i]
                w = g * decayed[i]
                da += w * steps[i]
                is_i = (offs_t == i)[None, :]
                dx = tl.where(is_i, tl.sum(g * bs[i], 0)[:, None], dx)
                dstep = tl.where(is_i, tl.sum(w * a, 0)[:, None], dstep)
                here = part + offset(first + i, part_strides[2])
                mask_i = (offs_n < states) & (first + i < end)
                tl.store(db_ptr + here, tl.sum(xs[i] * g, 1), mask=mask_i)
                tl.store(
                    dc_ptr + here, tl.sum(dys[i] * (decayed[i] + xs[i] * bs[i]), 1), mask=mask_i
                )
                g = g * tl.exp2(exponents[i] * a)
            du = step * dx + skip * dy
            dstep += u * dx
            if SOFTPLUS:
                dstep = dstep * _sigmoid(raw + bias)
            dskip += tl.sum(dy * u, 1)
            dbias += tl.sum(tl.where(mask_t[None, :], dstep, 0.0), 1)
            _store_channels(du_ptr, du_strides, place, first, mask_t, du, T)
            _store_channels(ddelta_ptr, ddelta_strides, place, first, mask_t, dstep, T)
        tl.debug_barrier()  # the next chunk writes to `space` again

    _store_state(da_ptr, da_strides, pid_s, place, states, da, N)
    if HAS_D:
        tl.store(_sum_ptrs(dskip_ptr, sum_strides, pid_s, place), dskip, mask=place[3])
    if HAS_BIAS:
        tl.store(_sum_ptrs(dbias_ptr, sum_strides, pid_s, place), dbias, mask=place[3])
    if pid_s == 0:
        _store_state(dstart_ptr, dstart_strides, 0, place, states, g, N)


# Results, in functions of their own so that a test can put them elsewhere.
def _like(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(tensor)


def _wide(A: torch.Tensor, *shape: int) -> torch.Tensor:
    """States and sums."""
    return torch.empty(shape, dtype=A.dtype, device=A.device)


def _scratch(A: torch.Tensor, programs: int, size: int) -> torch.Tensor:
    """Working space, a row for each program."""
    return torch.empty(programs, size, dtype=A.dtype, device=A.device)


def _rows(state: torch.Tensor, batch: int) -> torch.Tensor:
    """`[B, D, N]`, or `[D, N]` for the whole batch, as the kernels see states: `[B, 1, N, D]`."""
    return state.mT.expand(batch, -1, -1)[:, None]


def _segments(u: torch.Tensor, programs: int) -> int:
    """Segments that would fill the GPU with so many programs each; one without a GPU."""
    if not u.is_cuda:
        return 1
    # A program is a warp; three of them on each of a multiprocessor's four schedulers.
    wanted = 12 * torch.cuda.get_device_properties(u.device).multi_processor_count
    return triton.cdiv(wanted, programs)


def configs(table: dict, A: torch.Tensor) -> tuple[Config, ...]:
    """The configs of a table for so many states, the shipped one first."""
    return next(found for most, found in table.items() if A.shape[1] <= most)


def _in_pieces(tensor: torch.Tensor) -> bool:
    """Whether the compiler knows that rows start at multiples of 16 bytes and have no gaps."""
    *steps, last = tensor.stride()
    return last == 1 and tensor.data_ptr() % 16 == 0 and all(s % 16 == 0 for s in steps)


def backward_table(*tensors: torch.Tensor) -> dict:
    return BACKWARD if all(_in_pieces(t) for t in tensors) else BACKWARD_ANY


class _Launch:
    """Grid, sizes and constants that the launches of one call share."""

    def __init__(self, u, A, B, chunk, config, segments):  # type: ignore[no-untyped-def]
        self.batch, self.dim, length = u.shape
        group_dim = self.dim // B.shape[1]
        self.tiles = B.shape[1] * triton.cdiv(group_dim, config.channels)
        segments = segments or _segments(u, self.batch * self.tiles)
        segment_len = triton.cdiv(triton.cdiv(length, chunk), segments) * chunk
        self.segments = triton.cdiv(length, segment_len)
        self.grid = (self.batch * self.segments * self.tiles,)
        self.sizes = (group_dim, self.tiles, A.shape[1], length, self.segments, segment_len)
        self.common = {
            "N": max(2, triton.next_power_of_2(A.shape[1])),
            "ACC": tl.float64 if A.dtype == torch.float64 else tl.float32,
            "num_warps": 1,
            "num_stages": 1,
            "maxnreg": MAX_REGISTERS,
        }
        self.options = {
            "BLOCK_D": config.channels,
            "LOG_T": config.tokens.bit_length() - 1,
            **self.common,
        }

    def starts(self, given, delta, A, projection, z, bias, softplus, first, reverse):  # type: ignore[no-untyped-def]
        """The true state before each segment (behind it if reverse), `[B, segments, N, D]`."""
        batch, dim, states = self.batch, self.dim, A.shape[1]
        end = _wide(A, batch, self.segments, states, dim)
        total = _wide(A, batch, self.segments, dim)
        gate, a = given if z is None else z, _rows(A, batch)
        _selective_scan_segment_kernel[self.grid](
            given, delta, a, projection, gate, A if bias is None else bias, end, total,
            given.stride(), delta.stride(), a.stride(), projection.stride(), gate.stride(),
            end.stride(), total.stride(), *self.sizes,
            HAS_Z=z is not None, HAS_BIAS=bias is not None, SOFTPLUS=softplus, REVERSE=reverse,
            **self.options,
        )  # fmt: skip
        start = end if first is None else _rows(first, batch)
        _selective_scan_carry_kernel[(batch * triton.cdiv(dim, CARRY_CHANNELS),)](
            a, start, end, total, a.stride(), start.stride(), end.stride(), total.stride(),
            dim, states, self.segments,
            HAS_START=first is not None, REVERSE=reverse, BLOCK_D=CARRY_CHANNELS, **self.common,
        )  # fmt: skip
        return end


def launch_forward(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    delta_bias: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    delta_softplus: bool,
    keep_states: bool,
    chunk: int,
    config: Config | None = None,
    segments: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(out `[B, D, L]`, last state `[B, D, N]`, states `[B, chunks, N, D]`)."""
    batch, dim, length = u.shape
    D, delta_bias = (None if t is None else t.contiguous() for t in (D, delta_bias))
    out, last = _like(u), _wide(A, batch, dim, A.shape[1])
    kept = _wide(A, batch, triton.cdiv(length, chunk) if keep_states else 0, A.shape[1], dim)
    if not u.numel():
        last.zero_() if initial_state is None else last.copy_(initial_state)
        return out, last, kept
    launch = _Launch(u, A, B, chunk, config or configs(FORWARD, A)[0], segments)
    start = None if initial_state is None else _rows(initial_state, batch)
    if launch.segments > 1:
        shared = (z, delta_bias, delta_softplus, initial_state)
        start = launch.starts(u, delta, A, B, None, *shared[1:], False)
    a, behind = _rows(A, batch), _rows(last, batch)
    gate, before = u if z is None else z, behind if start is None else start
    _selective_scan_fwd_kernel[launch.grid](
        u, delta, a, B, C, A if D is None else D, gate, A if delta_bias is None else delta_bias,
        before, out, behind, kept,
        u.stride(), delta.stride(), a.stride(), B.stride(), C.stride(), gate.stride(),
        before.stride(), out.stride(), behind.stride(), kept.stride(), *launch.sizes,
        HAS_D=D is not None, HAS_Z=z is not None, HAS_BIAS=delta_bias is not None,
        HAS_START=start is not None, SOFTPLUS=delta_softplus, KEEP=keep_states, CHUNK=chunk,
        **launch.options,
    )  # fmt: skip
    return out, last, kept


def launch_backward(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    delta_bias: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    states: torch.Tensor,
    grad_out: torch.Tensor,
    grad_last_state: torch.Tensor | None,
    delta_softplus: bool,
    chunk: int,
    config: Config | None = None,
    segments: int | None = None,
) -> list[torch.Tensor]:
    """Gradients of u, delta, A, B, C, and of D, z, delta_bias, initial_state where given."""
    batch, dim, length = u.shape
    groups, num_states = B.shape[1:3]
    D, delta_bias = (None if t is None else t.contiguous() for t in (D, delta_bias))
    du, ddelta = _like(u), _like(delta)
    dz = None if z is None else _like(z)
    dstart = _wide(A, batch, dim, num_states)
    if u.numel():
        table = backward_table(u, delta, B, C, u if z is None else z, grad_out)
        launch = _Launch(u, A, B, chunk, config or configs(table, A)[0], segments)
        last = None if grad_last_state is None else _rows(grad_last_state, batch)
        if launch.segments > 1:
            shared = (z, delta_bias, delta_softplus, grad_last_state)
            last = launch.starts(grad_out, delta, A, C, *shared, True)
        db, dc = (_wide(A, batch, launch.tiles, length, num_states) for _ in range(2))
        da = _wide(A, batch, launch.segments, num_states, dim)
        dskip, dbias = (_wide(A, batch, launch.segments, dim) for _ in range(2))
        tile = launch.options["N"] * launch.options["BLOCK_D"]
        space = _scratch(A, *launch.grid, (chunk >> launch.options["LOG_T"]) * tile)
        a, front = _rows(A, batch), _rows(dstart, batch)
        behind = front if last is None else last
        gate, dgate = (u, du) if z is None else (z, dz)
        _selective_scan_bwd_kernel[launch.grid](
            u, delta, a, B, C, A if D is None else D, gate,
            A if delta_bias is None else delta_bias, states, grad_out, behind, space,
            du, ddelta, dgate, db, dc, da, dskip, dbias, front,
            u.stride(), delta.stride(), a.stride(), B.stride(), C.stride(), gate.stride(),
            states.stride(), grad_out.stride(), behind.stride(), space.stride(0), du.stride(),
            ddelta.stride(), dgate.stride(), db.stride(), da.stride(), dskip.stride(),
            front.stride(), *launch.sizes,
            HAS_D=D is not None, HAS_Z=z is not None, HAS_BIAS=delta_bias is not None,
            HAS_LAST=last is not None, SOFTPLUS=delta_softplus, CHUNK=chunk, **launch.options,
        )  # fmt: skip
        grad_B, grad_C = (t.unflatten(1, (groups, -1)).sum(2).mT.to(B.dtype) for t in (db, dc))
        grad_A, grad_D, grad_bias = da.sum((0, 1)).T, dskip.sum((0, 1)), dbias.sum((0, 1))
    else:
        grad_A, grad_B, grad_C = (torch.zeros_like(t) for t in (A, B, C))
        grad_D = grad_bias = A.new_zeros(dim)
        dstart.zero_() if grad_last_state is None else dstart.copy_(grad_last_state)
    optional = ((D, grad_D), (z, dz), (delta_bias, grad_bias), (initial_state, dstart))
    grads = [du, ddelta, grad_A, grad_B, grad_C]
    return grads + [grad for given, grad in optional if given is not None]


def aot_cases(everything: bool = False) -> Iterator[AotCase]:
    """What the launchers compile, with all options: every config.

    everything: of every config each dtype, with all options and with none, on every GPU.
    """
    channels, projection, state = ("i64", "i32", 1), ("i64", "i32", "i32", 1), ("i32",) * 3 + (1,)
    sizes = ("group_dim", "tiles", "states", "length", "segments", "segment_len")
    # The kernel, its channels [B, D, L], projections [B, G, N, L], states, sums, vectors, flags.
    forms = {
        "segment": (
            _selective_scan_segment_kernel,
            ("in", "delta", "z"),
            ("p",),
            ("a", "end"),
            ("total",),
            ("bias",),
            ("HAS_Z", "HAS_BIAS", "SOFTPLUS", "REVERSE"),
        ),
        "fwd": (
            _selective_scan_fwd_kernel,
            ("u", "delta", "z", "out"),
            ("b", "c"),
            ("a", "start", "last", "kept"),
            (),
            ("d", "bias"),
            ("HAS_D", "HAS_Z", "HAS_BIAS", "HAS_START", "SOFTPLUS", "KEEP"),
        ),
        "bwd": (
            _selective_scan_bwd_kernel,
            ("u", "delta", "z", "do", "du", "ddelta", "dz"),
            ("b", "c"),
            ("a", "kept", "last", "da", "dstart"),
            (),
            ("d", "bias"),
            ("HAS_D", "HAS_Z", "HAS_BIAS", "HAS_LAST", "SOFTPLUS"),
        ),
    }
    bwd_only = {
        **{f"{name}_ptr": "*fp32" for name in ("space", "db", "dc", "dskip", "dbias")},
        "space_stride": "i32",
        "part_strides": state,
        "sum_strides": ("i32", "i32", 1),
    }

    def case(form: str, dtype: str, states: int, config: Config, **changed: bool) -> AotCase:
        kernel, inputs, projections, tiles, sums, vectors, flags = forms[form]
        suffix = "".join(f"-{'' if on else 'no-'}{flag.lower()}" for flag, on in changed.items())
        return AotCase(
            name=f"{form}-{dtype}-n{states}-{config.channels}x{config.tokens}{suffix}",
            kernel=kernel,
            signature={
                **{f"{name}_ptr": f"*{dtype}" for name in (*inputs, *projections)},
                **{f"{name}_ptr": "*fp32" for name in (*tiles, *sums, *vectors)},
                **{f"{name}_strides": channels for name in inputs},
                **{f"{name}_strides": projection for name in projections},
                # States of the public op are [B, D, N], the others have channels last.
                **{f"{name}_strides": state for name in tiles},
                **{f"{name}_strides": ("i32", "i32", 1) for name in sums},
                **(bwd_only if form == "bwd" else {}),
                **dict.fromkeys(sizes, "i32"),
            },
            constexprs={
                **dict.fromkeys(flags, True),
                **changed,
                **({} if form == "segment" else {"CHUNK": CHUNK}),
                "BLOCK_D": config.channels,
                "N": triton.next_power_of_2(states),
                "LOG_T": config.tokens.bit_length() - 1,
                "ACC": tl.float32,
            },
            num_warps=1,
            num_stages=1,
            maxnreg=MAX_REGISTERS,
            aligned_args=("group_dim", "states", "length", "segment_len"),
            # What differs from bf16 with all options is looked at on one of them.
            archs=(90,) if not everything and (changed or dtype != "bf16") else ARCHS,
        )

    both = ("aligned", "unaligned")
    for form, table, variants in (
        ("segment", FORWARD, both),
        ("fwd", FORWARD, both),
        ("bwd", BACKWARD, both[:1]),
        ("bwd", BACKWARD_ANY, both[1:]),
    ):
        none = dict.fromkeys(forms[form][-1], False)
        for states, found in table.items():
            for config, dtype in product(found, ("bf16", "fp16", "fp32")):
                if everything or dtype == "bf16":
                    yield replace(case(form, dtype, states, config), variants=variants)
                if everything:
                    yield replace(case(form, dtype, states, config, **none), variants=variants)
        if not everything:
            yield replace(case(form, "fp32", 16, table[16][0]), variants=variants)
    if not everything:
        yield case("segment", "bf16", 16, FORWARD[16][0], REVERSE=False)
        plain = {"HAS_D": False, "HAS_Z": False, "HAS_BIAS": False, "SOFTPLUS": False}
        yield case("fwd", "fp16", 16, FORWARD[16][0], **plain, KEEP=False)
        yield replace(case("bwd", "fp16", 16, BACKWARD[16][0], **plain), variants=both[:1])
        yield replace(case("bwd", "fp16", 16, BACKWARD_ANY[16][0], **plain), variants=both[1:])
    yield AotCase(
        name="carry",
        kernel=_selective_scan_carry_kernel,
        signature={
            **{f"{name}_ptr": "*fp32" for name in ("a", "start", "end", "total")},
            **{f"{name}_strides": state for name in ("a", "start", "end")},
            "total_strides": ("i32", "i32", 1),
            **dict.fromkeys(("dim", "states", "segments"), "i32"),
        },
        constexprs={
            "HAS_START": True,
            "REVERSE": True,
            "BLOCK_D": CARRY_CHANNELS,
            "N": 16,
            "ACC": tl.float32,
        },
        num_warps=1,
        num_stages=1,
        maxnreg=MAX_REGISTERS,
        aligned_args=("dim", "states"),
    )
