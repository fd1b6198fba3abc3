"""What every head is: from what the trunk gives to an output, a prediction and a loss."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from xt_kernels.regions import RegionGrid


class Trunk(NamedTuple):
    """What a head is built on.

    embedding_dim, token_dim: widths. stride: pixels a token. channels, strides: of the region
    encoder's stages before the last one.
    """

    embedding_dim: int
    token_dim: int
    stride: int
    channels: tuple[int, ...]
    strides: tuple[int, ...]


class Head(nn.Module):
    """`output = head(...)`, then `head.predict(output)` or `head.loss(output, target)`."""

    def predict(self, output: Any) -> Any:
        """What a user wants to see of an output: scores, masks, boxes."""
        raise NotImplementedError

    def loss(self, output: Any, target: Any) -> torch.Tensor:
        """A scalar with gradient. Raises ValueError for a target that cannot be one."""
        raise NotImplementedError


class Group(NamedTuple):
    """A rectangle of regions that a head sees at once; all groups of an image have the same size.

    row, col, rows, cols: in regions. own: the part (row, col, rows, cols), in regions, that belongs
    to no group before it. core: (top, left, bottom, right) in pixels, ends where the overlap with
    the next group is halfway; infinite at the image's edges.
    """

    row: int
    col: int
    rows: int
    cols: int
    own: tuple[int, int, int, int]
    core: tuple[float, float, float, float]


class GroupHead(Head):
    """A head on the map of a group of regions: context-enriched tokens, and earlier stages.

    side: regions a group, along each side; None is the whole image. overlap: regions that
    neighbouring groups share, along each side. stages: numbers of the region encoder's earlier
    stages that it uses.

    Groups are the same wherever the walk comes from, so a streamed prediction is the one in memory.
    """

    def __init__(self, side: int | None, overlap: int, stages: tuple[int, ...]) -> None:
        super().__init__()
        name = type(self).__name__
        if side is not None and side < 1:
            raise ValueError(f"{name}: group must be at least 1 region, or None, got {side}.")
        if overlap < 0 or (side is not None and overlap >= side):
            raise ValueError(
                f"{name}: overlap must be at least 0 and less than group = {side}, got {overlap}."
            )
        self.side, self.overlap, self.stages = side, overlap, stages

    def forward(self, tokens: torch.Tensor, stages: dict[int, torch.Tensor]) -> Any:
        """tokens `[N, C, h, w]` of N groups, zero where a token is pure padding; stages: number ->
        map `[N, C_i, h_i, w_i]`. Returns a raw output, tensors whose first axis is the group."""
        raise NotImplementedError

    def join(self, raw: Any, groups: list[Group], grid: RegionGrid) -> Any:
        """The output for a batch of images from the raw one, image by image, group by group."""
        raise NotImplementedError

    def groups(self, grid: RegionGrid) -> list[Group]:
        """The groups of an image, row-major."""
        rows = _spans(grid.rows, self.side, self.overlap)
        cols = _spans(grid.cols, self.side, self.overlap)
        s = grid.region
        return [
            Group(
                y.start, x.start, y.size, x.size,
                (y.own, x.own, y.start + y.size - y.own, x.start + x.size - x.own),
                (y.low * s, x.low * s, y.high * s, x.high * s),
            )
            for y in rows
            for x in cols
        ]  # fmt: skip


class _Span(NamedTuple):
    """Along one axis, in regions: where a group starts, its size, where its own part starts, and
    between which places its core lies."""

    start: int
    size: int
    own: int
    low: float
    high: float


def _spans(count: int, side: int | None, overlap: int) -> list[_Span]:
    side = count if side is None else min(side, count)
    step = max(side - overlap, 1)
    starts = [*range(0, count - side, step), count - side]
    out = []
    for i, start in enumerate(starts):
        before = starts[i - 1] + side if i else 0
        low = (before + start) / 2 if i else float("-inf")
        last = i + 1 == len(starts)
        high = float("inf") if last else (start + side + starts[i + 1]) / 2
        out.append(_Span(start, side, before, low, high))
    return out


def run_head(
    head: GroupHead,
    tokens: torch.Tensor,
    stages: dict[int, torch.Tensor],
    grid: RegionGrid,
    stride: int,
    recompute: int | None = None,
) -> Any:
    """The output of a head for whole images in memory.

    tokens: `[B, h, w, C]`, row-major over the image, without tokens of pure padding. stages:
    `[B, R, s_i, s_i, C_i]`, region by region. stride: pixels a token. recompute: regions that the
    head sees at once, at least one group, to run on them again in the backward pass; None: all at
    once and nothing again.
    """
    side = grid.region // stride
    rows, cols = grid.rows * side, grid.cols * side
    tokens = nn.functional.pad(tokens, (0, 0, 0, cols - tokens.shape[2], 0, rows - tokens.shape[1]))
    groups = head.groups(grid)

    def cut(whole: torch.Tensor, side: int) -> torch.Tensor:
        parts = [
            whole[:, g.row * side : (g.row + g.rows) * side, g.col * side : (g.col + g.cols) * side]
            for g in groups
        ]
        return torch.stack(parts, 1).flatten(0, 1).permute(0, 3, 1, 2)

    maps = {}
    for i in head.stages:
        parts = stages[i]
        whole = join_regions(parts.view(len(parts), grid.rows, grid.cols, *parts.shape[2:]))
        maps[i] = cut(whole, parts.shape[2])
    tokens = cut(tokens, side)
    if recompute is None:
        return head.join(head(tokens, maps), groups, grid)
    size = max(recompute // (groups[0].rows * groups[0].cols), 1)
    again = partial(_again, head)
    raw = [
        checkpoint(
            head,
            tokens[i : i + size],
            {n: m[i : i + size] for n, m in maps.items()},
            use_reentrant=False,
            context_fn=again,
        )
        for i in range(0, len(tokens), size)
    ]
    return head.join(_cat(raw), groups, grid)


def _again(head: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """For the first run, and for that in the backward pass, which no running statistic counts."""
    return nullcontext(), _statistics_kept(head)


@contextmanager
def _statistics_kept(head: nn.Module) -> Iterator[None]:
    norms = [m for m in head.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    try:
        for norm in norms:
            norm.momentum = 0.0
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def _cat(raw: list[Any]) -> Any:
    if isinstance(raw[0], torch.Tensor):
        return torch.cat(raw)
    return {name: _cat([part[name] for part in raw]) for name in raw[0]}


def one_group(raw: Any, index: int) -> Any:
    """The raw output of one group of several, its first axis kept."""
    if isinstance(raw, torch.Tensor):
        return raw[index : index + 1]
    return {name: one_group(value, index) for name, value in raw.items()}


def join_regions(parts: torch.Tensor) -> torch.Tensor:
    """Maps `[B, rows, cols, h, w, C]` of regions as one, `[B, rows * h, cols * w, C]`."""
    return parts.permute(0, 1, 3, 2, 4, 5).flatten(3, 4).flatten(1, 2)
