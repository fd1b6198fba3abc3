"""`extract_regions` cuts an image window into normalised regions; `stitch_regions` puts region
features back as one token sequence. Each is the other's adjoint (without normalisation, position).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from . import reference
from .grid import Order, RegionGrid

_SCALE = {torch.uint8: 1 / 255, torch.uint16: 1 / 65535}


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
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Cuts regions out of an image window: `(pixel * scale - mean) / std`, zero outside the image.

    image: window of the image, `[C, h, w]` or `[B, C, h, w]` (`[.., h, w, C]` if channels_last).
    grid: geometry of the whole image.
    regions: R region numbers, in the order wanted; None is all of the grid.
    origin: (row, column) of the window in the whole image, pixels.
    mean, std: C numbers each, in units of `pixel * scale`; default 0 and 1.
    scale: default 1 / 255 for uint8, 1 / 65535 for uint16, 1 for floats.
    dtype: of the result; the arithmetic inside is fp32.

    Returns `[R, C, s, s]` or `[B, R, C, s, s]`.
    Raises ValueError if a region has pixels outside the window, or shapes and numbers disagree.
    """
    batched = image.dim() == 4
    image = image if batched else image[None]
    if channels_last:
        image = image.movedim(-1, 1)
    ids = list(range(grid.num_regions)) if regions is None else [int(i) for i in regions]
    channels = image.shape[1]
    scale = _SCALE.get(image.dtype, 1.0) if scale is None else scale
    mean_ = torch.zeros(channels) if mean is None else torch.tensor(mean, dtype=torch.float32)
    std_ = torch.ones(channels) if std is None else torch.tensor(std, dtype=torch.float32)
    for name, value in (("mean", mean_), ("std", std_)):
        if value.numel() != channels:
            raise ValueError(
                f"extract_regions: {name} must hold one number for each of the {channels} "
                f"channels, got {value.numel()}."
            )
    height, width = image.shape[2:]
    for region in ids:
        top, left, h, w = grid.box(region)
        y, x = top - origin[0], left - origin[1]
        if y < 0 or x < 0 or y + h > height or x + w > width:
            raise ValueError(
                f"extract_regions: image must hold all pixels of region {region} "
                f"(rows {top} to {top + h}, columns {left} to {left + w}), got a window of "
                f"{height} x {width} at {tuple(origin)}."
            )
    out = reference.extract_regions(image, grid, ids, origin, scale / std_, -mean_ / std_, dtype)
    return out if batched else out[0]


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

    features: `[R, C, t, t]` or `[B, R, C, t, t]` (`[.., t, t, C]` if channels_last), t tokens a side.
    grid: geometry of the whole image; the encoder's stride is `grid.region / t`.
    regions: the R region numbers of `features`, in any order; None is all of `chunk`.
    chunk: region numbers that make up the sequence; None is all of the grid.
    order: "row" (row-major over the image) or "tile" (region after region, in the order of chunk).
    position: add the position code of `reference.sincos_position` in fp32; C must be a multiple of 4.
    dtype: of a new buffer; default is that of features.
    out: `[L, C]` or `[B, L, C]` buffer to write into, for regions that arrive in several calls.

    Tokens of pure padding are dropped; L counts the others in `chunk`.
    Returns `[L, C]` or `[B, L, C]`.
    """
    batched = features.dim() == 5
    features = features if batched else features[None]
    if not channels_last:
        features = features.movedim(2, -1)
    batch, count, side, _, channels = features.shape
    if grid.region % side:
        raise ValueError(
            f"stitch_regions: features must have a number of tokens a side that divides the region "
            f"side {grid.region}, got {side}."
        )
    placement = grid.placement(chunk, grid.region // side, order)
    ids = list(placement.slots) if regions is None else [int(i) for i in regions]
    if len(ids) != count:
        raise ValueError(
            f"stitch_regions: features must hold {len(ids)} regions to match regions, got {count}."
        )
    if out is None:
        new = features.new_empty if len(ids) == len(placement.slots) else features.new_zeros
        out = new((batch, placement.length, channels), dtype=dtype or features.dtype)
    else:
        out = out if batched else out[None]
        if out.shape != (batch, placement.length, channels):
            raise ValueError(
                f"stitch_regions: out must be [B, L, C] = {[batch, placement.length, channels]}, "
                f"got {list(out.shape)}."
            )
    out = reference.stitch_regions(features, placement, ids, position, out)
    return out if batched else out[0]
