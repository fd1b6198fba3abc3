"""CPU form of region extraction and stitching, in eager PyTorch.

Regions of one list mostly stand side by side and below one another. Such a block of regions is one
strided view on both sides, so it is moved by few large operations instead of many small ones. A
block is kept so small that the second operation on it finds it in a cache. What is moved from where
to where follows from shapes, strides and tables alone, and is worked out once for calls that are
alike in these: a call itself makes views and moves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from operator import itemgetter
from typing import NamedTuple

import torch

from .reference import frequencies

# Elements of a block: 16 MiB of fp32. As good as any from 2**18 on with one core of an AMD EPYC
# (1 MiB of L2, a shared L3 of 32 MiB); with two, 2**20 takes 1.25 times as long, 2**18 2.4 times:
# each operation waits for its threads.
_BLOCK_ELEMENTS = 2**22
# Where a block goes through a buffer, which is fresh memory: 4 MiB of fp32.
_BUFFER_ELEMENTS = 2**20

# As few channels are moved one by one where that saves more than it costs: three planes of pixels
# are 1.1 times as fast as all at once.
_FEW_CHANNELS = 4

_Table = list[list[int]]
_Shape = tuple[int, ...]


class _View(NamedTuple):
    """Arguments of `as_strided`, the offset relative to that of the tensor."""

    sizes: _Shape
    strides: _Shape
    offset: int

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.as_strided(self.sizes, self.strides, tensor.storage_offset() + self.offset)

    def part(self, axis: int, first: int, size: int) -> _View:
        sizes = (*self.sizes[:axis], size, *self.sizes[axis + 1 :])
        return _View(sizes, self.strides, self.offset + first * self.strides[axis])


class _Move(NamedTuple):
    """A block of regions: from where to where, and what is padding."""

    source: _View
    target: _View
    margins: tuple[_View, ...]


# A table hashes as the object it is, and the ops keep theirs: the walk is done once for each.
@lru_cache(maxsize=64)
def _blocks(
    table: torch.Tensor, along: tuple[int, ...], across: tuple[int, ...], limit: int
) -> tuple[_Table, list[tuple[int, int, int]]]:
    """`table` as lists, and (first, rows, cols) of blocks of at most `limit` consecutive entries
    that form a lattice: along a row only the columns `along` of the table change, from row to row
    only `across`; the first of them grows in equal steps.
    """
    entries = table.tolist()
    columns = range(table.shape[1])
    same_row = itemgetter(*(i for i in columns if i not in along))
    same_col = itemgetter(*(i for i in columns if i not in across))
    right, down = along[0], across[0]
    blocks = []
    first = 0
    while first < len(entries):
        head, cols, rows, step = entries[first], 1, 1, 0
        for other in entries[first + 1 : first + limit]:
            moved = other[right] - head[right]
            step = step or moved
            if moved <= 0 or moved != cols * step or same_row(other) != same_row(head):
                break
            cols += 1
        step = 0
        while (rows + 1) * cols <= min(limit, len(entries) - first):
            start = first + rows * cols
            moved = entries[start][down] - head[down]
            step = step or moved
            if moved <= 0 or moved != rows * step:
                break
            if not all(
                other[down] - upper[down] == moved and same_col(other) == same_col(upper)
                for other, upper in zip(
                    entries[start : start + cols], entries[first : first + cols], strict=True
                )
            ):
                break
            rows += 1
        blocks.append((first, rows, cols))
        first += rows * cols
    return entries, blocks


def _steps(table: _Table, first: int, rows: int, cols: int, column: int) -> tuple[int, int]:
    """How far `column` of the table moves from row to row and along a row of a block."""
    here = table[first][column]
    down = table[first + cols][column] - here if rows > 1 else 0
    right = table[first + 1][column] - here if cols > 1 else 0
    return down, right


def _limit(per_region: int, most: int = _BLOCK_ELEMENTS) -> int:
    """Regions in a block."""
    return max(1, most // max(1, per_region))


def _batched(shape: Sequence[int], strides: Sequence[int], dims: int) -> tuple[_Shape, _Shape]:
    """Both with the axis B, of `dims` axes."""
    missing = dims - len(shape)
    return (*[1] * missing, *shape), (*[0] * missing, *strides)


def _split(shape: _Shape, strides: _Shape, first: int, rows: int, cols: int) -> _View:
    """View `[B, rows, cols, ..]` of a block of `[B, R, ..]`."""
    batch, _, *rest = shape
    per_batch, per_region, *others = strides
    return _View(
        (batch, rows, cols, *rest),
        (per_batch, cols * per_region, per_region, *others),
        first * per_region,
    )


def _inside(block: _View, rows: int, height: int, width: int) -> tuple[_View, tuple[_View, ...]]:
    """`height` x `width` of the axes `rows` and the next, and the views that are the rest."""
    side = block.sizes[rows]
    upper = block.part(rows, 0, height)
    margins = []
    if height < side:
        margins.append(block.part(rows, height, side - height))
    if width < side:
        margins.append(upper.part(rows + 1, width, side - width))
    return upper.part(rows + 1, 0, width), tuple(margins)


def _pixels(
    shape: _Shape, strides: _Shape, boxes: _Table, first: int, rows: int, cols: int
) -> _View:
    """View `[B, rows, cols, C, height, width]` of an image where a block of regions lies."""
    top, left, height, width = boxes[first]
    down, right = _steps(boxes, first, rows, cols, 0)[0], _steps(boxes, first, rows, cols, 1)[1]
    (batch, channels), (sb, sc, sh, sw) = shape[:2], strides
    return _View(
        (batch, rows, cols, channels, height, width),
        (sb, down * sh, right * sw, sc, sh, sw),
        top * sh + left * sw,
    )


class _Extraction(NamedTuple):
    """How regions are cut out of images of one shape.

    moves: blocks, each with `_planes` of its pixels where they lie channel by channel and shall not
        in the result, and (bias, gain) of each channel, or None where pixels stay as they are.
    inner: dtype of the arithmetic.
    floats: where pixels become `inner` first: in the "result", in a "buffer" of planes, in a
        "buffer of pixels", or nowhere, "".
    in_place: the arithmetic changes what holds these.
    """

    moves: list[tuple[_Move, tuple[_View, _View] | None, list[tuple[torch.Tensor, float]] | None]]
    inner: torch.dtype
    floats: str
    in_place: bool


@lru_cache(maxsize=64)
def _extraction(
    shape: _Shape,
    strides: _Shape,
    pixel: torch.dtype,
    boxes: torch.Tensor,
    gain: tuple[float, ...],
    bias: tuple[float, ...],
    out_shape: _Shape,
    out_strides: _Shape,
    dtype: torch.dtype,
) -> _Extraction:
    batch, _, channels, side, _ = out_shape
    inner = torch.promote_types(pixel, torch.float32)
    by_planes, to_planes = strides[3] == 1, out_strides[4] == 1
    turns = to_planes and not by_planes
    in_place = turns or by_planes == to_planes
    values = None
    if any(bias) or not set(gain) <= {1.0}:
        offsets = (torch.tensor(value, dtype=inner, device="cpu") for value in bias)
        values = list(zip(offsets, gain, strict=True))
    if values is None or (pixel == inner and not turns):
        floats = ""
    elif dtype == inner and in_place:
        floats = "result"
    else:
        floats = "buffer" if by_planes or turns else "buffer of pixels"
    step = 1 if turns and channels <= _FEW_CHANNELS else channels
    limit = _limit(batch * channels * side * side)
    if "buffer" in floats:
        limit = _limit(batch * step * side * side, _BUFFER_ELEMENTS)
    places, blocks = _blocks(boxes, (1,), (0,), limit)
    moves = []
    for first, rows, cols in blocks:
        source = _pixels(shape, strides, places, first, rows, cols)
        block = _split(out_shape, out_strides, first, rows, cols)
        for channel in range(0, channels, step):
            some = source.part(3, channel, step)
            target, margins = _inside(block.part(3, channel, step), 4, *places[first][2:])
            move = _Move(some, target, margins)
            planes = _planes(some) if turns else None
            moves.append((move, planes, values and values[channel : channel + step]))
    return _Extraction(moves, inner, floats, in_place)


def _planes(block: _View) -> tuple[_View, _View] | None:
    """The window `[B, C, rows * height, cols * width]` that a block of regions side by side is, and
    the block in a copy of it: pixels become planes faster in long rows.
    """
    batch, rows, cols, channels, height, width = block.sizes
    sb, down, right, sc, sh, sw = block.strides
    if cols == 1 or right != width * sw or (rows > 1 and down != height * sh):
        return None
    tall, wide = rows * height, cols * width
    window = _View((batch, channels, tall, wide), (sb, sc, sh, sw), block.offset)
    strides = (channels * tall * wide, height * wide, width, tall * wide, wide, 1)
    return window, _View(block.sizes, strides, 0)


class _Buffer:
    """Memory for one block after the other."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.memory: torch.Tensor | None = None

    def of(self, sizes: _Shape) -> torch.Tensor:
        if self.memory is None or self.memory.shape != sizes:
            self.memory = torch.empty(sizes, dtype=self.dtype, device="cpu")
        return self.memory


def extract_forward(
    image: torch.Tensor,
    boxes: torch.Tensor,
    gain: tuple[float, ...],
    bias: tuple[float, ...],
    out: torch.Tensor,
) -> None:
    """Fills `out` `[B, R, C, s, s]` from `image` `[B, C, h, w]`.

    boxes: int64 `[R, 4]`: top, left in the window, height, width in pixels inside the image.
    gain, bias: C numbers. The arithmetic is fp32, or fp64 for an fp64 image.
    """
    ways = image.shape, image.stride(), image.dtype, boxes, gain, bias
    moves, inner, floats, in_place = _extraction(*ways, out.shape, out.stride(), out.dtype)
    turned, buffer = _Buffer(image.dtype), _Buffer(inner)
    for (source, where, margins), planes, channels in moves:
        for margin in margins:
            margin.of(out).zero_()
        target = where.of(out)
        if planes is None:
            pixels = source.of(image)
        else:
            window, block = planes
            pixels = block.of(turned.of(window.sizes).copy_(window.of(image)))
        if channels is None:
            target.copy_(pixels)
            continue
        work = target
        if floats == "result":
            pixels = target.copy_(pixels)
        elif floats:
            batch, rows, cols, count, height, width = source.sizes
            if floats == "buffer":
                scratch = buffer.of(source.sizes)
            else:
                scratch = buffer.of((batch, rows, cols, height, width, count)).movedim(5, 3)
            pixels = scratch.copy_(pixels)
            work = scratch if in_place else target
        sources = pixels.unbind(3)
        results = sources if work is pixels else work.unbind(3)
        for (offset, factor), plane, result in zip(channels, sources, results, strict=True):
            # bias + gain * pixel in one pass; a product and a sum would be two.
            torch.add(offset, plane, alpha=factor, out=result)
        if work is not target:
            target.copy_(work)


def layout(sizes: Sequence[int], stored: Sequence[int]) -> list[int]:
    """Strides of a dense tensor whose last three axes are stored in the order `stored`."""
    before = len(sizes) - 3
    strides, step = [0] * len(sizes), 1
    for axis in reversed([*range(before), *(before + axis for axis in stored)]):
        strides[axis] = step
        step *= max(sizes[axis], 1)
    return strides


PLANES, PIXELS = (0, 1, 2), (1, 2, 0)
"""Orders of the axes of images `[C, h, w]`."""
TOKENS, MAPS = (0, 1, 2), (2, 0, 1)
"""Orders of the axes of features `[t, t, C]`."""

Pull = Callable[[torch.Tensor], torch.Tensor]


@lru_cache(maxsize=64)
def extract_pull(
    shape: _Shape,
    strides: _Shape,
    pixel: torch.dtype,
    boxes: torch.Tensor,
    gain: tuple[float, ...],
    window: _Shape,
    is_covered: bool,
    dtype: torch.dtype,
    channels_last: bool,
) -> Pull:
    """The backward pass of extraction: `[B, R, C, s, s]`, or without B, to that of the image, times
    gain at `boxes` and zero elsewhere.

    shape, strides, pixel: of the gradient that comes. window, dtype: size and dtype of the image.
    is_covered: no pixel of it lies outside `boxes`.
    """
    *batch, _, channels, side, _ = shape
    sizes = (*batch, channels, *window)
    steps = layout(sizes, PIXELS if channels_last else PLANES)
    inner = torch.promote_types(dtype, torch.float32)
    gains = torch.tensor(gain, dtype=inner, device="cpu")[:, None, None]
    per_region = math.prod(batch) * channels * side * side
    places, blocks = _blocks(boxes, (1,), (0,), _limit(per_region))
    # PyTorch multiplies 16 bits by a number in fp32 without a copy, by an fp32 tensor with two.
    one_by_one = pixel == dtype != inner and channels <= _FEW_CHANNELS
    moves: list[tuple[_View, _View, torch.Tensor | float]] = []
    for first, rows, cols in blocks:
        block = _split(*_batched(shape, strides, 5), first, rows, cols)
        source, _ = _inside(block, 4, *places[first][2:])
        target = _pixels(*_batched(sizes, steps, 4), places, first, rows, cols)
        if not one_by_one:
            moves.append((source, target, gains))
            continue
        for c, factor in enumerate(gain):
            moves.append((source.part(3, c, 1), target.part(3, c, 1), factor))

    def pull(grad: torch.Tensor) -> torch.Tensor:
        if grad.stride() != strides:
            ways = pixel, boxes, gain, window, is_covered, dtype, channels_last
            return extract_pull(grad.shape, grad.stride(), *ways)(grad)
        new = torch.empty_strided(sizes, steps, dtype=dtype, device="cpu")
        if not is_covered:
            new.zero_()
        for source, target, factor in moves:
            torch.mul(source.of(grad), factor, out=target.of(new))
        return new

    return pull


@lru_cache(maxsize=16)
def _code(first: int, count: int, channels: int, dtype: torch.dtype) -> torch.Tensor:
    """Position code `[count, C / 2]` of one axis for indices from `first` on."""
    index = torch.arange(first, first + count, dtype=torch.float64, device="cpu")
    angle = index[:, None] * frequencies(channels, torch.device("cpu"))
    return torch.cat([angle.sin(), angle.cos()], dim=1).to(torch.float32).to(dtype)


def _codes(
    table: torch.Tensor, limit: int, side: int, channels: int, dtype: torch.dtype
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Position codes of the blocks of `table`: `[cols, 1, width, C / 2]` for the columns of tokens,
    `[rows, 1, height, 1, C / 2]` for their rows.
    """
    (top, left), (bottom, right) = table[:, 4:].amin(0).tolist(), table[:, 4:].amax(0).tolist()
    row_code = _code(top, bottom - top + side, channels, dtype)
    col_code = _code(left, right - left + side, channels, dtype)
    entries, blocks = _blocks(table, (0, 5), (0, 4), limit)
    codes = []
    for first, rows, cols in blocks:
        height, width = entries[first][2:4]
        downs = [entries[first + k * cols][4] - top for k in range(rows)]
        y = [row_code[down : down + height] for down in downs]
        x = [col_code[each[5] - left :][:width] for each in entries[first : first + cols]]
        codes.append((torch.stack(x)[:, None], torch.stack(y)[:, None, :, None]))
    return codes


def _places(
    shape: _Shape, strides: _Shape, table: _Table, first: int, rows: int, cols: int
) -> _View:
    """View `[B, rows, cols, height, width, C]` of tokens `[B, L, C]` where a block goes."""
    start, pitch, height, width = table[first][:4]
    down, right = _steps(table, first, rows, cols, 0)
    per_batch, per_token, per_channel = strides
    return _View(
        (shape[0], rows, cols, height, width, shape[2]),
        (
            per_batch,
            down * per_token,
            right * per_token,
            pitch * per_token,
            per_token,
            per_channel,
        ),
        start * per_token,
    )


class _Stitching(NamedTuple):
    """How regions of one shape go into sequences of one shape.

    moves: blocks, each with the position codes to add: none, those of both halves of the channels,
        or, where `is_direct`, that of the half that the block is.
    inner: dtype of the sum.
    is_direct: the sum needs no buffer.
    """

    moves: list[tuple[_Move, tuple[torch.Tensor, ...]]]
    inner: torch.dtype
    is_direct: bool


# Few, for the codes take memory: an image's chunks have a table each, and theirs are not asked for
# twice.
@lru_cache(maxsize=8)
def _stitching(
    shape: _Shape,
    strides: _Shape,
    dtype: torch.dtype,
    table: torch.Tensor,
    position: bool,
    out_shape: _Shape,
    out_strides: _Shape,
    out_dtype: torch.dtype,
) -> _Stitching:
    batch, count, side, _, channels = shape
    inner = torch.promote_types(dtype, torch.float32)
    is_direct = dtype == out_dtype == inner
    if not count:
        return _Stitching([], inner, is_direct)
    most = _BUFFER_ELEMENTS if position and out_dtype != inner else _BLOCK_ELEMENTS
    limit = _limit(batch * side * side * channels, most)
    entries, blocks = _blocks(table, (0, 5), (0, 4), limit)
    codes = _codes(table, limit, side, channels, inner) if position else [()] * len(blocks)
    half = channels // 2
    moves: list[tuple[_Move, tuple[torch.Tensor, ...]]] = []
    for (first, rows, cols), added in zip(blocks, codes, strict=True):
        block = _split(shape, strides, first, rows, cols)
        source, _ = _inside(block, 3, *entries[first][2:4])
        target = _places(out_shape, out_strides, entries, first, rows, cols)
        if not position or not is_direct:
            moves.append((_Move(source, target, ()), added))
            continue
        for channel, code in zip((0, half), added, strict=True):
            part = _Move(source.part(5, channel, half), target.part(5, channel, half), ())
            moves.append((part, (code,)))
    return _Stitching(moves, inner, is_direct)


def stitch_forward(
    features: torch.Tensor, table: torch.Tensor, position: bool, out: torch.Tensor
) -> None:
    """Writes `features` `[B, R, t, t, C]` to their places in `out` `[B, L, C]`.

    table: int64 `[R, 6]`, the rows of `Placement.table` of the regions.
    """
    ways = features.shape, features.stride(), features.dtype, table, position
    moves, inner, is_direct = _stitching(*ways, out.shape, out.stride(), out.dtype)
    for (source, target, _), codes in moves:
        tokens, place = source.of(features), target.of(out)
        if not codes:
            place.copy_(tokens)
        elif is_direct:
            torch.add(tokens, codes[0], out=place)
        else:
            work = place
            if place.dtype != inner:
                work = torch.empty(place.shape, dtype=inner, device="cpu")
            work.copy_(tokens)
            for half, code in zip(work.chunk(2, 5), codes, strict=True):
                half.add_(code)
            if work is not place:
                place.copy_(work)


@lru_cache(maxsize=64)
def stitch_pull(
    shape: _Shape,
    strides: _Shape,
    table: torch.Tensor,
    side: int,
    dtype: torch.dtype,
    channels_last: bool,
) -> Pull:
    """The backward pass of stitching: `[B, L, C]`, or without B, to that of the features, zero for
    padding.

    shape, strides: of the gradient that comes. side, dtype: of the features.
    """
    *batch, _, channels = shape
    sizes = (*batch, len(table), side, side, channels)
    steps = layout(sizes, TOKENS if channels_last else MAPS)
    entries, blocks = _blocks(table, (0, 5), (0, 4), len(table))
    moves = []
    for first, rows, cols in blocks:
        block = _split(*_batched(sizes, steps, 5), first, rows, cols)
        target, margins = _inside(block, 3, *entries[first][2:4])
        source = _places(*_batched(shape, strides, 3), entries, first, rows, cols)
        moves.append(_Move(source, target, margins))

    def pull(grad: torch.Tensor) -> torch.Tensor:
        if grad.stride() != strides:
            ways = table, side, dtype, channels_last
            return stitch_pull(grad.shape, grad.stride(), *ways)(grad)
        new = torch.empty_strided(sizes, steps, dtype=dtype, device="cpu")
        for source, target, margins in moves:
            for margin in margins:
                margin.of(new).zero_()
            target.of(new).copy_(source.of(grad))
        return new

    return pull
