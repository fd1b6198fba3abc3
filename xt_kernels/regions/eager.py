"""CPU form of region extraction and stitching, in eager PyTorch.

Regions of one list mostly stand side by side and below one another. Such a block of regions is one
strided view on both sides, so it is moved by few large operations instead of many small ones. A
block is kept so small that the second operation on it finds it in a cache.
"""

from __future__ import annotations

from functools import lru_cache
from operator import itemgetter

import torch

from .reference import frequencies

# Elements of a block: 16 MiB of fp32. As good as any from 2**18 on with one core of an AMD EPYC
# (1 MiB of L2, a shared L3 of 32 MiB); with two, 2**20 takes 1.25 times as long, 2**18 2.4 times:
# each operation waits for its threads.
_BLOCK_ELEMENTS = 2**22
# Where a block goes through a buffer, which is fresh memory: 4 MiB of fp32.
_BUFFER_ELEMENTS = 2**20


_Table = list[list[int]]


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


def _pixels(image: torch.Tensor, boxes: _Table, first: int, rows: int, cols: int) -> torch.Tensor:
    """View `[B, rows, cols, C, height, width]` of the image where a block of regions lies."""
    top, left, height, width = boxes[first]
    down, right = _steps(boxes, first, rows, cols, 0)[0], _steps(boxes, first, rows, cols, 1)[1]
    batch, channels = image.shape[:2]
    sb, sc, sh, sw = image.stride()
    return image.as_strided(
        (batch, rows, cols, channels, height, width),
        (sb, down * sh, right * sw, sc, sh, sw),
        image.storage_offset() + top * sh + left * sw,
    )


def _limit(per_region: int, is_buffered: bool = False) -> int:
    """Regions in a block."""
    most = _BUFFER_ELEMENTS if is_buffered else _BLOCK_ELEMENTS
    return max(1, most // max(1, per_region))


def _split(regions: torch.Tensor, first: int, rows: int, cols: int) -> torch.Tensor:
    """View `[B, rows, cols, ..]` of a block of `[B, R, ..]`."""
    block = regions[:, first : first + rows * cols]
    return block.view(block.shape[0], rows, cols, *block.shape[2:])


def _scratch(window: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """As `window` `[B, rows, cols, C, height, width]`, planes or pixels, region after region."""
    batch, rows, cols, channels, height, width = window.shape
    if window.stride(5) == 1:
        return torch.empty(window.shape, dtype=dtype, device="cpu")
    shape = (batch, rows, cols, height, width, channels)
    return torch.empty(shape, dtype=dtype, device="cpu").movedim(5, 3)


@lru_cache(maxsize=64)
def _scalars(values: tuple[float, ...], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor(value, dtype=dtype, device="cpu") for value in values)


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
    batch, _, channels, side, _ = out.shape
    inner = torch.promote_types(image.dtype, torch.float32)
    biases = _scalars(bias, inner)
    plain = set(gain) <= {1.0} and not any(bias)
    # Pixels become floats in the order in which they lie; the sum below reorders them.
    same_order = (image.stride(3) == 1) == (out.stride(4) == 1)
    is_buffered = not plain and image.dtype != inner and not (same_order and out.dtype == inner)
    limit = _limit(batch * channels * side * side, is_buffered)
    places, blocks = _blocks(boxes, (1,), (0,), limit)
    scratch = None
    for first, rows, cols in blocks:
        height, width = places[first][2:]
        target = _split(out, first, rows, cols)
        if height < side or width < side:
            target[..., height:, :].zero_()
            target[..., :height, width:].zero_()
            target = target[..., :height, :width]
        window = _pixels(image, places, first, rows, cols)
        if plain:
            target.copy_(window)
            continue
        work = target
        if window.dtype != inner:
            if not is_buffered:
                window = target.copy_(window)
            else:
                if scratch is None or scratch.shape != window.shape:
                    scratch = _scratch(window, inner)
                window = scratch.copy_(window)
                work = scratch if same_order else target
        planes = zip(biases, gain, window.unbind(3), work.unbind(3), strict=True)
        for offset, factor, pixels, result in planes:
            # bias + gain * pixel in one pass; a product and a sum would be two.
            torch.add(offset, pixels, alpha=factor, out=result)
        if work is not target:
            target.copy_(work)


def extract_backward(
    grad: torch.Tensor, boxes: torch.Tensor, gain: torch.Tensor, grad_image: torch.Tensor
) -> None:
    """Writes `grad` `[B, R, C, s, s]` times gain into `grad_image` `[B, C, h, w]` at `boxes`."""
    batch, _, channels, side, _ = grad.shape
    gains = gain[:, None, None]
    places, blocks = _blocks(boxes, (1,), (0,), _limit(batch * channels * side * side))
    for first, rows, cols in blocks:
        height, width = places[first][2:]
        block = _split(grad, first, rows, cols)[..., :height, :width]
        torch.mul(block, gains, out=_pixels(grad_image, places, first, rows, cols))


@lru_cache(maxsize=16)
def _code(first: int, count: int, channels: int, dtype: torch.dtype) -> torch.Tensor:
    """Position code `[count, C / 2]` of one axis for indices from `first` on."""
    index = torch.arange(first, first + count, dtype=torch.float64, device="cpu")
    angle = index[:, None] * frequencies(channels, torch.device("cpu"))
    return torch.cat([angle.sin(), angle.cos()], dim=1).to(torch.float32).to(dtype)


# Few: an image's chunks have a table each, and theirs are not asked for twice.
@lru_cache(maxsize=8)
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


def _places(tokens: torch.Tensor, table: _Table, first: int, rows: int, cols: int) -> torch.Tensor:
    """View `[B, rows, cols, height, width, C]` of `tokens` `[B, L, C]` where a block goes."""
    start, pitch, height, width = table[first][:4]
    down, right = _steps(table, first, rows, cols, 0)
    per_batch, per_token, per_channel = tokens.stride()
    return tokens.as_strided(
        (tokens.shape[0], rows, cols, height, width, tokens.shape[2]),
        (
            per_batch,
            down * per_token,
            right * per_token,
            pitch * per_token,
            per_token,
            per_channel,
        ),
        tokens.storage_offset() + start * per_token,
    )


def stitch_forward(
    features: torch.Tensor, table: torch.Tensor, position: bool, out: torch.Tensor
) -> None:
    """Writes `features` `[B, R, t, t, C]` to their places in `out` `[B, L, C]`.

    table: int64 `[R, 6]`, the rows of `Placement.table` of the regions.
    """
    batch, _, side, _, channels = features.shape
    if not table.shape[0]:
        return
    inner = torch.promote_types(features.dtype, torch.float32)
    direct = features.dtype == out.dtype == inner
    limit = _limit(batch * side * side * channels, position and not direct)
    entries, blocks = _blocks(table, (0, 5), (0, 4), limit)
    codes = _codes(table, limit, side, channels, inner) if position else None
    for number, (first, rows, cols) in enumerate(blocks):
        height, width = entries[first][2:4]
        place = _places(out, entries, first, rows, cols)
        tokens = _split(features, first, rows, cols)
        if height < side or width < side:
            tokens = tokens[:, :, :, :height, :width]
        if codes is None:
            place.copy_(tokens)
            continue
        work = place
        if not direct:
            work = torch.empty(place.shape, dtype=inner, device="cpu")
            tokens = work.copy_(tokens)
        halves = zip(codes[number], tokens.chunk(2, 5), work.chunk(2, 5), strict=True)
        for code, half, result in halves:
            torch.add(half, code, out=result)
        if work is not place:
            place.copy_(work)


def stitch_backward(
    grad_out: torch.Tensor, table: torch.Tensor, grad_features: torch.Tensor
) -> None:
    """Fills `grad_features` `[B, R, t, t, C]` from `grad_out` `[B, L, C]`, zero for padding."""
    side = grad_features.shape[2]
    entries, blocks = _blocks(table, (0, 5), (0, 4), len(table))
    for first, rows, cols in blocks:
        height, width = entries[first][2:4]
        target = _split(grad_features, first, rows, cols)
        if height < side:
            target[:, :, :, height:].zero_()
        if width < side:
            target[:, :, :, :height, width:].zero_()
        target[:, :, :, :height, :width].copy_(_places(grad_out, entries, first, rows, cols))
