# mypy: ignore-errors
"""Triton form of `extract_regions` and `stitch_regions`: each is one pass over its input.

    extract   out[b, r, c, y, x] = image[b, c, top_r + y, left_r + x] * gain_c + bias_c
    stitch    out[b, place(r, i, j), c] = features[b, r, i, j, c] + code(row_r + i, col_r + j)_c

The code is the 2D sin-cos position of the released xT: sin(x w_k), cos(x w_k) on the first half of
the channels, sin(y w_k), cos(y w_k) on the second, x the column and y the row of the token.

Extraction: a program owns ROWS x BLOCK_W pixels of one region for BLOCK_C channels, and writes 0
outside the image. Stitching: a program owns BLOCK_L columns (first half) or rows (second half) of a
region's tokens and BLOCK_C channels; all tokens of such a line share one code, which is computed
once and added along the line. Backward of each is its adjoint, so nothing is kept but shapes.
Arithmetic is fp32, fp64 for fp64 input. All programs are in grid x: y and z end at 65,535.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl

from .._aot import AotCase
from .._tiles import offset, split


@dataclass(frozen=True)
class Config:
    """Launch sizes; a block larger than the work at hand is cut down to it."""

    tile: dict[str, int]
    num_warps: int


# Chosen by reading the code that comes out, not yet by measurement: the first of each is shipped.
# A program owns ROWS rows of a region, BLOCK_H at a time. Images whose pixels of one channel lie
# next to each other are read as vectors:
EXTRACT_PLANES_CONFIGS = (
    Config({"ROWS": 8, "BLOCK_H": 4, "BLOCK_W": 256, "BLOCK_C": 4}, num_warps=4),
    Config({"ROWS": 8, "BLOCK_H": 8, "BLOCK_W": 256, "BLOCK_C": 4}, num_warps=4),
    Config({"ROWS": 16, "BLOCK_H": 2, "BLOCK_W": 256, "BLOCK_C": 4}, num_warps=8),
)
# Interleaved channels are read value by value, so BLOCK_H is small and a thread has one or two
# columns of a row: a warp's load of 32 of them spans few cache lines.
EXTRACT_PIXELS_CONFIGS = (
    Config({"ROWS": 16, "BLOCK_H": 1, "BLOCK_W": 256, "BLOCK_C": 4}, num_warps=8),
    Config({"ROWS": 8, "BLOCK_H": 2, "BLOCK_W": 256, "BLOCK_C": 4}, num_warps=8),
    Config({"ROWS": 4, "BLOCK_H": 1, "BLOCK_W": 256, "BLOCK_C": 4}, num_warps=4),
)
# A program owns BLOCK_L lines of tokens, BLOCK_S tokens of each at a time. Features whose channels
# lie next to each other are copied row by row:
STITCH_ROWS_CONFIGS = (
    Config({"BLOCK_S": 2, "BLOCK_L": 8, "BLOCK_C": 128}, num_warps=4),
    Config({"BLOCK_S": 4, "BLOCK_L": 8, "BLOCK_C": 128}, num_warps=4),
    Config({"BLOCK_S": 8, "BLOCK_L": 4, "BLOCK_C": 128}, num_warps=4),
)
# Features whose tokens lie next to each other are read along tokens and written along channels:
STITCH_PLANES_CONFIGS = (
    Config({"BLOCK_S": 8, "BLOCK_L": 8, "BLOCK_C": 32}, num_warps=4),
    Config({"BLOCK_S": 8, "BLOCK_L": 8, "BLOCK_C": 64}, num_warps=8),
)


@triton.jit
def _sin_turns(angle):
    """sin(2 pi angle / 2**64), fp32, of a 64-bit fixed-point angle: absolute error below 3e-7."""
    phase = (angle >> 33).to(tl.int32)  # in [-2**30, 2**30): half a turn each way
    size = tl.abs(phase)
    size = tl.minimum(size, (1 << 30) - size)  # sin(pi - a) = sin(a); at most a quarter turn
    turns = size.to(tl.float32) * 4.656612873077393e-10  # 2**-31
    square = turns * turns
    # Minimax fit of sin(2 pi t) / t in t**2 on [0, 1/4]; the fit itself is off by 3.4e-9.
    value = 39.53670659630734 * square - 76.54978237250998
    value = value * square + 81.60100407726651
    value = value * square - 41.34165503149489
    value = (value * square + 6.283185160089938) * turns
    return tl.where(phase < 0, -value, value)


@triton.jit
def _line_code(index, turns_ptr, offs_c, mask_c, quarter):
    """Position code [lines, channels], fp32, of token indices `index` on one axis.

    turns holds round(2**64 w_k / 2 pi). The 64-bit product with an integer index wraps, which drops
    whole turns exactly; what remains is off by index * 2**-55 turns at most.
    """
    is_cos = offs_c >= quarter
    turns = tl.load(turns_ptr + tl.where(is_cos, offs_c - quarter, offs_c), mask=mask_c, other=0)
    # cos(a) = sin(a + a quarter turn)
    return _sin_turns(index[:, None] * turns[None, :] + (is_cos.to(tl.int64) << 62)[None, :])


@triton.jit
def _scale_strip(
    source_ptr,
    target_ptr,
    gain_ptr,
    bias_ptr,
    source_strides,
    target_strides,
    height,
    width,
    target_height,
    target_width,
    channels,
    first_row,
    first_col,
    first_channel,
    HAS_BIAS: tl.constexpr,
    PADS: tl.constexpr,
    UNIT: tl.constexpr,
    INTERLEAVE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):
    """target = source * gain + bias inside height x width; with PADS 0 outside, up to the target.

    Pointers are to the first channel; strides are those of (channel, row, column), the first two in
    units of UNIT elements.
    """
    offs_w = first_col + tl.arange(0, BLOCK_W)
    source_cols = offset(offs_w, source_strides[2])[None, :]
    target_cols = offset(offs_w, target_strides[2])[None, :]
    source_channel = tl.cast(source_strides[0], tl.int64) * UNIT
    target_channel = tl.cast(target_strides[0], tl.int64) * UNIT
    # All loads come before the first store: it may alias them, so the compiler moves none past it.
    gains = ()
    biases = ()
    for step in tl.static_range(BLOCK_C):
        if INTERLEAVE == 1:
            live = first_channel + step < channels
            gains += (tl.load(gain_ptr + first_channel + step, mask=live, other=0.0),)
            if HAS_BIAS:
                biases += (tl.load(bias_ptr + first_channel + step, mask=live, other=0.0),)
        else:
            gains += (tl.load(gain_ptr + offs_w % INTERLEAVE)[None, :],)
            if HAS_BIAS:
                biases += (tl.load(bias_ptr + offs_w % INTERLEAVE)[None, :],)
    tiles = ()
    for row in tl.static_range(0, ROWS, BLOCK_H):
        offs_h = first_row + row + tl.arange(0, BLOCK_H)
        mask = (offs_h < height)[:, None] & (offs_w < width)[None, :]
        ptrs = source_ptr + offset(offs_h, source_strides[1])[:, None] * UNIT + source_cols
        for step in tl.static_range(BLOCK_C):
            mask_c = first_channel + step < channels
            tiles += (tl.load(ptrs + step * source_channel, mask=mask & mask_c),)
    for row in tl.static_range(0, ROWS, BLOCK_H):
        offs_h = first_row + row + tl.arange(0, BLOCK_H)
        mask = (offs_h < height)[:, None] & (offs_w < width)[None, :]
        mask_target = (offs_h < target_height)[:, None] & (offs_w < target_width)[None, :]
        ptrs = target_ptr + offset(offs_h, target_strides[1])[:, None] * UNIT + target_cols
        for step in tl.static_range(BLOCK_C):
            mask_c = first_channel + step < channels
            values = tiles[row // BLOCK_H * BLOCK_C + step].to(ACC) * gains[step]
            if HAS_BIAS:
                values += biases[step]
            if PADS:
                # Padding is zero after normalisation, not black.
                values = tl.where(mask, values, 0.0)
            tl.store(
                ptrs + step * target_channel,
                values.to(target_ptr.dtype.element_ty),
                mask=mask_target & mask_c,
            )


@triton.jit
def _extract_regions_fwd_kernel(
    image_ptr,
    boxes_ptr,
    gain_ptr,
    bias_ptr,
    out_ptr,
    image_strides,
    boxes_stride,
    out_strides,
    num_regions,
    channels,
    SIDE: tl.constexpr,
    UNIT: tl.constexpr,
    INTERLEAVE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):
    """Writes out[b, r, c, y, x] for ROWS x BLOCK_W pixels of one region and BLOCK_C channels.

    UNIT: all strides but that of columns are given in units of so many elements, and left edges
    are multiples of it: this is how the compiler learns that vector loads are aligned.
    INTERLEAVE: C > 1 where channels are interleaved on both sides: columns are x * C + c, and there
    is one plane.
    """
    SPAN: tl.constexpr = SIDE * INTERLEAVE
    pid, pid_w = split(tl.program_id(0), tl.cdiv(SPAN, BLOCK_W))
    pid, pid_h = split(pid, tl.cdiv(SIDE, ROWS))
    pid, pid_c = split(pid, tl.cdiv(channels, BLOCK_C))
    pid_b, pid_r = split(pid, num_regions)

    box_ptr = boxes_ptr + offset(pid_r, boxes_stride)
    top, left = tl.load(box_ptr), tl.load(box_ptr + 1)
    height, width = tl.load(box_ptr + 2).to(tl.int32), tl.load(box_ptr + 3).to(tl.int32)
    left = left // UNIT * UNIT * INTERLEAVE
    image_ptr += (offset(pid_b, image_strides[0]) + top * image_strides[2]) * UNIT
    image_ptr += left * image_strides[3]
    out_ptr += (offset(pid_b, out_strides[0]) + offset(pid_r, out_strides[1])) * UNIT
    image_strides = (image_strides[1], image_strides[2], image_strides[3])
    out_strides = (out_strides[2], out_strides[3], out_strides[4])
    first = (pid_h * ROWS, pid_w * BLOCK_W, pid_c * BLOCK_C)
    image_ptr += offset(first[2], image_strides[0]) * UNIT
    out_ptr += offset(first[2], out_strides[0]) * UNIT
    # Regions that are all image are masked with constant edges, which keeps loads vectorised.
    if (height == SIDE) & (width == SIDE):
        _scale_strip(
            image_ptr, out_ptr, gain_ptr, bias_ptr, image_strides, out_strides,
            SIDE, SPAN, SIDE, SPAN, channels, first[0], first[1], first[2],
            True, False, UNIT, INTERLEAVE, ROWS, BLOCK_H, BLOCK_W, BLOCK_C, ACC,
        )  # fmt: skip
    else:
        _scale_strip(
            image_ptr, out_ptr, gain_ptr, bias_ptr, image_strides, out_strides,
            height, width * INTERLEAVE, SIDE, SPAN, channels, first[0], first[1], first[2],
            True, True, UNIT, INTERLEAVE, ROWS, BLOCK_H, BLOCK_W, BLOCK_C, ACC,
        )  # fmt: skip


@triton.jit
def _extract_regions_bwd_kernel(
    grad_ptr,
    boxes_ptr,
    gain_ptr,
    grad_image_ptr,
    grad_strides,
    boxes_stride,
    grad_image_strides,
    num_regions,
    channels,
    SIDE: tl.constexpr,
    UNIT: tl.constexpr,
    INTERLEAVE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):
    """Writes grad * gain to the pixels of one strip of a region; others are not touched.

    Regions are distinct, so no two programs write the same pixel.
    """
    SPAN: tl.constexpr = SIDE * INTERLEAVE
    pid, pid_w = split(tl.program_id(0), tl.cdiv(SPAN, BLOCK_W))
    pid, pid_h = split(pid, tl.cdiv(SIDE, ROWS))
    pid, pid_c = split(pid, tl.cdiv(channels, BLOCK_C))
    pid_b, pid_r = split(pid, num_regions)

    box_ptr = boxes_ptr + offset(pid_r, boxes_stride)
    top, left = tl.load(box_ptr), tl.load(box_ptr + 1)
    height, width = tl.load(box_ptr + 2).to(tl.int32), tl.load(box_ptr + 3).to(tl.int32)
    left = left // UNIT * UNIT * INTERLEAVE
    grad_ptr += (offset(pid_b, grad_strides[0]) + offset(pid_r, grad_strides[1])) * UNIT
    grad_image_ptr += (offset(pid_b, grad_image_strides[0]) + top * grad_image_strides[2]) * UNIT
    grad_image_ptr += left * grad_image_strides[3]
    grad_strides = (grad_strides[2], grad_strides[3], grad_strides[4])
    grad_image_strides = (grad_image_strides[1], grad_image_strides[2], grad_image_strides[3])
    first = (pid_h * ROWS, pid_w * BLOCK_W, pid_c * BLOCK_C)
    grad_ptr += offset(first[2], grad_strides[0]) * UNIT
    grad_image_ptr += offset(first[2], grad_image_strides[0]) * UNIT
    if (height == SIDE) & (width == SIDE):
        _scale_strip(
            grad_ptr, grad_image_ptr, gain_ptr, gain_ptr, grad_strides, grad_image_strides,
            SIDE, SPAN, SIDE, SPAN, channels, first[0], first[1], first[2],
            False, False, UNIT, INTERLEAVE, ROWS, BLOCK_H, BLOCK_W, BLOCK_C, ACC,
        )  # fmt: skip
    else:
        width *= INTERLEAVE
        _scale_strip(
            grad_ptr, grad_image_ptr, gain_ptr, gain_ptr, grad_strides, grad_image_strides,
            height, width, height, width, channels, first[0], first[1], first[2],
            False, False, UNIT, INTERLEAVE, ROWS, BLOCK_H, BLOCK_W, BLOCK_C, ACC,
        )  # fmt: skip


@triton.jit
def _stitch_lines(
    features_ptr,
    out_ptr,
    turns_ptr,
    feature_step,
    feature_line,
    feature_channel,
    out_step,
    out_line,
    out_channel,
    num_steps,
    num_lines,
    first_line,
    index,
    first_channel,
    half,
    SIDE: tl.constexpr,
    HAS_POSITION: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):
    """Copies BLOCK_L lines of tokens and BLOCK_C channels, BLOCK_S steps at a time, plus the code.

    index: place of line 0 on the axis of the image that the code counts.
    """
    offs_l = first_line + tl.arange(0, BLOCK_L)
    offs_c = first_channel + tl.arange(0, BLOCK_C)
    mask_c = offs_c < half
    # Padding tokens are read, not written: a mask with a constant edge keeps loads vectorised.
    mask_read = (offs_l < SIDE)[:, None] & mask_c[None, :]
    mask_write = (offs_l < num_lines)[:, None] & mask_c[None, :]
    features_ptrs = features_ptr + (
        offset(offs_l, feature_line)[:, None] + offset(offs_c, feature_channel)[None, :]
    )
    out_ptrs = out_ptr + offset(offs_l, out_line)[:, None] + offset(offs_c, out_channel)[None, :]
    if HAS_POSITION:
        code = _line_code(index + offs_l, turns_ptr, offs_c, mask_c, half // 2)[None, :, :]
    for first_step in range(0, num_steps, BLOCK_S):
        offs_s = first_step + tl.arange(0, BLOCK_S)
        tokens = tl.load(
            features_ptrs[None, :, :] + offset(offs_s, feature_step)[:, None, None],
            mask=(offs_s < SIDE)[:, None, None] & mask_read[None, :, :],
            other=0.0,
        ).to(ACC)  # [BLOCK_S, BLOCK_L, BLOCK_C]
        if HAS_POSITION:
            tokens += code.to(ACC)
        tl.store(
            out_ptrs[None, :, :] + offset(offs_s, out_step)[:, None, None],
            tokens.to(out_ptr.dtype.element_ty),
            mask=(offs_s < num_steps)[:, None, None] & mask_write[None, :, :],
        )


@triton.jit
def _stitch_regions_fwd_kernel(
    features_ptr,
    table_ptr,
    turns_ptr,
    out_ptr,
    feature_strides,
    table_stride,
    out_strides,
    num_regions,
    half,
    SIDE: tl.constexpr,
    HAS_POSITION: tl.constexpr,
    PLANES: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):
    """Writes the tokens of one region, for BLOCK_L of its columns or rows, to their places.

    half: channels that share a code axis, C / 2; C without position.
    """
    feature_row = feature_strides[2]
    if PLANES:
        # A constant multiple, so that the compiler sees vectors of whole rows.
        feature_row = tl.cast(feature_strides[3], tl.int64) * SIDE
    pid, pid_c = split(tl.program_id(0), tl.cdiv(half, BLOCK_C))
    pid_axis = 0
    if HAS_POSITION:
        pid, pid_axis = split(pid, 2)
    pid, pid_l = split(pid, tl.cdiv(SIDE, BLOCK_L))
    pid_b, pid_r = split(pid, num_regions)

    row_ptr = table_ptr + offset(pid_r, table_stride)
    start, pitch = tl.load(row_ptr), tl.load(row_ptr + 1)
    height, width = tl.load(row_ptr + 2).to(tl.int32), tl.load(row_ptr + 3).to(tl.int32)
    out_pitch = pitch * out_strides[1]

    features_ptr += offset(pid_b, feature_strides[0]) + offset(pid_r, feature_strides[1])
    out_ptr += offset(pid_b, out_strides[0]) + start * out_strides[1]
    if HAS_POSITION:
        features_ptr += offset(pid_axis * half, feature_strides[4])
        out_ptr += offset(pid_axis * half, out_strides[2])
    first = (pid_l * BLOCK_L, pid_c * BLOCK_C)
    # The two calls differ in what is a line: strides known to be 1 stay known in each.
    if pid_axis == 0:
        _stitch_lines(
            features_ptr, out_ptr, turns_ptr, feature_row, feature_strides[3], feature_strides[4],
            out_pitch, out_strides[1], out_strides[2], height, width, first[0],
            tl.load(row_ptr + 5), first[1], half,
            SIDE, HAS_POSITION, BLOCK_S, BLOCK_L, BLOCK_C, ACC,
        )  # fmt: skip
    else:
        _stitch_lines(
            features_ptr, out_ptr, turns_ptr, feature_strides[3], feature_row, feature_strides[4],
            out_strides[1], out_pitch, out_strides[2], width, height, first[0],
            tl.load(row_ptr + 4), first[1], half,
            SIDE, HAS_POSITION, BLOCK_S, BLOCK_L, BLOCK_C, ACC,
        )  # fmt: skip


@triton.jit
def _stitch_regions_bwd_kernel(
    grad_out_ptr,
    table_ptr,
    grad_ptr,
    grad_out_strides,
    table_stride,
    grad_strides,
    num_regions,
    channels,
    SIDE: tl.constexpr,
    PLANES: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Writes grad_features[b, r, i, j, c] for BLOCK_S rows i, BLOCK_L columns j: the gradient at
    the token's place, zero for pure padding.
    """
    grad_row = grad_strides[2]
    if PLANES:
        grad_row = tl.cast(grad_strides[3], tl.int64) * SIDE
    pid, pid_c = split(tl.program_id(0), tl.cdiv(channels, BLOCK_C))
    pid, pid_l = split(pid, tl.cdiv(SIDE, BLOCK_L))
    pid, pid_s = split(pid, tl.cdiv(SIDE, BLOCK_S))
    pid_b, pid_r = split(pid, num_regions)

    row_ptr = table_ptr + offset(pid_r, table_stride)
    start, pitch = tl.load(row_ptr), tl.load(row_ptr + 1)
    height, width = tl.load(row_ptr + 2), tl.load(row_ptr + 3)

    offs_i = pid_s * BLOCK_S + tl.arange(0, BLOCK_S)
    offs_j = pid_l * BLOCK_L + tl.arange(0, BLOCK_L)
    offs_c = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = (offs_c < channels)[None, None, :]
    mask_token = (offs_i < height)[:, None, None] & (offs_j < width)[None, :, None]
    mask_grad = (offs_i < SIDE)[:, None, None] & (offs_j < SIDE)[None, :, None]

    grad_out_ptr += offset(pid_b, grad_out_strides[0]) + start * grad_out_strides[1]
    grads = tl.load(
        grad_out_ptr
        + (offs_i * (pitch * grad_out_strides[1]))[:, None, None]
        + offset(offs_j, grad_out_strides[1])[None, :, None]
        + offset(offs_c, grad_out_strides[2])[None, None, :],
        mask=mask_token & mask_c,
        other=0.0,
    )  # [BLOCK_S, BLOCK_L, BLOCK_C]
    grad_ptr += offset(pid_b, grad_strides[0]) + offset(pid_r, grad_strides[1])
    tl.store(
        grad_ptr
        + offset(offs_i, grad_row)[:, None, None]
        + offset(offs_j, grad_strides[3])[None, :, None]
        + offset(offs_c, grad_strides[4])[None, None, :],
        grads.to(grad_ptr.dtype.element_ty),
        mask=mask_grad & mask_c,
    )


def extract_configs(image: torch.Tensor) -> tuple[Config, ...]:
    """The configs that suit the layout of `image` `[B, C, h, w]`."""
    return EXTRACT_PLANES_CONFIGS if image.stride(3) == 1 else EXTRACT_PIXELS_CONFIGS


def stitch_configs(features: torch.Tensor) -> tuple[Config, ...]:
    """The configs that suit the layout of `features` `[B, R, t, t, C]`."""
    rows = features.stride(4) == 1 or features.shape[4] == 1
    return STITCH_ROWS_CONFIGS if rows else STITCH_PLANES_CONFIGS


def _fitted(tile: dict[str, int], **sizes: int) -> dict[str, Any]:
    """`tile` with each block no larger than its size here needs."""
    return {k: min(v, triton.next_power_of_2(sizes[k])) for k, v in tile.items()}


def _strip_tile(config: Config, pixel: torch.dtype) -> dict[str, int]:
    """The tile of `config`; less high for pixels wider than a byte, which fill registers."""
    rows = config.tile["ROWS"] // {1: 1, 8: 4}.get(pixel.itemsize, 2)
    return {**config.tile, "ROWS": rows, "BLOCK_H": min(rows, config.tile["BLOCK_H"])}


def _flattened(
    image: torch.Tensor, regions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """`image` and `regions` with (w, C) merged into one axis and C left as 1, where both are stored
    so; and how many elements a column then has.
    """
    channels, side = regions.shape[2], regions.shape[4]
    interleaved = image.stride(1) == 1 and image.stride(3) == channels
    interleaved &= regions.stride(2) == 1 and regions.stride(4) == channels
    if channels == 1 or not interleaved:
        return image, regions, 1
    batch, _, height, width = image.shape
    sb, _, sh, _ = image.stride()
    image = image.as_strided((batch, 1, height, width * channels), (sb, 1, sh, 1))
    rb, rr, _, rh, _ = regions.stride()
    shape = (batch, regions.shape[1], 1, side, side * channels)
    return image, regions.as_strided(shape, (rb, rr, 1, rh, 1)), channels


def _strides_in_units(
    image: torch.Tensor, regions: torch.Tensor, aligned: bool
) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Strides of both as the kernels take them, and UNIT: 8 where everything is a multiple of 8."""
    strides = [
        # The stride of an axis of size one says nothing.
        [0 if n == 1 else s for n, s in zip(t.shape[:-1], t.stride()[:-1], strict=True)]
        for t in (image, regions)
    ]
    aligned &= image.stride(-1) == regions.stride(-1) == 1
    unit = 8 if aligned and all(s % 8 == 0 for s in strides[0] + strides[1]) else 1
    first, second = (tuple(s // unit for s in one) for one in strides)
    return (*first, image.stride(-1)), (*second, regions.stride(-1)), unit


def _extract_launch(
    image: torch.Tensor, regions: torch.Tensor, config: Config | None
) -> tuple[tuple[int], dict[str, Any]]:
    """Grid and options of both directions; both tensors are as `_flattened` gives them."""
    batch, num_regions, channels, side, span = regions.shape
    config = config or extract_configs(image)[0]
    tile = _fitted(
        _strip_tile(config, image.dtype), ROWS=side, BLOCK_H=side, BLOCK_W=span, BLOCK_C=channels
    )
    # BLOCK_C only unrolls a loop, so it need not be a power of two.
    tile["BLOCK_C"] = min(channels, config.tile["BLOCK_C"])
    programs = batch * num_regions * triton.cdiv(channels, tile["BLOCK_C"])
    programs *= triton.cdiv(side, tile["ROWS"]) * triton.cdiv(span, tile["BLOCK_W"])
    acc = tl.float64 if image.dtype == torch.float64 else tl.float32
    return (programs,), {**tile, "SIDE": side, "ACC": acc, "num_warps": config.num_warps}


def launch_extract_forward(
    image: torch.Tensor,
    boxes: torch.Tensor,
    gain: torch.Tensor,
    bias: torch.Tensor,
    out: torch.Tensor,
    aligned: bool = False,
    config: Config | None = None,
) -> None:
    """Fills `out` `[B, R, C, s, s]` from `image` `[B, C, h, w]`.

    boxes: int64 `[R, 4]`: top, left in the window, height, width in pixels inside the image.
    gain, bias: `[C]`, fp32, or fp64 for an fp64 image.
    aligned: every left edge is a multiple of 8 pixels.
    """
    if out.numel() == 0:
        return
    num_regions, channels = out.shape[1:3]
    image, out, interleave = _flattened(image, out)
    image_strides, out_strides, unit = _strides_in_units(image, out, aligned)
    grid, options = _extract_launch(image, out, config)
    _extract_regions_fwd_kernel[grid](
        image,
        boxes,
        gain,
        bias,
        out,
        image_strides,
        boxes.stride(0),
        out_strides,
        num_regions,
        channels if interleave == 1 else 1,
        UNIT=unit,
        INTERLEAVE=interleave,
        **options,
    )


def launch_extract_backward(
    grad: torch.Tensor,
    boxes: torch.Tensor,
    gain: torch.Tensor,
    grad_image: torch.Tensor,
    aligned: bool = False,
    config: Config | None = None,
) -> None:
    """Writes `grad` `[B, R, C, s, s]` times gain to `grad_image` `[B, C, h, w]` at `boxes`, which
    are distinct; other pixels are left as they are.
    """
    if grad.numel() == 0:
        return
    num_regions, channels = grad.shape[1:3]
    grad_image, grad, interleave = _flattened(grad_image, grad)
    grad_image_strides, grad_strides, unit = _strides_in_units(grad_image, grad, aligned)
    grid, options = _extract_launch(grad_image, grad, config)
    _extract_regions_bwd_kernel[grid](
        grad,
        boxes,
        gain,
        grad_image,
        grad_strides,
        boxes.stride(0),
        grad_image_strides,
        num_regions,
        channels if interleave == 1 else 1,
        UNIT=unit,
        INTERLEAVE=interleave,
        **options,
    )


def _planes(features: torch.Tensor) -> bool:
    """Whether rows of tokens follow one another in `features` `[B, R, t, t, C]`."""
    return features.stride(2) == features.shape[3] * features.stride(3)


def launch_stitch_forward(
    features: torch.Tensor,
    table: torch.Tensor,
    turns: torch.Tensor | None,
    out: torch.Tensor,
    config: Config | None = None,
) -> None:
    """Writes `features` `[B, R, t, t, C]` to their places in `out` `[B, L, C]`.

    table: int64 `[R, 6]`, the rows of `Placement.table` of the regions.
    turns: int64 `[C / 4]`, round(2**64 w_k / 2 pi), or None for no position.
    """
    if features.numel() == 0:
        return
    batch, num_regions, side, _, channels = features.shape
    half = channels if turns is None else channels // 2
    config = config or stitch_configs(features)[0]
    tile = _fitted(config.tile, BLOCK_S=side, BLOCK_L=side, BLOCK_C=half)
    programs = batch * num_regions * (1 if turns is None else 2)
    programs *= triton.cdiv(side, tile["BLOCK_L"]) * triton.cdiv(half, tile["BLOCK_C"])
    _stitch_regions_fwd_kernel[(programs,)](
        features,
        table,
        table if turns is None else turns,
        out,
        features.stride(),
        table.stride(0),
        out.stride(),
        num_regions,
        half,
        SIDE=side,
        HAS_POSITION=turns is not None,
        PLANES=_planes(features),
        ACC=tl.float64 if features.dtype == torch.float64 else tl.float32,
        num_warps=config.num_warps,
        **tile,
    )


def launch_stitch_backward(
    grad_out: torch.Tensor,
    table: torch.Tensor,
    grad_features: torch.Tensor,
    config: Config | None = None,
) -> None:
    """Fills `grad_features` `[B, R, t, t, C]` from `grad_out` `[B, L, C]`."""
    if grad_features.numel() == 0:
        return
    batch, num_regions, side, _, channels = grad_features.shape
    config = config or stitch_configs(grad_features)[0]
    tile = _fitted(config.tile, BLOCK_S=side, BLOCK_L=side, BLOCK_C=channels)
    programs = batch * num_regions * triton.cdiv(channels, tile["BLOCK_C"])
    programs *= triton.cdiv(side, tile["BLOCK_S"]) * triton.cdiv(side, tile["BLOCK_L"])
    _stitch_regions_bwd_kernel[(programs,)](
        grad_out,
        table,
        grad_features,
        grad_out.stride(),
        table.stride(0),
        grad_features.stride(),
        num_regions,
        channels,
        SIDE=side,
        PLANES=_planes(grad_features),
        num_warps=config.num_warps,
        **tile,
    )


def aot_cases(everything: bool = False) -> Iterator[AotCase]:
    """What the launchers compile: every config, 256 px regions, 8 x 8 tokens of 768 channels.

    everything: of every config each dtype of pixels, to bf16 and fp32, and each of features.
    """
    planes = ("i64", "i64", "i32", 1)
    pixels = ("i64", 1, "i32", "i32")
    regions = ("i64", "i64", "i32", "i32", 1)

    def extract(
        name: str,
        config: Config,
        pixel: str,
        result: str,
        image: tuple[str | int, ...],
        unit: int = 1,
        interleave: int = 1,
        backward: bool = False,
        channels: int = 3,
        variants: tuple[str, ...] = ("aligned", "unaligned"),
    ) -> AotCase:
        ends = ("grad_image", "grad") if backward else ("image", "out")
        widths = {"u8": torch.uint8, "fp64": torch.float64}
        tile = _strip_tile(config, widths.get(pixel, torch.float32))
        tile["BLOCK_C"] = channels if interleave == 1 else 1
        inner = "fp64" if pixel == "fp64" else "fp32"
        return AotCase(
            name=f"{name}-{'x'.join(map(str, tile.values()))}",
            kernel=_extract_regions_bwd_kernel if backward else _extract_regions_fwd_kernel,
            signature={
                f"{ends[0]}_ptr": f"*{pixel}",
                f"{ends[1]}_ptr": f"*{result}",
                f"{ends[0]}_strides": image,
                f"{ends[1]}_strides": regions,
                "boxes_ptr": "*i64",
                "boxes_stride": "i32",
                "gain_ptr": f"*{inner}",
                **({} if backward else {"bias_ptr": f"*{inner}"}),
                "num_regions": "i32",
                "channels": "i32",
            },
            constexprs={
                **tile,
                "SIDE": 256,
                "UNIT": unit,
                "INTERLEAVE": interleave,
                "ACC": getattr(tl, inner.replace("fp", "float")),
            },
            num_warps=config.num_warps,
            num_stages=1,
            variants=variants,
        )

    rows = ("i64", "i32", "i32", "i32", 1)
    columns = ("i64", "i32", "i32", 1, "i32")

    def stitch(
        name: str,
        config: Config,
        dtype: str,
        *,
        backward: bool = False,
        variants: tuple[str, ...] = ("aligned", "unaligned"),
    ) -> AotCase:
        ends = ("grad", "grad_out") if backward else ("features", "out")
        by_planes, position = "planes" in name, "plain" not in name
        features_strides = "grad_strides" if backward else "feature_strides"
        acc = tl.float64 if dtype == "fp64" else tl.float32
        forward_only = {"HAS_POSITION": position, "ACC": acc}
        return AotCase(
            name=f"{name}-{dtype}-{'x'.join(map(str, config.tile.values()))}",
            kernel=_stitch_regions_bwd_kernel if backward else _stitch_regions_fwd_kernel,
            signature={
                f"{ends[0]}_ptr": f"*{dtype}",
                f"{ends[1]}_ptr": f"*{dtype}",
                features_strides: columns if by_planes else rows,
                f"{ends[1]}_strides": ("i64", "i32", 1),
                "table_ptr": "*i64",
                "table_stride": "i32",
                **({} if backward else {"turns_ptr": "*i64"}),
                "num_regions": "i32",
                "channels" if backward else "half": "i32",
            },
            constexprs={
                **config.tile,
                "SIDE": 8,
                "PLANES": by_planes,
                **({} if backward else forward_only),
            },
            num_warps=config.num_warps,
            num_stages=1,
            aligned_args=("channels",) if backward else ("half",),
            variants=variants,
        )

    for config in EXTRACT_PLANES_CONFIGS:
        yield extract("extract-planes-u8-bf16", config, "u8", "bf16", planes, unit=8)
    for config in EXTRACT_PIXELS_CONFIGS:
        yield extract("extract-pixels-u8-bf16", config, "u8", "bf16", pixels)
    if everything:
        layouts = (
            ("planes", EXTRACT_PLANES_CONFIGS, planes, 8, 1),
            ("interleaved", EXTRACT_PLANES_CONFIGS, planes, 8, 3),
            ("planes-odd", EXTRACT_PLANES_CONFIGS, planes, 1, 1),
            ("pixels", EXTRACT_PIXELS_CONFIGS, pixels, 1, 1),
        )
        cuts = {}  # by name: configs may be the same for wide pixels
        for (layout, configs, *how), end in product(layouts, ("bf16", "fp32")):
            for config, of in product(configs, ("u8", "u16", "fp16", "bf16", "fp32", "fp64")):
                name = f"{layout}-{of}-{end}-{config.num_warps}w"
                found = [extract(f"extract-{name}", config, of, end, *how)]
                if of not in ("u8", "u16"):
                    found.append(extract(f"extract-bwd-{name}", config, of, end, *how, True))
                cuts |= {case.name: case for case in found}
        yield from cuts.values()
        for config, of in product(STITCH_ROWS_CONFIGS, ("fp16", "bf16", "fp32", "fp64")):
            yield stitch("stitch-rows", config, of)
            yield stitch("stitch-rows-plain", config, of)
            yield stitch("stitch-bwd-rows", config, of, backward=True)
        for config, of in product(STITCH_PLANES_CONFIGS, ("fp16", "bf16", "fp32", "fp64")):
            yield stitch("stitch-planes", config, of)
            yield stitch("stitch-planes-plain", config, of)
            yield stitch("stitch-bwd-planes", config, of, backward=True)
        return
    plane, pixel = EXTRACT_PLANES_CONFIGS[0], EXTRACT_PIXELS_CONFIGS[0]
    yield extract("extract-interleaved-u8-bf16", plane, "u8", "bf16", planes, 8, 3)
    yield extract("extract-planes-u16-fp16", plane, "u16", "fp16", planes, 8)
    yield extract("extract-planes-fp32-fp32", plane, "fp32", "fp32", planes, 8)
    yield extract("extract-bwd-planes-fp32", plane, "fp32", "fp32", planes, 8, backward=True)
    yield extract("extract-bwd-pixels-bf16", pixel, "bf16", "bf16", pixels, backward=True)
    # A width that is no multiple of 8 gives strides in elements.
    yield extract("extract-planes-odd-u8-bf16", plane, "u8", "bf16", planes)
    aligned = ("aligned",)
    for config in EXTRACT_PLANES_CONFIGS[1:]:
        name = "extract-interleaved-u8-bf16"
        yield extract(name, config, "u8", "bf16", planes, 8, 3, variants=aligned)
    for end, channels in (("bf16", 4), ("fp16", 3), ("fp64", 3)):
        name = f"extract-planes-{end}-{end}"
        yield extract(name, plane, end, end, planes, 8, 1, False, channels, aligned)
    name = "extract-bwd-interleaved-fp32"
    yield extract(name, plane, "fp32", "fp32", planes, 8, 3, True, variants=aligned)

    for config in STITCH_ROWS_CONFIGS:
        yield stitch("stitch-rows", config, "bf16")
    for config in STITCH_PLANES_CONFIGS:
        yield stitch("stitch-planes", config, "bf16")
    yield stitch("stitch-rows", STITCH_ROWS_CONFIGS[0], "fp32")
    for dtype in ("fp16", "fp64"):
        yield stitch("stitch-rows", STITCH_ROWS_CONFIGS[0], dtype, variants=aligned)
    yield stitch("stitch-rows-plain", STITCH_ROWS_CONFIGS[0], "bf16")
    yield stitch("stitch-bwd-rows", STITCH_ROWS_CONFIGS[0], "bf16", backward=True)
    yield stitch("stitch-bwd-planes", STITCH_PLANES_CONFIGS[0], "bf16", backward=True)
