"""Maps of classes over the image: what all dense heads share, and a light one without decoder."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from xt_kernels._checks import fail
from xt_kernels.regions import RegionGrid

from ._targets import check_labels, check_same_shape, check_shares
from .base import Group, GroupHead, Trunk

LOSSES = ("cross_entropy", "bce", "focal")


class MapHead(GroupHead):
    """Logits `[B, K, ceil(H / output_stride), ceil(W / output_stride)]`.

    classes: K. loss: "cross_entropy" for classes that exclude one another; "bce" or "focal"
        (torchvision's sigmoid focal loss) for maps that are independent of each other.
    output_stride: pixels a cell of the map, along each side. pos_weight: of positive cells in
        "bce". ignore_index: label of cells that "cross_entropy" leaves out.
    """

    def __init__(
        self,
        trunk: Trunk,
        classes: int,
        loss: str,
        output_stride: int,
        pos_weight: float | None,
        ignore_index: int,
        group: int | None,
        stages: tuple[int, ...] = (),
    ) -> None:
        super().__init__(group, 0, stages)
        name = type(self).__name__
        if classes < 1:
            fail(name, "classes", "be at least 1", classes)
        if loss not in LOSSES:
            fail(name, "loss", f"be one of {', '.join(LOSSES)}", repr(loss))
        if output_stride < 1 or trunk.stride % output_stride:
            rule = f"divide the encoder's stride {trunk.stride}"
            fail(name, "output_stride", rule, output_stride)
        if pos_weight is not None and (loss != "bce" or not pos_weight > 0):
            fail(name, "pos_weight", 'be positive, and None unless loss is "bce"', pos_weight)
        self.classes, self.kind_of_loss, self.output_stride = classes, loss, output_stride
        self.pos_weight, self.ignore_index = pos_weight, ignore_index

    @property
    def is_exclusive(self) -> bool:
        """Whether classes exclude one another."""
        return self.kind_of_loss == "cross_entropy"

    def join(self, raw: torch.Tensor, groups: list[Group], grid: RegionGrid) -> torch.Tensor:
        side = grid.region // self.output_stride
        raw = raw.view(-1, len(groups), *raw.shape[1:])
        rows: dict[int, list[torch.Tensor]] = {}
        for i, group in enumerate(groups):
            rows.setdefault(group.row, []).append(own_part(raw[:, i], group, side))
        whole = torch.cat([torch.cat(parts, -1) for parts in rows.values()], -2)
        height, width = grid.token_shape(self.output_stride)
        return whole[..., :height, :width]

    def predict(self, output: torch.Tensor) -> torch.Tensor:
        """Classes `[B, h, w]`, int64, or scores in [0, 1], `[B, K, h, w]`, float32."""
        return output.argmax(1) if self.is_exclusive else output.float().sigmoid()

    def loss(self, output: torch.Tensor, target: Any) -> torch.Tensor:
        """Mean over the cells.

        target: of the size of the output: classes `[B, h, w]`, integers, for "cross_entropy";
            shares `[B, K, h, w]`, bool or in [0, 1], otherwise.
        """
        name, shape = type(self).__name__, list(output.shape)
        output = output.float()
        mean: torch.Tensor
        if self.is_exclusive:
            check_same_shape(name, target, "[B, h, w]", [shape[0], *shape[2:]])
            check_labels(name, target, self.classes, self.ignore_index)
            kept = (target != self.ignore_index).sum().clamp(min=1)
            total = F.cross_entropy(
                output, target.long(), ignore_index=self.ignore_index, reduction="sum"
            )
            mean = total / kept
            return mean
        check_same_shape(name, target, "[B, K, h, w]", shape)
        check_shares(name, target)
        target = target.to(output.dtype)
        if self.kind_of_loss == "focal":
            from torchvision.ops import sigmoid_focal_loss

            mean = sigmoid_focal_loss(output, target, reduction="mean")
        else:
            weight = None if self.pos_weight is None else output.new_tensor(self.pos_weight)
            mean = F.binary_cross_entropy_with_logits(output, target, pos_weight=weight)
        return mean


def own_part(raw: torch.Tensor, group: Group, side: int) -> torch.Tensor:
    """That part of a map `[.., h, w]` of a group that belongs to no group before it; side: cells a
    region."""
    row, col, rows, cols = group.own
    top, left = (row - group.row) * side, (col - group.col) * side
    return raw[..., top : top + rows * side, left : left + cols * side]


class DenseHead(MapHead):
    """LayerNorm, linear, pixel shuffle: each token gives the cells under it. No seams."""

    def __init__(
        self,
        trunk: Trunk,
        *,
        classes: int,
        loss: str = "cross_entropy",
        output_stride: int = 1,
        pos_weight: float | None = None,
        ignore_index: int = 255,
    ) -> None:
        super().__init__(trunk, classes, loss, output_stride, pos_weight, ignore_index, 1)
        self.scale = trunk.stride // output_stride
        self.norm = nn.LayerNorm(trunk.token_dim, eps=1e-5)
        self.proj = nn.Linear(trunk.token_dim, classes * self.scale**2)

    def forward(self, tokens: torch.Tensor, stages: dict[int, torch.Tensor]) -> torch.Tensor:
        cells = self.proj(self.norm(tokens.permute(0, 2, 3, 1)))
        return F.pixel_shuffle(cells.permute(0, 3, 1, 2), self.scale)
