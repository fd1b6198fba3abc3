"""Queries, keys and values for error studies of approximate attention, each from one seed.

All makers take a shape `[B, H, L, D]` and give (query, key, value), fp32 on a CPU unless told
otherwise. Scores are `query . key / sqrt(D)`, as everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def gaussian(shape: Sequence[int], seed: int = 0) -> Tensors:
    """Independent N(0, 1): no key is near any query, and the output is close to the mean value.

    The hardest case for hashing, and the easiest for anything that keeps a mean.
    """
    generator = torch.Generator().manual_seed(seed)
    query, key, value = torch.randn(3, *shape, generator=generator).unbind()
    return query, key, value


def clustered(
    shape: Sequence[int], seed: int = 0, *, clusters: int = 128, spread: float = 0.5
) -> Tensors:
    """Tokens of `clusters` kinds in random order: a token is its kind's centre plus noise.

    Centres are N(0, 1) in each head, query and key of a token are its centre plus N(0, spread**2)
    of their own, its value is another centre of its kind plus N(0, spread**2): a query finds most
    of its softmax mass at the keys of its own kind.
    """
    batch, heads, length, dim = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator)

    kind = torch.randint(clusters, (batch, length), generator=generator)
    places, contents = (normal(batch, heads, clusters, dim) for _ in range(2))
    rows = kind[:, None, :, None].expand(batch, heads, length, dim)
    query, key = (places.gather(2, rows) + spread * normal(*shape) for _ in range(2))
    return query, key, contents.gather(2, rows) + spread * normal(*shape)


def image_like(
    shape: Sequence[int], seed: int = 0, *, related: bool = True, smoothness: float = 1.0
) -> Tensors:
    """Tokens of a square image, row by row, whose features are smooth fields.

    L must be a square. Each channel is a random field whose amplitude falls with the frequency f as
    f**-smoothness, 1 for natural images. With `related`, queries and keys are the same field, each
    with a tenth of noise, so that like attends to like and neighbours to one another; without it
    they are unrelated random projections of the field. Values are a projection of the field.
    Raises ValueError if L is no square.
    """
    batch, heads, length, dim = shape
    side = math.isqrt(length)
    if side * side != length:
        raise ValueError(f"image_like: L must be a square, got {length}.")
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(batch, heads, dim, side, side, generator=generator)
    frequency = torch.hypot(
        torch.fft.fftfreq(side, 1 / side)[:, None], torch.fft.rfftfreq(side, 1 / side)[None]
    )
    # The mean of a channel is drawn like its lowest frequency.
    spectrum = torch.fft.rfft2(noise) * frequency.clamp(min=1.0) ** -smoothness
    field = torch.fft.irfft2(spectrum, s=(side, side))
    field = (field / field.std()).flatten(3).transpose(2, 3)  # [B, H, L, D]

    def project() -> torch.Tensor:
        weight = torch.randn(batch, heads, dim, dim, generator=generator) / math.sqrt(dim)
        return field @ weight

    def noisy() -> torch.Tensor:
        return field + 0.1 * torch.randn(*shape, generator=generator)

    query, key = (noisy(), noisy()) if related else (project(), project())
    return query, key, project()


MAKERS = {"gaussian": gaussian, "clustered": clustered, "image": image_like}


def relative_error(ours: torch.Tensor, truth: torch.Tensor) -> float:
    """`|ours - truth| / |truth|` in the Frobenius norm, fp64."""
    truth = truth.double()
    return float((ours.double() - truth).norm() / truth.norm())
