"""The definition of `extract_regions`, `stitch_regions` and the position code, in eager PyTorch."""

from __future__ import annotations

import torch

from .grid import Placement, RegionGrid


def extract_regions(
    image: torch.Tensor,
    grid: RegionGrid,
    regions: list[int],
    origin: tuple[int, int],
    gain: torch.Tensor,
    bias: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Regions `[B, R, C, s, s]` of `image` `[B, C, h, w]`: `pixel * gain + bias`, 0 outside the image.

    gain, bias: fp32 `[C]`; the arithmetic is fp32 (fp64 for fp64 images), cast at the end.
    origin: (row, column) of the window `image` in the whole image.
    """
    batch, channels = image.shape[:2]
    side = grid.region
    out = image.new_zeros((batch, len(regions), channels, side, side), dtype=dtype)
    inner = torch.promote_types(image.dtype, torch.float32)
    gain, bias = (v.to(inner)[:, None, None] for v in (gain, bias))
    for k, region in enumerate(regions):
        top, left, height, width = grid.box(region)
        y, x = top - origin[0], left - origin[1]
        window = image[:, :, y : y + height, x : x + width]
        out[:, k, :, :height, :width] = (window.to(inner) * gain + bias).to(dtype)
    return out


def sincos_position(row: torch.Tensor, col: torch.Tensor, dim: int) -> torch.Tensor:
    """Position code `[..., dim]`, fp32, of integer token positions `row` and `col` (same shape).

    `[sin(x w), cos(x w), sin(y w), cos(y w)]` with x the column, y the row, q = dim / 4 and
    w_k = 10000^(-k / q), as in the released xT. Angles are fp64: an fp32 product loses 0.004 of a
    radian at index 100,000.
    """
    quarter = dim // 4
    omega = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64, device=row.device) / quarter)
    x = col.to(torch.float64)[..., None] * omega
    y = row.to(torch.float64)[..., None] * omega
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=-1).to(torch.float32)


def stitch_regions(
    features: torch.Tensor,
    placement: Placement,
    regions: list[int],
    position: bool,
    out: torch.Tensor,
) -> torch.Tensor:
    """Writes tokens of `features` `[B, R, h, w, C]` to their places in `out` `[B, L, C]`."""
    inner = torch.promote_types(features.dtype, torch.float32)
    for k, region in enumerate(regions):
        start, pitch, height, width, row, col = placement.table[placement.slots[region]].tolist()
        tokens = features[:, k, :height, :width]  # [B, height, width, C]
        if position:
            rows = torch.arange(row, row + height, device=features.device)
            cols = torch.arange(col, col + width, device=features.device)
            code = sincos_position(*torch.meshgrid(rows, cols, indexing="ij"), features.shape[-1])
            tokens = tokens.to(inner) + code.to(inner)
        batch, channels = out.shape[0], out.shape[2]
        place = out.as_strided(
            (batch, height, width, channels),
            (out.stride(0), pitch * out.stride(1), out.stride(1), out.stride(2)),
            out.storage_offset() + start * out.stride(1),
        )
        place.copy_(tokens)
    return out
