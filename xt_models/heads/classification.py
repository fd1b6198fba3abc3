"""Classification from one embedding an image."""

from __future__ import annotations

from torch import nn


class ClassificationHead(nn.Sequential):
    """LayerNorm and linear: embedding `[B, C]` of a context encoder -> logits `[B, classes]`."""

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__(nn.LayerNorm(dim, eps=1e-5), nn.Linear(dim, num_classes))


class PlainHead(nn.Sequential):
    """The released head without context: linear (C, 4C), GELU, LayerNorm, linear."""

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__(
            nn.Linear(dim, 4 * dim),
            nn.GELU(),
            nn.LayerNorm(4 * dim),
            nn.Linear(4 * dim, num_classes),
        )
