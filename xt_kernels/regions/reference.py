"""The definition of `extract_regions`, `stitch_regions` and the position code, in eager PyTorch.

Signatures are those of the public ops; arguments are not checked here. Differentiable by autograd.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .grid import Order, RegionGrid

PIXEL_SCALE = {torch.uint8: 1 / 255, torch.uint16: 1 / 65535}


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
    memory_format: torch.memory_format = torch.contiguous_format,
) -> torch.Tensor:
    """`pixel * gain + bias` in fp32 (fp64 for fp64 images), 0 outside the image, then cast.

    gain = scale / std, bias = -mean / std, rounded to fp32.
    """
    if channels_last:
        image = image.movedim(-1, -3)
    *batch, channels, _, _ = image.shape
    inner = torch.promote_types(image.dtype, torch.float32)
    gain, bias = normalisation(image.dtype, channels, mean, std, scale)
    gains = torch.tensor(gain, dtype=inner, device=image.device)[:, None, None]
    biases = torch.tensor(bias, dtype=inner, device=image.device)[:, None, None]
    ids = range(grid.num_regions) if regions is None else regions
    cut = []
    for region in ids:
        top, left, height, width = grid.box(region)
        y, x = top - origin[0], left - origin[1]
        window = image[..., y : y + height, x : x + width].to(inner) * gains + biases
        below, beside = grid.region - height, grid.region - width
        cut.append(torch.nn.functional.pad(window, (0, beside, 0, below)).to(dtype))
    if not cut:
        return image.new_empty((*batch, 0, channels, grid.region, grid.region), dtype=dtype)
    out = torch.stack(cut, dim=-4)
    if memory_format == torch.channels_last:
        return out.movedim(-3, -1).contiguous().movedim(-1, -3)
    return out


def normalisation(
    pixel: torch.dtype,
    channels: int,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    scale: float | None,
) -> tuple[list[float], list[float]]:
    """(gain, bias) of each channel so that `(p * scale - mean) / std == p * gain + bias`."""
    scale = PIXEL_SCALE.get(pixel, 1.0) if scale is None else float(scale)
    means = [0.0] * channels if mean is None else [float(m) for m in mean]
    stds = [1.0] * channels if std is None else [float(s) for s in std]
    # A zero mean gives bias 0, not -0.
    biases = [-m / s if m else 0.0 for m, s in zip(means, stds, strict=True)]
    return [scale / s for s in stds], biases


def frequencies(dim: int, device: torch.device | None = None) -> torch.Tensor:
    """Angular frequencies w_k = 10000^(-k / q) of the position code, fp64 `[q]`, q = dim / 4."""
    quarter = dim // 4
    k = torch.arange(quarter, dtype=torch.float64, device=device)
    return 10000.0 ** (-k / max(quarter, 1))


def sincos_position(row: torch.Tensor, col: torch.Tensor, dim: int) -> torch.Tensor:
    """Position code `[..., dim]`, fp32, of integer token positions `row` and `col` (same shape).

    `[sin(x w), cos(x w), sin(y w), cos(y w)]` with x the column, y the row, q = dim / 4 and
    w_k = 10000^(-k / q), as in the released xT. Angles are fp64: an fp32 product loses 0.004 of a
    radian at index 100,000.
    """
    omega = frequencies(dim, row.device)
    x = col.to(torch.float64)[..., None] * omega
    y = row.to(torch.float64)[..., None] * omega
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=-1).to(torch.float32)


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
    """Each token plus its position code in fp32 (fp64 for fp64), cast, at its place in `out`."""
    if not channels_last:
        features = features.movedim(-3, -1)
    *batch, _, side, _, channels = features.shape
    inner = torch.promote_types(features.dtype, torch.float32)
    placement = grid.placement(chunk, grid.region // side, order)
    if out is None:
        shape = (*batch, placement.length, channels)
        out = features.new_zeros(shape, dtype=dtype or features.dtype)
    ids = placement.slots if regions is None else regions
    for k, region in enumerate(ids):
        start, pitch, height, width, row, col = placement.table[placement.slots[region]].tolist()
        for i in range(height):
            tokens = features[..., k, i, :width, :].to(inner)  # [.., width, C]
            if position:
                cols = torch.arange(col, col + width, device=features.device)
                code = sincos_position(torch.full_like(cols, row + i), cols, channels)
                tokens = tokens + code.to(inner)
            place = start + i * pitch
            out[..., place : place + width, :] = tokens.to(out.dtype)
    return out
