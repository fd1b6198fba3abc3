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
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .._aot import AotCase
from .._tiles import offset, split

LOG2E = tl.constexpr(1.4426950408889634)


@dataclass(frozen=True)
class Config:
    """A warp owns `channels` channels, and takes `tokens` of them at a time from memory."""

    channels: int
    tokens: int


# Chosen by reading the code that comes out (no spills), not yet by measurement: the first of each
# is shipped. With 32 channels a thread holds all states of one, and sums over states need no
# shuffle. Keyed by the N up to which they hold.
FORWARD = {
    16: (Config(32, 4), Config(32, 2)),
    32: (Config(16, 2),),
    64: (Config(8, 2),),
}
BACKWARD = {
    16: (Config(32, 2), Config(16, 2)),
    32: (Config(8, 2),),
    64: (Config(4, 2),),
}


@triton.jit
def _softplus(x):
    """log(1 + exp(x)), to a few roundings also where it is tiny."""
    y = tl.exp2(-tl.abs(x) * LOG2E)
    w = 1.0 + y
    # log(w) y / (w - 1) undoes the rounding of 1 + y.
    log1p = tl.where(w == 1.0, y, tl.log(w) * (y / tl.where(w == 1.0, 1.0, w - 1.0)))
    return tl.maximum(x, 0.0) + log1p


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(-x * LOG2E))


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
            evens, odds = evens + (even,), odds + (odd,)
        parts = evens + odds  # part k holds the tokens whose last j + 1 bits are k
    columns = ()
    for k in tl.static_range(1 << LOG_T):
        columns = columns + (tl.reshape(parts[k], SHAPE),)
    return columns


@triton.jit
def _channels(pid_t, tiles, group_dim, BLOCK_D: tl.constexpr):
    """(group, first channel of the tile, channels from there `[BLOCK_D]`, mask)."""
    pid_g, tile = split(pid_t, tiles)
    inside = tl.arange(0, BLOCK_D)
    first = tile * BLOCK_D
    return pid_g, pid_g * group_dim + first, inside, first + inside < group_dim


@triton.jit
def _load_channels(ptr, pid_b, strides, place, first, mask_t, ACC: tl.constexpr, T: tl.constexpr):
    """Tokens [first, first + T) of `[B, D, L]` for a tile of channels, `[BLOCK_D, T]`."""
    ptrs, mask = _channel_ptrs(ptr, pid_b, strides, place, first, mask_t, T)
    return tl.load(ptrs, mask=mask, other=0.0).to(ACC)


@triton.jit
def _store_channels(ptr, pid_b, strides, place, first, mask_t, value, T: tl.constexpr):
    ptrs, mask = _channel_ptrs(ptr, pid_b, strides, place, first, mask_t, T)
    tl.store(ptrs, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _channel_ptrs(ptr, pid_b, strides, place, first, mask_t, T: tl.constexpr):
    channel, offs_d, mask_d = place
    base = ptr + offset(pid_b, strides[0]) + offset(channel, strides[1]) + offset(first, strides[2])
    ptrs = base + offset(offs_d, strides[1])[:, None]
    ptrs += offset(tl.arange(0, T), strides[2])[None, :]
    return ptrs, mask_d[:, None] & mask_t[None, :]


@triton.jit
def _load_projection(
    ptr, pid_b, pid_g, strides, states, first, mask_t,
    N: tl.constexpr, T: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Tokens [first, first + T) of `[B, G, N, L]` for one group, `[N, T]`."""
    offs_n = tl.arange(0, N)
    base = ptr + offset(pid_b, strides[0]) + offset(pid_g, strides[1]) + offset(first, strides[3])
    ptrs = base + offset(offs_n, strides[2])[:, None]
    ptrs += offset(tl.arange(0, T), strides[3])[None, :]
    mask = (offs_n < states)[:, None] & mask_t[None, :]
    return tl.load(ptrs, mask=mask, other=0.0).to(ACC)


@triton.jit
def _state_ptrs(ptr, row, dim, states, stride_d, stride_n, place, N: tl.constexpr):
    """Pointers `[N, BLOCK_D]` and mask of a tile of states in row `row` of dim * states each."""
    channel, offs_d, mask_d = place
    offs_n = tl.arange(0, N)
    base = ptr + offset(row, dim * states) + offset(channel, stride_d)
    ptrs = base + offset(offs_n, stride_n)[:, None] + offset(offs_d, stride_d)[None, :]
    return ptrs, (offs_n < states)[:, None] & mask_d[None, :]


@triton.jit
def _vector(ptr, place, HAS: tl.constexpr, ACC: tl.constexpr):
    """A tile of `[D]` as `[BLOCK_D, 1]`, zero if there is none."""
    channel, offs_d, mask_d = place
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
    h, step, x, b, c, decay, N: tl.constexpr, BLOCK_D: tl.constexpr,
    LOG_T: tl.constexpr,
):  # fmt: skip
    """(h behind the tokens of a tile, C . h of each `[BLOCK_D, T]`)."""
    y = tl.zeros([BLOCK_D, 1 << LOG_T], x.dtype)
    offs_t = tl.arange(0, 1 << LOG_T)
    steps = _columns(step, BLOCK_D, [1, BLOCK_D], LOG_T)
    xs = _columns(x, BLOCK_D, [1, BLOCK_D], LOG_T)
    bs = _columns(b, N, [N, 1], LOG_T)
    cs = _columns(c, N, [N, 1], LOG_T)
    for i in tl.static_range(1 << LOG_T):
        h = tl.exp2(steps[i] * decay) * h + xs[i] * bs[i]
        y_i = tl.sum(h * cs[i], 0)
        y = tl.where((offs_t == i)[None, :], y_i[:, None], y)
    return h, y


@triton.jit
def _advance(
    h, step, x, b, decay, N: tl.constexpr, BLOCK_D: tl.constexpr,
    LOG_T: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """h = a h + x b over the tokens of a tile, or from the last to the first h = a (h + x b)."""
    steps = _columns(step, BLOCK_D, [1, BLOCK_D], LOG_T)
    xs = _columns(x, BLOCK_D, [1, BLOCK_D], LOG_T)
    bs = _columns(b, N, [N, 1], LOG_T)
    if REVERSE:
        for i in tl.static_range((1 << LOG_T) - 1, -1, -1):
            h = tl.exp2(steps[i] * decay) * (h + xs[i] * bs[i])
    else:
        for i in tl.static_range(1 << LOG_T):
            h = tl.exp2(steps[i] * decay) * h + xs[i] * bs[i]
    return h


@triton.jit
def _selective_scan_segment_kernel(
    in_ptr, delta_ptr, a_ptr, p_ptr, z_ptr, bias_ptr, end_ptr, total_ptr,
    in_strides, delta_strides, p_strides, z_strides,
    dim, group_dim, num_groups, states, length, segments, segment_len,
    HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr,
    BLOCK_D: tl.constexpr, N: tl.constexpr, LOG_T: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """What a segment makes of a zero state, and the sum of its d.

    Forward: in = u, p = B; end is the state behind the segment. REVERSE: in = dout, p = C; end is
    the gradient of the state before it. end `[B, segments, N, D]`, total `[B, segments, D]`.
    """
    T: tl.constexpr = 1 << LOG_T
    tiles = tl.cdiv(group_dim, BLOCK_D)
    pid_bs, pid_t = split(tl.program_id(0), tiles * num_groups)
    pid_b, pid_s = split(pid_bs, segments)
    pid_g, channel, offs_d, mask_d = _channels(pid_t, tiles, group_dim, BLOCK_D)
    place = (channel, offs_d, mask_d)
    a_ptrs, mask_a = _state_ptrs(a_ptr, 0, dim, states, states, 1, place, N)
    decay = tl.load(a_ptrs, mask=mask_a, other=0.0).to(ACC) * LOG2E
    bias = _vector(bias_ptr, place, HAS_BIAS, ACC)
    offs_t = tl.arange(0, T)
    begin = pid_s * segment_len
    end = tl.minimum(begin + segment_len, length)
    h = tl.zeros([N, BLOCK_D], ACC)
    total = tl.zeros([BLOCK_D], ACC)
    for k in tl.range(0, tl.cdiv(end - begin, T), disable_licm=True):
        first = begin + k * T
        if REVERSE:
            first = begin + (tl.cdiv(end - begin, T) - 1 - k) * T
        mask_t = first + offs_t < end
        raw = _load_channels(delta_ptr, pid_b, delta_strides, place, first, mask_t, ACC, T)
        step = _step(raw, bias, mask_t, SOFTPLUS)
        x = _load_channels(in_ptr, pid_b, in_strides, place, first, mask_t, ACC, T)
        if REVERSE:
            if HAS_Z:
                z = _load_channels(z_ptr, pid_b, z_strides, place, first, mask_t, ACC, T)
                x = x * z * _sigmoid(z)
        else:
            x = x * step
        p = _load_projection(p_ptr, pid_b, pid_g, p_strides, states, first, mask_t, N, T, ACC)
        h = _advance(h, step, x, p, decay, N, BLOCK_D, LOG_T, REVERSE)
        total += tl.sum(step, 1)
    row = offset(pid_b, segments) + pid_s
    ptrs, mask = _state_ptrs(end_ptr, row, dim, states, 1, dim, place, N)
    tl.store(ptrs, h, mask=mask)
    tl.store(total_ptr + offset(row, dim) + channel + offs_d, total, mask=mask_d)


@triton.jit
def _selective_scan_carry_kernel(
    a_ptr, start_ptr, end_ptr, total_ptr, start_strides, dim, states, segments,
    HAS_START: tl.constexpr, REVERSE: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Puts in the place of each segment's `end` the true state that the segment starts from."""
    tiles = tl.cdiv(dim, BLOCK_D)
    pid_b, pid_t = split(tl.program_id(0), tiles)
    _, channel, offs_d, mask_d = _channels(pid_t, tiles, dim, BLOCK_D)
    place = (channel, offs_d, mask_d)
    a_ptrs, mask = _state_ptrs(a_ptr, 0, dim, states, states, 1, place, N)
    decay = tl.load(a_ptrs, mask=mask, other=0.0).to(ACC) * LOG2E
    h = _first_state(start_ptr, pid_b, start_strides, states, place, N, HAS_START, ACC)
    for k in tl.range(0, segments, disable_licm=True):
        segment = k
        if REVERSE:
            segment = segments - 1 - k
        row = offset(pid_b, segments) + segment
        ptrs, _ = _state_ptrs(end_ptr, row, dim, states, 1, dim, place, N)
        end = tl.load(ptrs, mask=mask, other=0.0)
        total_ptrs = total_ptr + offset(row, dim) + channel + offs_d
        total = tl.load(total_ptrs, mask=mask_d, other=0.0)[None, :]
        tl.store(ptrs, h, mask=mask)
        h = tl.exp2(total * decay) * h + end


@triton.jit
def _first_state(
    ptr, pid_b, strides, states, place, N: tl.constexpr, HAS: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """A tile `[N, BLOCK_D]` of `[B, D, N]`, zero if there is none."""
    channel, offs_d, mask_d = place
    offs_n = tl.arange(0, N)
    mask = (offs_n < states)[:, None] & mask_d[None, :]
    if HAS:
        base = ptr + offset(pid_b, strides[0]) + offset(channel, strides[1])
        ptrs = base + offset(offs_n, strides[2])[:, None] + offset(offs_d, strides[1])[None, :]
        h = tl.load(ptrs, mask=mask, other=0.0).to(ACC)
    else:
        h = tl.zeros(mask.shape, ACC)
    return h


@triton.jit
def _selective_scan_fwd_kernel(
    u_ptr, delta_ptr, a_ptr, b_ptr, c_ptr, d_ptr, z_ptr, bias_ptr, start_ptr, seg_ptr,
    out_ptr, last_ptr, kept_ptr,
    u_strides, delta_strides, b_strides, c_strides, z_strides, start_strides, out_strides,
    dim, group_dim, num_groups, states, length, segments, segment_len, chunks,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_START: tl.constexpr,
    SOFTPLUS: tl.constexpr, SEGMENTS: tl.constexpr, KEEP: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_D: tl.constexpr, N: tl.constexpr, LOG_T: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """out of a segment, the states at its chunks, and behind the last one the last state."""
    T: tl.constexpr = 1 << LOG_T
    tiles = tl.cdiv(group_dim, BLOCK_D)
    pid_bs, pid_t = split(tl.program_id(0), tiles * num_groups)
    pid_b, pid_s = split(pid_bs, segments)
    pid_g, channel, offs_d, mask_d = _channels(pid_t, tiles, group_dim, BLOCK_D)
    place = (channel, offs_d, mask_d)
    a_ptrs, mask = _state_ptrs(a_ptr, 0, dim, states, states, 1, place, N)
    decay = tl.load(a_ptrs, mask=mask, other=0.0).to(ACC) * LOG2E
    bias = _vector(bias_ptr, place, HAS_BIAS, ACC)
    skip = _vector(d_ptr, place, HAS_D, ACC)
    offs_t = tl.arange(0, T)
    begin = pid_s * segment_len
    end = tl.minimum(begin + segment_len, length)
    if SEGMENTS:
        row = offset(pid_b, segments) + pid_s
        seg_ptrs, _ = _state_ptrs(seg_ptr, row, dim, states, 1, dim, place, N)
        h = tl.load(seg_ptrs, mask=mask, other=0.0)
    else:
        h = _first_state(start_ptr, pid_b, start_strides, states, place, N, HAS_START, ACC)
    for first in tl.range(begin, end, T, disable_licm=True):
        if KEEP:
            if first % CHUNK == 0:
                kept_row = offset(pid_b, chunks) + first // CHUNK
                kept_ptrs, _ = _state_ptrs(kept_ptr, kept_row, dim, states, 1, dim, place, N)
                tl.store(kept_ptrs, h, mask=mask)
        mask_t = first + offs_t < end
        u = _load_channels(u_ptr, pid_b, u_strides, place, first, mask_t, ACC, T)
        raw = _load_channels(delta_ptr, pid_b, delta_strides, place, first, mask_t, ACC, T)
        b = _load_projection(b_ptr, pid_b, pid_g, b_strides, states, first, mask_t, N, T, ACC)
        c = _load_projection(c_ptr, pid_b, pid_g, c_strides, states, first, mask_t, N, T, ACC)
        step = _step(raw, bias, mask_t, SOFTPLUS)
        h, y = _walk(h, step, step * u, b, c, decay, N, BLOCK_D, LOG_T)
        if HAS_D:
            y += skip * u
        if HAS_Z:
            z = _load_channels(z_ptr, pid_b, z_strides, place, first, mask_t, ACC, T)
            y = y * z * _sigmoid(z)
        _store_channels(out_ptr, pid_b, out_strides, place, first, mask_t, y, T)
    if pid_s == segments - 1:
        last_ptrs, _ = _state_ptrs(last_ptr, pid_b, dim, states, states, 1, place, N)
        tl.store(last_ptrs, h, mask=mask)


@triton.jit
def _selective_scan_bwd_kernel(
    u_ptr, delta_ptr, a_ptr, b_ptr, c_ptr, d_ptr, z_ptr, bias_ptr, kept_ptr, do_ptr, last_ptr,
    seg_ptr, space_ptr, du_ptr, ddelta_ptr, dz_ptr, db_ptr, dc_ptr, da_ptr, dvec_ptr, dstart_ptr,
    u_strides, delta_strides, b_strides, c_strides, z_strides, do_strides, last_strides,
    du_strides, ddelta_strides, dz_strides,
    dim, group_dim, num_groups, states, length, segments, segment_len, chunks,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_LAST: tl.constexpr,
    SOFTPLUS: tl.constexpr, SEGMENTS: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_D: tl.constexpr, N: tl.constexpr, LOG_T: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Gradients of a segment, chunk by chunk from the last to the first.

    A chunk is walked over once to note the state before each tile of tokens (in `space`), then
    back: a tile's states are computed again and held in registers. Parts that are summed later: db,
    dc `[B, tiles, L, N]`, da `[B, segments, N, D]`, dvec `[2, B, segments, D]` for D and bias.
    """
    T: tl.constexpr = 1 << LOG_T
    TILES: tl.constexpr = CHUNK // T
    tiles = tl.cdiv(group_dim, BLOCK_D)
    pid_bs, pid_t = split(tl.program_id(0), tiles * num_groups)
    pid_b, pid_s = split(pid_bs, segments)
    pid_g, channel, offs_d, mask_d = _channels(pid_t, tiles, group_dim, BLOCK_D)
    place = (channel, offs_d, mask_d)
    a_ptrs, mask = _state_ptrs(a_ptr, 0, dim, states, states, 1, place, N)
    a_real = tl.load(a_ptrs, mask=mask, other=0.0).to(ACC)
    bias = _vector(bias_ptr, place, HAS_BIAS, ACC)
    skip = _vector(d_ptr, place, HAS_D, ACC)
    offs_t, offs_n = tl.arange(0, T), tl.arange(0, N)
    begin = pid_s * segment_len
    end = tl.minimum(begin + segment_len, length)
    row = offset(pid_b, segments) + pid_s
    if SEGMENTS:
        seg_ptrs, _ = _state_ptrs(seg_ptr, row, dim, states, 1, dim, place, N)
        g = tl.load(seg_ptrs, mask=mask, other=0.0)
    else:
        g = _first_state(last_ptr, pid_b, last_strides, states, place, N, HAS_LAST, ACC)
    da = tl.zeros([N, BLOCK_D], ACC)
    dskip = tl.zeros([BLOCK_D], ACC)
    dbias = tl.zeros([BLOCK_D], ACC)
    offs_space = offs_n[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    space = space_ptr + offset(tl.program_id(0), TILES * N * BLOCK_D) + offs_space
    parts = offset(pid_b, tiles * num_groups) + pid_t

    for chunk in tl.range(0, tl.cdiv(end - begin, CHUNK), disable_licm=True):
        chunk_begin = begin + (tl.cdiv(end - begin, CHUNK) - 1 - chunk) * CHUNK
        count = tl.cdiv(tl.minimum(chunk_begin + CHUNK, end) - chunk_begin, T)
        kept_row = offset(pid_b, chunks) + chunk_begin // CHUNK
        kept_ptrs, _ = _state_ptrs(kept_ptr, kept_row, dim, states, 1, dim, place, N)
        h = tl.load(kept_ptrs, mask=mask, other=0.0)
        for k in tl.range(0, count, disable_licm=True):
            first = chunk_begin + k * T
            mask_t = first + offs_t < end
            tl.store(space + k * (N * BLOCK_D), h)
            u = _load_channels(u_ptr, pid_b, u_strides, place, first, mask_t, ACC, T)
            raw = _load_channels(delta_ptr, pid_b, delta_strides, place, first, mask_t, ACC, T)
            b = _load_projection(b_ptr, pid_b, pid_g, b_strides, states, first, mask_t, N, T, ACC)
            step = _step(raw, bias, mask_t, SOFTPLUS)
            h = _advance(h, step, step * u, b, a_real * LOG2E, N, BLOCK_D, LOG_T, False)
        tl.debug_barrier()  # threads read what others wrote to `space`
        for k in tl.range(0, count, disable_licm=True):
            tile = count - 1 - k
            first = chunk_begin + tile * T
            mask_t = first + offs_t < end
            u = _load_channels(u_ptr, pid_b, u_strides, place, first, mask_t, ACC, T)
            raw = _load_channels(delta_ptr, pid_b, delta_strides, place, first, mask_t, ACC, T)
            b = _load_projection(b_ptr, pid_b, pid_g, b_strides, states, first, mask_t, N, T, ACC)
            c = _load_projection(c_ptr, pid_b, pid_g, c_strides, states, first, mask_t, N, T, ACC)
            dy = _load_channels(do_ptr, pid_b, do_strides, place, first, mask_t, ACC, T)
            step = _step(raw, bias, mask_t, SOFTPLUS)
            x = step * u
            h = tl.load(space + tile * (N * BLOCK_D))
            if HAS_Z:
                z = _load_channels(z_ptr, pid_b, z_strides, place, first, mask_t, ACC, T)
                gate = _sigmoid(z)
                slope = dy * gate * (1.0 + z * (1.0 - gate))
                dy = dy * z * gate
            y = tl.zeros([BLOCK_D, T], ACC)
            steps = _columns(step, BLOCK_D, [1, BLOCK_D], LOG_T)
            xs = _columns(x, BLOCK_D, [1, BLOCK_D], LOG_T)
            dys = _columns(dy, BLOCK_D, [1, BLOCK_D], LOG_T)
            bs = _columns(b, N, [N, 1], LOG_T)
            cs = _columns(c, N, [N, 1], LOG_T)
            # Of each token: a_t h_{t-1}, and h_t.
            decayed = ()
            after = ()
            for i in tl.static_range(T):
                a = tl.exp2(steps[i] * (a_real * LOG2E))
                h = a * h
                decayed = decayed + (h,)
                h += xs[i] * bs[i]
                after = after + (h,)
                if HAS_Z:
                    y_i = tl.sum(h * cs[i], 0)
                    y = tl.where((offs_t == i)[None, :], y_i[:, None], y)
            if HAS_Z:
                if HAS_D:
                    y += skip * u
                _store_channels(dz_ptr, pid_b, dz_strides, place, first, mask_t, slope * y, T)
            dx = tl.zeros([BLOCK_D, T], ACC)
            dstep = tl.zeros([BLOCK_D, T], ACC)
            for i in tl.static_range(T - 1, -1, -1):
                is_i = (offs_t == i)[None, :]
                g += dys[i] * cs[i]
                dc_i = tl.sum(dys[i] * after[i], 1)
                db_i = tl.sum(xs[i] * g, 1)
                dx_i = tl.sum(g * bs[i], 0)
                w = g * decayed[i]
                da += w * steps[i]
                dstep_i = tl.sum(w * a_real, 0)
                dx = tl.where(is_i, dx_i[:, None], dx)
                dstep = tl.where(is_i, dstep_i[:, None], dstep)
                g = g * tl.exp2(steps[i] * (a_real * LOG2E))
                at = (offset(parts, length) + first + i) * states + offs_n
                mask_i = (offs_n < states) & (first + i < end)
                tl.store(db_ptr + at, db_i, mask=mask_i)
                tl.store(dc_ptr + at, dc_i, mask=mask_i)
            du = step * dx
            dstep += u * dx
            if HAS_D:
                du += skip * dy
                dskip += tl.sum(dy * u, 1)
            if SOFTPLUS:
                dstep = dstep * _sigmoid(raw + bias)
            dstep = tl.where(mask_t[None, :], dstep, 0.0)
            if HAS_BIAS:
                dbias += tl.sum(dstep, 1)
            _store_channels(du_ptr, pid_b, du_strides, place, first, mask_t, du, T)
            _store_channels(ddelta_ptr, pid_b, ddelta_strides, place, first, mask_t, dstep, T)
        tl.debug_barrier()  # the next chunk writes to `space` again

    da_ptrs, _ = _state_ptrs(da_ptr, row, dim, states, 1, dim, place, N)
    tl.store(da_ptrs, da, mask=mask)
    vec_ptrs = dvec_ptr + offset(row, dim) + channel + offs_d
    if HAS_D:
        tl.store(vec_ptrs, dskip, mask=mask_d)
    if HAS_BIAS:
        programs = tl.num_programs(0) // (tiles * num_groups)
        tl.store(vec_ptrs + offset(programs, dim), dbias, mask=mask_d)
    if pid_s == 0:
        dstart_ptrs, _ = _state_ptrs(dstart_ptr, pid_b, dim, states, states, 1, place, N)
        tl.store(dstart_ptrs, g, mask=mask)


# Results, in functions of their own so that a test can put them elsewhere.
def _like(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(tensor)


def _wide(A: torch.Tensor, *shape: int) -> torch.Tensor:
    """States and partial sums, contiguous."""
    return torch.empty(shape, dtype=A.dtype, device=A.device)


def _segments(u: torch.Tensor, chunk: int, programs: int) -> int:
    """Segments that the tokens are cut into: one, unless a GPU would stay idle."""
    wanted = 1
    if u.is_cuda:
        # A warp each, and room for three on each of a multiprocessor's four schedulers.
        wanted = 12 * torch.cuda.get_device_properties(u.device).multi_processor_count
    return min(triton.cdiv(u.shape[2], chunk), max(1, triton.cdiv(wanted, programs)))


def configs(table: dict, A: torch.Tensor) -> tuple[Config, ...]:
    """The configs of a table for so many states, the shipped one first."""
    return next(found for most, found in table.items() if A.shape[1] <= most)


class _Launch:
    """What the launches of one call share."""

    def __init__(self, u, A, B, chunk, config, segments):  # type: ignore[no-untyped-def]
        batch, dim, length = u.shape
        groups = B.shape[1]
        self.config = config
        self.tiles = groups * triton.cdiv(dim // groups, config.channels)
        self.segments = segments or _segments(u, chunk, batch * self.tiles)
        chunks = triton.cdiv(length, chunk)
        per_segment = triton.cdiv(chunks, self.segments)
        self.segments = triton.cdiv(chunks, per_segment)
        self.programs = batch * self.segments * self.tiles
        self.sizes = (dim, dim // groups, groups, A.shape[1], length, self.segments)
        self.sizes += (per_segment * chunk,)
        self.chunks = chunks
        self.options = {
            "BLOCK_D": config.channels,
            "N": max(2, triton.next_power_of_2(A.shape[1])),
            "LOG_T": config.tokens.bit_length() - 1,
            "ACC": tl.float64 if A.dtype == torch.float64 else tl.float32,
            "num_warps": 1,
            "num_stages": 1,
        }

    def starts(self, given, delta, A, projection, z, bias, softplus, first, reverse):  # type: ignore[no-untyped-def]
        """The true state that each segment starts from, `[B, segments, N, D]`."""
        batch, dim, _ = delta.shape
        states = A.shape[1]
        end = _wide(A, batch, self.segments, states, dim)
        total = _wide(A, batch, self.segments, dim)
        gate = delta if z is None else z
        _selective_scan_segment_kernel[(self.programs,)](
            given, delta, A, projection, gate, A if bias is None else bias, end, total,
            given.stride(), delta.stride(), projection.stride(), gate.stride(), *self.sizes,
            HAS_Z=z is not None, HAS_BIAS=bias is not None, SOFTPLUS=softplus, REVERSE=reverse,
            **self.options,
        )  # fmt: skip
        carry = {name: self.options[name] for name in ("N", "ACC", "num_warps", "num_stages")}
        start = end[:, 0].mT if first is None else first
        _selective_scan_carry_kernel[(batch * triton.cdiv(dim, 8),)](
            A, start, end, total, start.stride(), dim, states, self.segments,
            HAS_START=first is not None, REVERSE=reverse, BLOCK_D=8, **carry,
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
    A, D, delta_bias = (None if t is None else t.contiguous() for t in (A, D, delta_bias))
    out, last = _like(u), _wide(A, batch, dim, A.shape[1])
    chunks = triton.cdiv(length, chunk) if keep_states else 0
    kept = _wide(A, batch, chunks, A.shape[1], dim)
    if not u.numel():
        last.zero_() if initial_state is None else last.copy_(initial_state)
        return out, last, kept
    launch = _Launch(u, A, B, chunk, config or configs(FORWARD, A)[0], segments)
    several = launch.segments > 1
    starts = A
    if several:
        starts = launch.starts(u, delta, A, B, None, delta_bias, delta_softplus, initial_state, False)
    gate = u if z is None else z
    start = last if initial_state is None else initial_state
    _selective_scan_fwd_kernel[(launch.programs,)](
        u, delta, A, B, C, A if D is None else D, gate, A if delta_bias is None else delta_bias,
        start, starts, out, last, kept,
        u.stride(), delta.stride(), B.stride(), C.stride(), gate.stride(), start.stride(),
        out.stride(), *launch.sizes, launch.chunks,
        HAS_D=D is not None, HAS_Z=z is not None, HAS_BIAS=delta_bias is not None,
        HAS_START=initial_state is not None, SOFTPLUS=delta_softplus, SEGMENTS=several,
        KEEP=keep_states, CHUNK=chunk, **launch.options,
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
    A, D, delta_bias = (None if t is None else t.contiguous() for t in (A, D, delta_bias))
    du, ddelta = _like(u), _like(delta)
    dz = None if z is None else _like(z)
    dstart = _wide(A, batch, dim, num_states)
    if u.numel():
        launch = _Launch(u, A, B, chunk, config or configs(BACKWARD, A)[0], segments)
        several = launch.segments > 1
        starts = A
        if several:
            starts = launch.starts(
                grad_out, delta, A, C, z, delta_bias, delta_softplus, grad_last_state, True
            )
        db, dc = (_wide(A, batch, launch.tiles, length, num_states) for _ in range(2))
        da = _wide(A, batch, launch.segments, num_states, dim)
        dvec = _wide(A, 2, batch, launch.segments, dim)
        options = launch.options
        tile = options["BLOCK_D"] * options["N"]
        space = _wide(A, launch.programs, chunk // launch.config.tokens, tile)
        gate, dgate = (u, du) if z is None else (z, dz)
        last = dstart if grad_last_state is None else grad_last_state
        _selective_scan_bwd_kernel[(launch.programs,)](
            u, delta, A, B, C, A if D is None else D, gate,
            A if delta_bias is None else delta_bias, states, grad_out, last, starts, space,
            du, ddelta, dgate, db, dc, da, dvec, dstart,
            u.stride(), delta.stride(), B.stride(), C.stride(), gate.stride(), grad_out.stride(),
            last.stride(), du.stride(), ddelta.stride(), dgate.stride(), *launch.sizes,
            launch.chunks,
            HAS_D=D is not None, HAS_Z=z is not None, HAS_BIAS=delta_bias is not None,
            HAS_LAST=grad_last_state is not None, SOFTPLUS=delta_softplus, SEGMENTS=several,
            CHUNK=chunk, **options,
        )  # fmt: skip
        dB, dC = (t.unflatten(1, (groups, -1)).sum(2).mT.to(B.dtype) for t in (db, dc))
        dA, dD, dbias = da.sum((0, 1)).T, dvec[0].sum((0, 1)), dvec[1].sum((0, 1))
    else:
        dB, dC, dA = torch.zeros_like(B), torch.zeros_like(C), torch.zeros_like(A)
        dD = dbias = A.new_zeros(dim)
        dstart.zero_() if grad_last_state is None else dstart.copy_(grad_last_state)
    optional = ((D, dD), (z, dz), (delta_bias, dbias), (initial_state, dstart))
    return [du, ddelta, dA, dB, dC, *(grad for given, grad in optional if given is not None)]
