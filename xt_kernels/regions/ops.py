"""The registered ops behind `extract_regions` and `stitch_regions`: Triton on CUDA, eager on CPU.

Arguments are checked by `api.py`. Images are `[B, C, h, w]`, features `[B, R, t, t, C]`, any
strides; where there may be a gradient B may be missing, since views that add it and take it away
cost a backward pass 5 us. A grid is three integers, lists of regions are integers or None for all.
Tables of places are made here, outside what torch.compile sees, and kept: they are small, and
copying one to a GPU for each call would stall it.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from .._kept import kept
from . import eager
from .direct import op
from .grid import Placement, RegionGrid
from .reference import frequencies

_Ids = tuple[int, ...] | None

_grid = lru_cache(maxsize=64)(RegionGrid)


def _ids(regions: Sequence[int] | None) -> _Ids:
    return None if regions is None else tuple(regions)


@lru_cache(maxsize=64)
def _boxes(grid: RegionGrid, regions: _Ids, top: int, left: int) -> torch.Tensor:
    """int64 `[R, 4]`: top and left in the window at (top, left), height, width of each region."""
    ids = np.arange(grid.num_regions) if regions is None else np.array(regions, dtype=np.int64)
    y, x = ids // max(grid.cols, 1) * grid.region, ids % max(grid.cols, 1) * grid.region
    height = np.minimum(grid.height - y, grid.region)
    width = np.minimum(grid.width - x, grid.region)
    return torch.from_numpy(np.stack([y - top, x - left, height, width], axis=1))


@lru_cache(maxsize=64)
def _places(
    grid: RegionGrid, regions: _Ids, chunk: _Ids, stride: int, order: str
) -> tuple[torch.Tensor, int]:
    """Rows of `Placement.table` for `regions`, and the length of the sequence."""
    placement: Placement = grid.placement(chunk, stride, "row" if order == "row" else "tile")
    if regions is None or list(regions) == list(placement.slots):
        return placement.table, placement.length
    slots = np.array([placement.slots[i] for i in regions], dtype=np.int64)
    return torch.from_numpy(placement.table.numpy()[slots]), placement.length


@lru_cache(maxsize=64)
def _turns(channels: int) -> torch.Tensor:
    """int64 `[C / 4]`: frequencies of the position code in turns, times 2**64."""
    # Scaling by 2**64 is exact; the division rounds to 2**-53 of the frequency.
    scaled = frequencies(channels, torch.device("cpu")) / (2 * torch.pi) * 2.0**64
    return scaled.to(torch.int64)


@lru_cache(maxsize=64)
def _constants(values: tuple[float, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device="cpu")


# Keyed by stream too: the copy is ordered with the work of its own stream alone.
@kept(256)
def _uploaded(table: "_Key", device: torch.device, stream: int) -> torch.Tensor:
    return table.tensor.pin_memory().to(device, non_blocking=True)


class _Key:
    """A kept table as a key: equal only to itself."""

    __slots__ = ("tensor",)

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __hash__(self) -> int:
        return id(self.tensor)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self.tensor is other.tensor


def _on(like: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """`table` on the device of `like`, copied there once without waiting."""
    if not table.numel():
        return table.to(like.device)
    stream = torch.cuda.current_stream(like.device).cuda_stream
    return _uploaded(_Key(table), like.device, stream)


def _inner(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _batched(tensor: torch.Tensor, dims: int) -> torch.Tensor:
    """`tensor` with the axis B, of `dims` axes."""
    return tensor if tensor.dim() == dims else tensor.unsqueeze(0)


def _new_regions(
    image: torch.Tensor, num_regions: int, side: int, dtype: torch.dtype, channels_last: bool
) -> torch.Tensor:
    *batch, channels, _, _ = image.shape
    if channels_last:
        out = image.new_empty((*batch, num_regions, side, side, channels), dtype=dtype)
        return out.movedim(-1, -3)
    return image.new_empty((*batch, num_regions, channels, side, side), dtype=dtype)


def _aligned(grid: RegionGrid, left: int) -> bool:
    return grid.region % 8 == 0 and left % 8 == 0


@op("xt::extract_regions_fwd")
def extract_forward(
    image: torch.Tensor,
    gain: Sequence[float],
    bias: Sequence[float],
    regions: Sequence[int] | None,
    height: int,
    width: int,
    side: int,
    top: int,
    left: int,
    dtype: torch.dtype,
    channels_last: bool,
) -> torch.Tensor:
    """`[B, R, C, s, s]` of the window at (top, left) of a height x width image, or without B."""
    grid = _grid(height, width, side)
    count = grid.num_regions if regions is None else len(regions)
    out = _new_regions(image, count, side, dtype, channels_last)
    _extract(_batched(image, 4), _batched(out, 5), gain, bias, regions, grid, top, left)
    return out


@extract_forward.register_fake
def _(
    image: torch.Tensor, gain: Any, bias: Any, regions: Sequence[int] | None,
    height: int, width: int, side: int, top: int, left: int, dtype: torch.dtype,
    channels_last: bool,
) -> torch.Tensor:  # fmt: skip
    grid = RegionGrid(height, width, side)
    count = grid.num_regions if regions is None else len(regions)
    return _new_regions(image, count, side, dtype, channels_last)


@op("xt::extract_regions_into", mutates=("out",))
def extract_into(
    image: torch.Tensor,
    out: torch.Tensor,
    gain: Sequence[float],
    bias: Sequence[float],
    regions: Sequence[int] | None,
    height: int,
    width: int,
    side: int,
    top: int,
    left: int,
) -> None:
    """Fills `out` `[B, R, C, s, s]`."""
    _extract(image, out, gain, bias, regions, _grid(height, width, side), top, left)


@extract_into.register_fake
def _(*arguments: Any) -> None:
    return None


def _extract(
    image: torch.Tensor,
    out: torch.Tensor,
    gain: Sequence[float],
    bias: Sequence[float],
    regions: Sequence[int] | None,
    grid: RegionGrid,
    top: int,
    left: int,
) -> None:
    boxes = _boxes(grid, _ids(regions), top, left)
    if not image.is_cuda:
        eager.extract_forward(image, boxes, tuple(gain), tuple(bias), out)
        return
    from . import kernels

    inner = _inner(image.dtype)
    with torch.cuda.device(image.device):
        kernels.launch_extract_forward(
            image,
            _on(image, boxes),
            _on(image, _constants(tuple(gain), inner)),
            _on(image, _constants(tuple(bias), inner)),
            out,
            _aligned(grid, left),
        )


@op("xt::extract_regions_bwd")
def extract_backward(
    grad: torch.Tensor,
    gain: Sequence[float],
    regions: Sequence[int] | None,
    height: int,
    width: int,
    side: int,
    top: int,
    left: int,
    window: Sequence[int],
    dtype: torch.dtype,
    channels_last: bool,
) -> torch.Tensor:
    """Gradient `[B, C, h, w]` of a window of size `window` (h, w), zero where no region reads; or
    without B.
    """
    grid = _grid(height, width, side)
    boxes = _boxes(grid, _ids(regions), top, left)
    if not grad.is_cuda:
        is_covered = _covers(boxes, window)
        ways = boxes, tuple(gain), tuple(window), is_covered, dtype, channels_last
        return eager.extract_pull(grad.shape, grad.stride(), grad.dtype, *ways)(grad)
    from . import kernels

    new = _new_image(grad, window, dtype, channels_last, boxes)
    grad, grad_image = _batched(grad, 5), _batched(new, 4)
    with torch.cuda.device(grad.device):
        kernels.launch_extract_backward(
            grad,
            _on(grad, boxes),
            _on(grad, _constants(tuple(gain), _inner(dtype))),
            grad_image,
            _aligned(grid, left),
        )
    return new


@extract_backward.register_fake
def _(grad: torch.Tensor, *others: Any) -> torch.Tensor:
    window, dtype, channels_last = others[-3:]
    return _new_image(grad, window, dtype, channels_last, None)


@lru_cache(maxsize=64)
def _area(boxes: torch.Tensor) -> int:
    """Pixels in all boxes."""
    return int((boxes[:, 2] * boxes[:, 3]).sum())


def _covers(boxes: torch.Tensor, window: Sequence[int]) -> bool:
    """Whether distinct boxes hold every pixel of a window of this size."""
    return _area(boxes) == math.prod(window)


def _new_image(
    grad: torch.Tensor,
    window: Sequence[int],
    dtype: torch.dtype,
    channels_last: bool,
    boxes: torch.Tensor | None,
) -> torch.Tensor:
    """Zeros `[B, C, h, w]`, or uninitialised where `boxes` cover the window, or are None."""
    *batch, _, channels, _, _ = grad.shape
    sizes = [*batch, channels, *window]
    steps = eager.layout(sizes, eager.PIXELS if channels_last else eager.PLANES)
    new = grad.new_empty_strided(sizes, steps, dtype=dtype)
    return new if boxes is None or _covers(boxes, window) else new.zero_()


def _by_pixel(image: torch.Tensor) -> bool:
    return image.stride(-3) == 1 and image.shape[-3] > 1


def _extract_setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    image, gain, _, *geometry, _, _ = inputs
    ctx.gain, ctx.geometry = gain, geometry
    ctx.window, ctx.dtype = list(image.shape[-2:]), image.dtype
    ctx.channels_last = _by_pixel(image)


def _extract_pull(image, out, gain, bias, regions, height, width, side, top, left, *_):  # type: ignore[no-untyped-def]
    boxes = _boxes(_grid(height, width, side), _ids(regions), top, left)
    window = tuple(image.shape[-2:])
    ways = boxes, tuple(gain), window, _covers(boxes, window), image.dtype, _by_pixel(image)
    return eager.extract_pull(out.shape, out.stride(), out.dtype, *ways)


def _extract_gradient(ctx, grad):  # type: ignore[no-untyped-def]
    grad_image = None
    if ctx.needs_input_grad[0]:
        grad_image = extract_backward(
            grad, ctx.gain, *ctx.geometry, ctx.window, ctx.dtype, ctx.channels_last
        )
    return grad_image, *[None] * 10


extract_forward.register_autograd(_extract_gradient, _extract_setup, _extract_pull)


@op("xt::stitch_regions_fwd")
def stitch_forward(
    features: torch.Tensor,
    regions: Sequence[int] | None,
    chunk: Sequence[int] | None,
    length: int,
    height: int,
    width: int,
    side: int,
    order: str,
    position: bool,
    dtype: torch.dtype,
    partial: bool,
) -> torch.Tensor:
    """Tokens `[B, L, C]`, L = length, or without B; with `partial` zero where no region writes."""
    out = _new_tokens(features, length, dtype, partial)
    maps, tokens = _batched(features, 5), _batched(out, 3)
    _stitch(maps, regions, chunk, _grid(height, width, side), order, position, tokens)
    return out


@stitch_forward.register_fake
def _(features: torch.Tensor, regions: Any, chunk: Any, length: int, *others: Any) -> torch.Tensor:
    dtype, partial = others[-2:]
    return _new_tokens(features, length, dtype, partial)


@op("xt::stitch_regions_into", mutates=("out",))
def stitch_into(
    features: torch.Tensor,
    out: torch.Tensor,
    regions: Sequence[int] | None,
    chunk: Sequence[int] | None,
    height: int,
    width: int,
    side: int,
    order: str,
    position: bool,
) -> None:
    """Writes into tokens `out` `[B, L, C]`."""
    _stitch(features, regions, chunk, _grid(height, width, side), order, position, out)


@stitch_into.register_fake
def _(*arguments: Any) -> None:
    return None


def _new_tokens(
    features: torch.Tensor, length: int, dtype: torch.dtype, partial: bool
) -> torch.Tensor:
    new = features.new_zeros if partial else features.new_empty
    *batch, _, _, _, channels = features.shape
    return new((*batch, length, channels), dtype=dtype)


def _stitch(
    features: torch.Tensor,
    regions: Sequence[int] | None,
    chunk: Sequence[int] | None,
    grid: RegionGrid,
    order: str,
    position: bool,
    out: torch.Tensor,
) -> None:
    table = _places(grid, _ids(regions), _ids(chunk), grid.region // features.shape[2], order)[0]
    if not features.is_cuda:
        eager.stitch_forward(features, table, position, out)
        return
    from . import kernels

    turns = _on(features, _turns(features.shape[4])) if position else None
    with torch.cuda.device(features.device):
        kernels.launch_stitch_forward(features, _on(features, table), turns, out)


@op("xt::stitch_regions_bwd")
def stitch_backward(
    grad: torch.Tensor,
    regions: Sequence[int] | None,
    chunk: Sequence[int] | None,
    count: int,
    height: int,
    width: int,
    side: int,
    order: str,
    tokens_a_side: int,
    dtype: torch.dtype,
    channels_last: bool,
) -> torch.Tensor:
    """Gradient `[B, R, t, t, C]` of the features, or without B; R = count, t = tokens_a_side."""
    grid = _grid(height, width, side)
    table = _places(grid, _ids(regions), _ids(chunk), side // tokens_a_side, order)[0]
    if not grad.is_cuda:
        ways = table, tokens_a_side, dtype, channels_last
        return eager.stitch_pull(grad.shape, grad.stride(), *ways)(grad)
    from . import kernels

    new = _new_features(grad, count, tokens_a_side, dtype, channels_last)
    grad, out = _batched(grad, 3), _batched(new, 5)
    with torch.cuda.device(grad.device):
        kernels.launch_stitch_backward(grad, _on(grad, table), out)
    return new


@stitch_backward.register_fake
def _(grad: torch.Tensor, regions: Any, chunk: Any, count: int, *others: Any) -> torch.Tensor:
    tokens_a_side, dtype, channels_last = others[-3:]
    return _new_features(grad, count, tokens_a_side, dtype, channels_last)


def _new_features(
    grad: torch.Tensor, count: int, tokens_a_side: int, dtype: torch.dtype, channels_last: bool
) -> torch.Tensor:
    *batch, _, channels = grad.shape
    sizes = [*batch, count, tokens_a_side, tokens_a_side, channels]
    steps = eager.layout(sizes, eager.TOKENS if channels_last else eager.MAPS)
    return grad.new_empty_strided(sizes, steps, dtype=dtype)


def _stitch_setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    features, regions, chunk, _, height, width, side, order, *_ = inputs
    ctx.lists = regions, chunk, features.shape[-4]
    ctx.geometry = height, width, side, order, features.shape[-2]
    ctx.dtype, ctx.channels_last = features.dtype, features.stride(-1) == 1


def _stitch_pull(features, out, regions, chunk, length, height, width, side, order, *_):  # type: ignore[no-untyped-def]
    tokens_a_side = features.shape[-2]
    grid, stride = _grid(height, width, side), side // tokens_a_side
    table = _places(grid, _ids(regions), _ids(chunk), stride, order)[0]
    ways = table, tokens_a_side, features.dtype, features.stride(-1) == 1
    return eager.stitch_pull(out.shape, out.stride(), *ways)


def _stitch_gradient(ctx, grad):  # type: ignore[no-untyped-def]
    grad_features = None
    if ctx.needs_input_grad[0]:
        grad_features = stitch_backward(
            grad, *ctx.lists, *ctx.geometry, ctx.dtype, ctx.channels_last
        )
    return grad_features, *[None] * 10


stitch_forward.register_autograd(_stitch_gradient, _stitch_setup, _stitch_pull)
