"""`extract_regions` cuts an image window into normalised regions; `stitch_regions` puts region
features back as one token sequence. Each is the other's adjoint (without normalisation, position).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch

from .. import _checks as checks
from . import ops
from .direct import is_plain, remembered
from .grid import Order, RegionGrid
from .reference import normalisation

_PIXELS = (torch.uint8, torch.uint16, *checks.FLOATS)


def extract_regions(
    image: torch.Tensor,
    grid: RegionGrid,
    *,
    regions: Sequence[int] | None = None,
    origin: tuple[int, int] = (0, 0),
    channels_last: bool = False,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    scale: float | None = None,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Cuts regions out of an image window: `(pixel * scale - mean) / std`, zero outside the image.

    image: window of the image, `[C, h, w]` or `[B, C, h, w]` (`[.., h, w, C]` if channels_last),
        uint8, uint16, fp16, bf16, fp32 or fp64, any strides, on a CPU or a CUDA device.
    grid: geometry of the whole image.
    regions: R region numbers, in the order wanted; None is all of the grid. A number may come
        twice, unless the image needs a gradient.
    origin: (row, column) of the window in the whole image, pixels.
    mean, std: C numbers each, in units of `pixel * scale`; default 0 and 1.
    scale: default 1 / 255 for uint8, 1 / 65535 for uint16, 1 for floats.
    dtype: of the result, fp16, bf16, fp32 or fp64; default fp32. The arithmetic is
        `pixel * gain + bias` in fp32 (fp64 for an fp64 image) with gain = scale / std and
        bias = -mean / std; autocast changes neither.
    memory_format: of a new result: `torch.channels_last` stores each region as `[s, s, C]`; the
        shape is the same.
    out: buffer to fill, of the result's shape, any floating dtype and strides, in memory of its
        own.

    Returns `[R, C, s, s]` or `[B, R, C, s, s]` on the device of image: `out` if given, else new.
    Float images get the exact gradient, zero for pixels that no region holds, unless `out` is
    given; there is no second derivative.
    Raises ValueError if a region has pixels outside the window, arguments disagree, or `out` is
    given where a gradient is needed.
    """
    op = "extract_regions"
    _check_tensor(op, "image", image)
    wants_gradient = torch.is_grad_enabled() and image.requires_grad
    layout = channels_last, dtype, memory_format
    arguments = _extraction(
        image, grid, regions, origin, mean, std, scale, *layout, out is None, wants_gradient
    )
    window = image.movedim(-1, -3) if channels_last else image
    if out is None:
        new: torch.Tensor = ops.extract_forward(window, *arguments)
        return new
    *others, _, _ = arguments
    ids, side = arguments[2], grid.region
    *batch, channels, _, _ = window.shape
    sizes = [*batch, grid.num_regions if ids is None else len(ids), channels, side, side]
    _check_out(op, out, "[B, R, C, s, s]" if batch else "[R, C, s, s]", sizes, dtype, image)
    if batch:
        ops.extract_into(window, out, *others)
    else:
        ops.extract_into(window[None], out[None], *others)
    return out


@remembered
def _extraction(
    image: torch.Tensor,
    grid: RegionGrid,
    regions: Sequence[int] | None,
    origin: tuple[int, int],
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    scale: float | None,
    channels_last: bool,
    dtype: torch.dtype | None,
    memory_format: torch.memory_format,
    is_new: bool,
    wants_gradient: bool,
) -> tuple[Any, ...]:
    """What `ops.extract_forward` takes after the image, of checked arguments."""
    op = "extract_regions"
    _check_grid(op, grid)
    layout = "h, w, C" if channels_last else "C, h, w"
    checks.check_dim(op, "image", image, {3: f"[{layout}]", 4: f"[B, {layout}]"})
    checks.check_dtype(op, "image", image.dtype, _PIXELS)
    checks.check_supported_device(op, "image", image)
    if dtype is not None:
        checks.check_dtype(op, "dtype", dtype)
    if memory_format not in (torch.contiguous_format, torch.channels_last):
        rule = "be torch.contiguous_format or torch.channels_last"
        checks.fail(op, "memory_format", rule, str(memory_format))
    if not is_new and memory_format != torch.contiguous_format:
        checks.fail(op, "memory_format", "be left out where out is given", str(memory_format))
    height, width, channels = (
        image.shape[-3:] if channels_last else (*image.shape[-2:], image.shape[-3])
    )
    means, stds = (
        None if values is None else _numbers(op, name, values, channels)
        for name, values in (("mean", mean), ("std", std))
    )
    if stds is not None and not all(stds):
        checks.fail(op, "std", "be nonzero", stds)
    if scale is not None and not _is_finite(scale):
        checks.fail(op, "scale", "be a finite number", repr(scale))
    gain, bias = normalisation(image.dtype, channels, means, stds, scale)
    inner = torch.promote_types(image.dtype, torch.float32)
    largest = torch.finfo(inner).max
    for name, values in (("scale / std", gain), ("mean / std", bias)):
        if any(abs(value) > largest for value in values):
            checks.fail(op, name, f"fit in {checks.dtype_name(inner)}", values)
    place = _integers(op, "origin", "be two integers, (row, column)", origin)
    if len(place) != 2:
        checks.fail(op, "origin", "be two integers, (row, column)", repr(origin))
    top, left = place
    ids = _region_list(op, "regions", regions, grid.num_regions, "the grid")
    _check_window(grid, ids, top, left, height, width)
    if wants_gradient:
        _check_distinct(op, "regions", ids, " where image needs a gradient")
    geometry = (grid.height, grid.width, grid.region, top, left)
    last = memory_format == torch.channels_last
    return tuple(gain), tuple(bias), ids, *geometry, dtype or torch.float32, last


def stitch_regions(
    features: torch.Tensor,
    grid: RegionGrid,
    *,
    regions: Sequence[int] | None = None,
    chunk: Sequence[int] | None = None,
    channels_last: bool = False,
    order: Order = "row",
    position: bool = True,
    dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Puts region features in their places in a token sequence, adding the 2D sin-cos position.

    features: `[R, C, t, t]` or `[B, R, C, t, t]` (`[.., t, t, C]` if channels_last), t tokens a
        side, fp16, bf16, fp32 or fp64, any strides, on a CPU or a CUDA device.
    grid: geometry of the whole image; the encoder's stride is `grid.region / t`.
    regions: the R region numbers of `features`, in any order; None is all of `chunk`, in its order.
    chunk: region numbers that make up the sequence; None is all of the grid.
    order: "row" (row-major over the image) or "tile" (region after region, in the order of chunk).
    position: add the position code of `reference.sincos_position`, computed here and added in fp32
        (off by at most 1e-6 for indices below 2**31); C must be a multiple of 4.
    dtype: of a new buffer; default is that of features, under autocast too.
    out: `[L, C]` or `[B, L, C]` buffer to write into, any floating dtype and strides, in memory of
        its own, for regions that arrive in several calls; other tokens in it are left as they are.

    Tokens of pure padding are dropped; L counts the others in `chunk`. Without `out`, places of
    regions that are in chunk but not in regions are zero.
    Returns `[L, C]` or `[B, L, C]`: `out` if given, else new. Features get the exact gradient, zero
    for padding tokens, unless `out` is given; there is no second derivative.
    Raises ValueError if arguments disagree, or `out` is given where a gradient is needed.
    """
    op = "stitch_regions"
    _check_tensor(op, "features", features)
    arguments = _stitching(
        features, grid, regions, chunk, channels_last, order, position, dtype, out is None
    )
    maps = features if channels_last else features.movedim(-3, -1)
    if out is None:
        new: torch.Tensor = ops.stitch_forward(maps, *arguments)
        return new
    ids, members, length, *others, _, _ = arguments
    *batch, _, _, _, channels = maps.shape
    sizes = [*batch, length, channels]
    _check_out(op, out, "[B, L, C]" if batch else "[L, C]", sizes, dtype, features, "features")
    if batch:
        ops.stitch_into(maps, out, ids, members, *others)
    else:
        ops.stitch_into(maps[None], out[None], ids, members, *others)
    return out


@remembered
def _stitching(
    features: torch.Tensor,
    grid: RegionGrid,
    regions: Sequence[int] | None,
    chunk: Sequence[int] | None,
    channels_last: bool,
    order: Order,
    position: bool,
    dtype: torch.dtype | None,
    is_new: bool,
) -> tuple[Any, ...]:
    """What `ops.stitch_forward` takes after the features, of checked arguments."""
    op = "stitch_regions"
    _check_grid(op, grid)
    layout = "t, t, C" if channels_last else "C, t, t"
    checks.check_dim(op, "features", features, {4: f"[R, {layout}]", 5: f"[B, R, {layout}]"})
    checks.check_dtype(op, "features", features.dtype)
    checks.check_supported_device(op, "features", features)
    count, *sizes = features.shape[-4:]
    side, across, channels = sizes if channels_last else (*sizes[1:], sizes[0])
    if side != across:
        checks.fail(op, "features", "have square token maps, t x t", f"{side} x {across}")
    if side < 1 or grid.region % side:
        rule = f"have a number of tokens a side that divides the region side = {grid.region}"
        checks.fail(op, "features", rule, side)
    if order not in ("row", "tile"):
        checks.fail(op, "order", "be 'row' or 'tile'", repr(order))
    if position and channels % 4:
        checks.fail(
            op, "features", "have a multiple of 4 channels where position is added", channels
        )
    members = _region_list(op, "chunk", chunk, grid.num_regions, "the grid")
    _check_distinct(op, "chunk", members)
    ids = _region_list(op, "regions", regions, grid.num_regions, "the grid")
    _check_distinct(op, "regions", ids)
    if ids is not None and members is not None:
        inside = set(members)
        for region in ids:
            if region not in inside:
                checks.fail(op, "regions", "be in chunk", region)
    size = grid.num_regions if members is None else len(members)
    expected = size if ids is None else len(ids)
    if count != expected:
        what = "chunk" if ids is None else "regions"
        checks.fail(op, "features", f"hold as many regions as {what} = {expected}", count)
    if dtype is not None and is_new:
        checks.check_dtype(op, "dtype", dtype)
    length = _length(grid, members, grid.region // side)
    geometry = (grid.height, grid.width, grid.region, order, bool(position))
    return ids, members, length, *geometry, dtype or features.dtype, expected < size


def _check_out(
    op: str,
    out: torch.Tensor,
    layout: str,
    sizes: list[int],
    dtype: torch.dtype | None,
    source: torch.Tensor,
    source_name: str = "image",
) -> None:
    """`out` can take the result of `source`."""
    _check_tensor(op, "out", out)
    checks.check_shape(op, "out", out, layout, sizes)
    checks.check_dtype(op, "out", out.dtype)
    if dtype is not None and out.dtype != dtype:
        rule = f"be of dtype = {checks.dtype_name(dtype)}"
        checks.fail(op, "out", rule, checks.dtype_name(out.dtype))
    checks.check_device(op, "out", out, source_name, source)
    reach = 0  # of the axes with smaller strides
    axes = [] if out.is_contiguous() else zip(out.stride(), out.shape, strict=True)
    for step, size in sorted(axes):
        if step <= reach and size > 1:
            rule = "have memory of its own for each element"
            checks.fail(op, "out", rule, f"strides {out.stride()}")
        reach += (size - 1) * step
    if is_plain(out) and is_plain(source) and _meet(out, source):
        checks.fail(op, "out", f"lie apart from {source_name} in memory", "a view of the same")
    if torch.is_grad_enabled() and (source.requires_grad or out.requires_grad):
        checks.fail(op, "out", "be None where a gradient is needed", "a buffer")


def _meet(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether the stretches of memory that two tensors lie in have a byte in common."""
    first, second = one.data_ptr(), other.data_ptr()
    if first > second:
        return _meet(other, one)
    last = sum((n - 1) * step for n, step in zip(one.shape, one.stride(), strict=True))
    end = first + (last + 1) * one.itemsize
    return second < end and one.numel() > 0 and other.numel() > 0


def _check_tensor(op: str, name: str, value: Any) -> None:
    """`value` is a tensor with strides."""
    if not isinstance(value, torch.Tensor):
        checks.fail(op, name, "be a torch.Tensor", type(value).__name__)
    if value.layout != torch.strided:
        checks.fail(op, name, "be a strided tensor", str(value.layout))


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except (TypeError, ValueError):
        return False


def _numbers(op: str, name: str, values: Any, channels: int) -> list[float]:
    """One number for each channel, from a sequence, an array or a tensor."""
    rule = f"hold one number for each channel of image = {channels}"
    try:
        found = [float(value) for value in values]
    except (TypeError, ValueError):
        checks.fail(op, name, rule, repr(values))
    if len(found) != channels:
        checks.fail(op, name, rule, len(found))
    if not all(math.isfinite(value) for value in found):
        checks.fail(op, name, "be finite", found)
    return found


def _integers(op: str, name: str, rule: str, values: Any) -> list[int]:
    """Integers from a sequence, an array or a tensor of them, and from nothing else."""
    try:
        found = values.tolist() if hasattr(values, "tolist") else list(values)
        if not {type(value) for value in found} <= {int}:
            if any(isinstance(value, bool) for value in found):
                raise TypeError
            found = [operator.index(value) for value in found]
    except TypeError:
        checks.fail(op, name, rule, repr(values))
    integers: list[int] = found
    return integers


def _check_grid(op: str, grid: RegionGrid) -> None:
    if not isinstance(grid, RegionGrid):
        checks.fail(op, "grid", "be a RegionGrid", type(grid).__name__)


def _region_list(
    op: str, name: str, regions: Sequence[int] | None, count: int, where: str
) -> list[int] | None:
    """Region numbers as a list; None stays None, which means all."""
    if regions is None:
        return None
    ids = _integers(op, name, "hold integers, the numbers of regions", regions)
    if ids and not (min(ids) >= 0 and max(ids) < count):
        bad = next(i for i in ids if not 0 <= i < count)
        checks.fail(op, name, f"hold region numbers of {where}, in [0, {count})", bad)
    return ids


def _check_distinct(op: str, name: str, ids: list[int] | None, where: str = "") -> None:
    if ids is not None and len(set(ids)) != len(ids):
        twice = next(i for n, i in enumerate(ids) if i in ids[:n])
        checks.fail(op, name, f"hold distinct region numbers{where}", f"{twice} twice")


def _check_window(
    grid: RegionGrid, ids: list[int] | None, top: int, left: int, height: int, width: int
) -> None:
    """The window holds all real pixels of the regions."""
    bottom, right = top + height, left + width

    def inside(first_row: int, last_row: int, first_col: int, last_col: int) -> bool:
        side = grid.region
        return (
            first_row * side >= top
            and first_col * side >= left
            and min((last_row + 1) * side, grid.height) <= bottom
            and min((last_col + 1) * side, grid.width) <= right
        )

    if ids is None:
        if inside(0, grid.rows - 1, 0, grid.cols - 1):
            return
        ids = list(range(grid.num_regions))
    elif not ids:
        return
    else:
        # Boxes lie in a rectangle if and only if their bounding box does.
        rows, cols = [i // grid.cols for i in ids], [i % grid.cols for i in ids]
        if inside(min(rows), max(rows), min(cols), max(cols)):
            return
    for region in ids:
        row, col = region // grid.cols, region % grid.cols
        if not inside(row, row, col, col):
            y, x, h, w = grid.box(region)
            rule = (
                f"hold all pixels of region {region} = rows {y} to {y + h}, columns {x} to {x + w}"
            )
            got = f"a window of rows {top} to {bottom}, columns {left} to {right}"
            checks.fail("extract_regions", "image", rule, got)


def _length(grid: RegionGrid, chunk: list[int] | None, stride: int) -> int:
    """Tokens in `chunk` that are not pure padding."""
    rows, cols = grid.token_shape(stride)
    if chunk is None:
        return rows * cols
    side = grid.region // stride
    return sum(
        min(side, rows - i // grid.cols * side) * min(side, cols - i % grid.cols * side)
        for i in chunk
    )
