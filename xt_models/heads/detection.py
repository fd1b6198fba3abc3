"""Detection heads: torchvision's FCOS, and Deformable DETR of `transformers`."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import nn

from xt_kernels._checks import fail
from xt_kernels.regions import RegionGrid

from .base import Group, Trunk
from .boxes import Boxes, BoxHead


class FcosHead(BoxHead):
    """torchvision's FCOS on a feature pyramid of earlier stages and context-enriched tokens.

    dim: channels of the pyramid and the towers, a multiple of 32. The other options: `BoxHead`.
    """

    def __init__(
        self,
        trunk: Trunk,
        *,
        classes: int,
        dim: int = 128,
        group: int | None = 4,
        overlap: int = 1,
        min_stride: int = 8,
        score_threshold: float = 0.05,
        nms_threshold: float = 0.5,
        max_boxes: int = 100,
    ) -> None:
        from torchvision.models.detection.anchor_utils import AnchorGenerator
        from torchvision.models.detection.fcos import FCOS
        from torchvision.ops import FeaturePyramidNetwork

        super().__init__(
            trunk, classes, group, overlap, min_stride, score_threshold, nms_threshold, max_boxes
        )
        if dim < 32 or dim % 32:
            fail("FcosHead", "dim", "be a positive multiple of 32", dim)
        self.pyramid = FeaturePyramidNetwork(self.widths, dim)
        backbone = nn.Identity()
        backbone.out_channels = dim  # type: ignore[assignment]
        self.fcos = FCOS(
            backbone,
            classes,
            anchor_generator=AnchorGenerator(
                tuple((stride,) for stride in self.strides), ((1.0,),) * len(self.strides)
            ),
            score_thresh=score_threshold,
            nms_thresh=nms_threshold,
            detections_per_img=max_boxes,
        )

    def forward(
        self, tokens: torch.Tensor, stages: dict[int, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        maps = [*(stages[i] for i in self.stages), tokens]
        levels = self.pyramid(OrderedDict((str(i), level) for i, level in enumerate(maps)))
        raw: dict[str, torch.Tensor] = self.fcos.head(list(levels.values()))
        return raw

    def _anchors(self, height: int, width: int, like: torch.Tensor) -> list[torch.Tensor]:
        """Anchors `[h * w, 4]` of each level, in pixels of a group."""
        generator = self.fcos.anchor_generator
        sizes = [[height // stride, width // stride] for stride in self.strides]
        generator.set_cell_anchors(torch.float32, like.device)
        steps = [[like.new_tensor(s, dtype=torch.int64)] * 2 for s in self.strides]
        anchors: list[torch.Tensor] = generator.grid_anchors(sizes, steps)
        return anchors

    def decode(self, raw: dict[str, torch.Tensor], group: Group, grid: RegionGrid) -> Boxes:
        height, width = group.rows * grid.region, group.cols * grid.region
        logits = raw["cls_logits"]
        anchors = self._anchors(height, width, logits)
        left, top = group.col * grid.region, group.row * grid.region
        origin = anchors[0].new_tensor([left, top, left, top])
        counts = [len(level) for level in anchors]
        found = self.fcos.postprocess_detections(
            {name: list(torch.split(value.float(), counts, 1)) for name, value in raw.items()},
            [[level + origin for level in anchors]],
            [(grid.height, grid.width)],
        )
        boxes: Boxes = found[0]
        return boxes

    def group_loss(
        self, raw: dict[str, torch.Tensor], targets: list[Boxes], height: int, width: int
    ) -> torch.Tensor:
        anchors = self._anchors(height, width, raw["cls_logits"])
        losses = self.fcos.compute_loss(
            targets,
            {name: value.float() for name, value in raw.items()},
            [torch.cat(anchors)] * len(targets),
            [len(level) for level in anchors],
        )
        total: torch.Tensor = sum(losses.values())
        return total


class _Levels(nn.Module):
    """Stands in the place of the backbone: gives the feature maps that were put into `maps`."""

    maps: list[torch.Tensor]

    def forward(self, image: torch.Tensor, mask: torch.Tensor) -> list[tuple[torch.Tensor, Any]]:
        return [(m, mask.new_ones(len(m), *m.shape[-2:], dtype=torch.bool)) for m in self.maps]


class DetrHead(BoxHead):
    """Deformable DETR (Zhu et al. 2021) of `transformers`, box refinement included, on earlier
    stages and context-enriched tokens in the place of its backbone.

    num_queries: boxes a group, at most. dim: width, a multiple of 32. encoder_layers,
    decoder_layers: depth. config: further fields of `DeformableDetrConfig`. The other options:
    `BoxHead`.
    """

    def __init__(
        self,
        trunk: Trunk,
        *,
        classes: int,
        num_queries: int = 100,
        dim: int = 256,
        encoder_layers: int = 6,
        decoder_layers: int = 6,
        config: dict[str, Any] | None = None,
        group: int | None = 4,
        overlap: int = 1,
        min_stride: int = 8,
        score_threshold: float = 0.05,
        nms_threshold: float = 0.5,
        max_boxes: int = 100,
    ) -> None:
        super().__init__(
            trunk, classes, group, overlap, min_stride, score_threshold, nms_threshold, max_boxes
        )
        if dim < 32 or dim % 32:
            fail("DetrHead", "dim", "be a positive multiple of 32", dim)
        try:
            import scipy  # noqa: F401  the library's matcher needs it
            from transformers import (
                DeformableDetrConfig,
                DeformableDetrForObjectDetection,
                ResNetConfig,
            )
        except ImportError as error:
            raise ImportError(
                "DetrHead needs transformers and scipy: pip install 'xt-kernels[det]'."
            ) from error
        levels = len(self.widths)
        settings = {
            "d_model": dim,
            "num_queries": num_queries,
            "num_labels": classes,
            "encoder_layers": encoder_layers,
            "decoder_layers": decoder_layers,
            "encoder_ffn_dim": 4 * dim,
            "decoder_ffn_dim": 4 * dim,
            "num_feature_levels": levels,
            "with_box_refine": True,
            "auxiliary_loss": True,
        }
        # The class builds a backbone; the smallest there is, and it is taken out again.
        backbone = ResNetConfig(
            embedding_size=1,
            hidden_sizes=[1] * levels,
            depths=[1] * levels,
            layer_type="basic",
            out_features=[f"stage{i + 1}" for i in range(levels)],
        )
        self.detr = DeformableDetrForObjectDetection(
            DeformableDetrConfig(backbone_config=backbone, **settings | (config or {}))
        )
        self.levels = _Levels()
        self.detr.model.backbone = self.levels
        self.detr.model.input_proj = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, dim, 1), nn.GroupNorm(32, dim)) for width in self.widths
        )
        self.detr.loss_function = _all_layers

    def forward(
        self, tokens: torch.Tensor, stages: dict[int, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        self.levels.maps = [*(stages[i] for i in self.stages), tokens]
        out = self.detr(tokens, labels=[])
        self.levels.maps = []
        # [layers, N, queries, ..] -> [N, layers, queries, ..]
        return {"logits": out.loss.transpose(0, 1), "boxes": out.loss_dict.transpose(0, 1)}

    def decode(self, raw: dict[str, torch.Tensor], group: Group, grid: RegionGrid) -> Boxes:
        from torchvision.ops import box_convert

        scores = raw["logits"][0, -1].float().sigmoid()  # [queries, classes]
        best = scores.flatten().topk(min(self.max_boxes, scores.numel()))
        kept = best.values > self.score_threshold
        index = best.indices[kept]
        boxes = raw["boxes"][0, -1].float()[index // self.classes]
        height, width = group.rows * grid.region, group.cols * grid.region
        left, top = group.col * grid.region, group.row * grid.region
        boxes = box_convert(boxes * boxes.new_tensor([width, height] * 2), "cxcywh", "xyxy")
        return {
            "boxes": boxes + boxes.new_tensor([left, top] * 2),
            "scores": best.values[kept],
            "labels": index % self.classes,
        }

    def group_loss(
        self, raw: dict[str, torch.Tensor], targets: list[Boxes], height: int, width: int
    ) -> torch.Tensor:
        from torchvision.ops import box_convert, clip_boxes_to_image
        from transformers.loss.loss_deformable_detr import DeformableDetrForObjectDetectionLoss

        logits, boxes = (raw[name].float().transpose(0, 1) for name in ("logits", "boxes"))
        size = boxes.new_tensor([width, height] * 2)
        labels = [
            {
                "class_labels": each["labels"],
                "boxes": box_convert(
                    clip_boxes_to_image(each["boxes"], (height, width)) / size, "xyxy", "cxcywh"
                ),
            }
            for each in targets
        ]
        loss: torch.Tensor = DeformableDetrForObjectDetectionLoss(
            logits[-1], labels, logits.device, boxes[-1], self.detr.config, logits, boxes
        )[0]
        return loss


def _all_layers(
    logits: Any, labels: Any, device: Any, boxes: Any, config: Any, layers: Any, layer_boxes: Any
) -> tuple[Any, Any, None]:
    """In the place of the loss: what it would be computed from, `[layers, N, queries, ..]`."""
    return layers, layer_boxes, None
