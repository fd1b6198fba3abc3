"""What all detection heads share: groups that overlap, global coordinates, one suppression."""

from __future__ import annotations

from typing import NamedTuple

import torch

from xt_kernels._checks import fail
from xt_kernels.regions import RegionGrid

from ._targets import check_boxes
from .base import Group, GroupHead, Trunk, one_group

Boxes = dict[str, torch.Tensor]
"""boxes `[N, 4]` (left, top, right, bottom) in pixels of the image, float32; labels `[N]`, int64;
and scores `[N]` of what was predicted."""


class Detections(NamedTuple):
    """The output of a detection head: raw, of each group of each image; groups; grid."""

    raw: dict[str, torch.Tensor]
    groups: list[Group]
    grid: RegionGrid


class BoxHead(GroupHead):
    """Boxes, found group by group. A box counts where its centre lies in the core of its group, so
    that an object is found whole if it reaches less than half of the overlap beyond a seam; what
    is found twice all the same is suppressed over the whole image at once.

    classes: labels are 0 to classes - 1. group, overlap: regions, along each side.
    min_stride: the region encoder's earlier stages from this stride on take part.
    score_threshold, nms_threshold (IoU), max_boxes (a group): of predictions.
    """

    def __init__(
        self,
        trunk: Trunk,
        classes: int,
        group: int | None,
        overlap: int,
        min_stride: int,
        score_threshold: float,
        nms_threshold: float,
        max_boxes: int,
    ) -> None:
        name = type(self).__name__
        stages = tuple(i for i, stride in enumerate(trunk.strides) if stride >= min_stride)
        super().__init__(group, overlap, stages)
        for option, count in (("classes", classes), ("max_boxes", max_boxes)):
            if count < 1:
                fail(name, option, "be at least 1", count)
        for option, share in (
            ("score_threshold", score_threshold),
            ("nms_threshold", nms_threshold),
        ):
            if not 0 <= share <= 1:
                fail(name, option, "be in [0, 1]", share)
        self.classes, self.max_boxes = classes, max_boxes
        self.score_threshold, self.nms_threshold = score_threshold, nms_threshold
        self.strides = [*(trunk.strides[i] for i in self.stages), trunk.stride]
        self.widths = [*(trunk.channels[i] for i in self.stages), trunk.token_dim]

    def decode(self, raw: dict[str, torch.Tensor], group: Group, grid: RegionGrid) -> Boxes:
        """The boxes of one group, in pixels of the image."""
        raise NotImplementedError

    def group_loss(
        self, raw: dict[str, torch.Tensor], targets: list[Boxes], height: int, width: int
    ) -> torch.Tensor:
        """The loss of groups of `height` x `width` pixels; boxes in pixels of their group."""
        raise NotImplementedError

    def join(
        self, raw: dict[str, torch.Tensor], groups: list[Group], grid: RegionGrid
    ) -> Detections:
        return Detections(raw, groups, grid)

    def candidates(self, raw: dict[str, torch.Tensor], group: Group, grid: RegionGrid) -> Boxes:
        """The boxes of one group that are its own, inside the image."""
        found = self.decode(raw, group, grid)
        limit = found["boxes"].new_tensor([grid.width, grid.height] * 2)
        boxes = found["boxes"].clamp(min=0).minimum(limit)
        centre = (found["boxes"][:, :2] + found["boxes"][:, 2:]) / 2
        kept = ((centre >= 0) & (centre < limit[:2])).all(1)
        # Whose it is tells the part inside the image: by that the loss divides the targets.
        x, y = ((boxes[:, :2] + boxes[:, 2:]) / 2).unbind(1)
        top, left, bottom, right = group.core
        kept &= (x >= left) & (x < right) & (y >= top) & (y < bottom)
        kept &= (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
        found["boxes"] = boxes
        return {name: value[kept] for name, value in found.items()}

    def merge(self, found: list[Boxes]) -> Boxes:
        """All boxes of an image, best first, without those that another one of their class
        suppresses."""
        from torchvision.ops import batched_nms

        names = ("boxes", "scores", "labels")
        boxes, scores, labels = (torch.cat([each[name] for each in found]) for name in names)
        kept = batched_nms(boxes, scores, labels, self.nms_threshold)
        return {"boxes": boxes[kept], "scores": scores[kept], "labels": labels[kept]}

    @torch.no_grad()
    def predict(self, output: Detections) -> list[Boxes]:
        """Boxes, scores and labels of each image, best first."""
        raw, groups, grid = output
        count = len(next(iter(raw.values())))
        found = [
            self.candidates(one_group(raw, i), groups[i % len(groups)], grid) for i in range(count)
        ]
        return [self.merge(found[i : i + len(groups)]) for i in range(0, count, len(groups))]

    def loss(self, output: Detections, target: list[Boxes]) -> torch.Tensor:
        """The library's loss, with each box as a target of the groups that its centre lies in.

        target: one dict an image, boxes `[N, 4]` (left, top, right, bottom) in pixels of the image,
            labels `[N]`, integers in [0, classes).
        """
        name = type(self).__name__
        raw, groups, grid = output
        images = len(next(iter(raw.values()))) // len(groups)
        if len(target) != images:
            fail(name, "target", f"be a list of one dict an image = {images}", len(target))
        parts = []
        height, width = (n * grid.region for n in (groups[0].rows, groups[0].cols))
        for each in target:
            check_boxes(name, each, self.classes, (grid.height, grid.width))
            device = next(iter(raw.values())).device
            boxes, labels = each["boxes"].to(device).float(), each["labels"].to(device).long()
            x, y = (boxes[:, 0] + boxes[:, 2]) / 2, (boxes[:, 1] + boxes[:, 3]) / 2
            for group in groups:
                left, top = group.col * grid.region, group.row * grid.region
                inside = (x >= left) & (x < left + width) & (y >= top) & (y < top + height)
                origin = boxes.new_tensor([left, top, left, top])
                parts.append({"boxes": boxes[inside] - origin, "labels": labels[inside]})
        return self.group_loss(raw, parts, height, width)
