"""Boxes around objects."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from ...host import need
from ...metrics import coco_map
from ...model import XT
from ..config import Part
from ..data import Boxed, Coco, Tiles, Window, read_crop
from .base import Batch, Task, Turn, stack


class Detection(Task):
    """Crops of `data.size` at full resolution in training, whole images in validation.

    Metrics: those of COCO by pycocotools, percent; "mAP" is the mean over overlaps of 0.5 to 0.95.
    """

    best, head, whole_images = "mAP", "boxes", True

    def __init__(self, part: Part, name: str = "") -> None:
        need("xt train", "pycocotools", "pycocotools", "det")
        super().__init__(part, name)
        data = part.data
        assert isinstance(data, Coco)
        for split, found in self.data.items():
            if not any((~crowd).any() for crowd in found.crowd):
                raise ValueError(
                    f"{data.path(getattr(data, split))}: expected at least one box of "
                    f"{', '.join(self.classes)} that is no crowd, found none."
                )
        self.visible = data.visible
        self.tiles = Tiles(self.data["train"].sizes, data.shape)

    def length(self, split: str) -> int:
        return len(self.tiles) if split == "train" else super().length(split)

    def item(
        self, split: str, index: int, rng: np.random.Generator | None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Image `[C, H, W]`; boxes `[N, 4]` (left, top, right, bottom) in its pixels, labels."""
        data, part = self.data[split], self.part
        shape = part.data.shape
        assert isinstance(data, Boxed)
        if split == "train":
            number, window = self.tiles[index] if rng is None else self.tiles.random(index, rng)
        else:
            number, window = index, Window(0, 0, *data.sizes[index])
        image = read_crop(data.paths[number], window, bands=part.data.bands, in_chans=self.in_chans)
        target = data.target(number, window, self.visible)
        if rng is not None:
            turn = Turn.draw(part.augment, shape, rng)
            boxes = turn.boxes(target["boxes"], shape)
            return turn.image(image), target | {"boxes": boxes}
        return image, target | {"image": torch.tensor(number)}

    def collate(self, items: list[tuple[Any, Any]]) -> Batch:
        images, targets = zip(*items, strict=True)
        return Batch(stack(list(images)), list(targets))

    def record(self, model: XT, output: Any, batch: Batch) -> list[Any]:
        """The boxes, scores and labels found in each image, by its number."""
        assert self.head is not None
        head: Any = model.heads[self.head]
        return [
            (int(target["image"]), *(found[k].tolist() for k in ("boxes", "scores", "labels")))
            for target, found in zip(batch.targets, head.predict(output), strict=True)
        ]

    def metrics(self, records: list[Any]) -> dict[str, float]:
        data = self.data["val"]
        assert isinstance(data, Boxed)
        by_image = {number: found for number, *found in records}
        predictions = [
            dict(zip(("boxes", "scores", "labels"), by_image[i], strict=True))
            for i in range(len(data))
        ]
        targets = [
            {"boxes": boxes.numpy(), "labels": labels.numpy(), "is_crowd": crowd.numpy()}
            for boxes, labels, crowd in zip(data.boxes, data.labels, data.crowd, strict=True)
        ]
        found = coco_map(predictions, targets)
        return {name: 100 * value for name, value in found.items() if not math.isnan(value)}
