"""A class for each pixel."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ...model import XT
from ..config import Part
from ..data import Tiles, read_crop
from ..data.masks import IGNORED, Masked, reduce_mask
from .base import Batch, Task, Turn


class Segmentation(Task):
    """Crops of `data.size` at full resolution, anywhere in training, side by side in validation.

    Metrics: "miou", the mean over the classes that occur of intersection over union, percent;
    "accuracy" of pixels, percent. They count the cells of the head's map.
    """

    best, head = "miou", "mask"

    def __init__(self, part: Part, name: str = "") -> None:
        super().__init__(part, name)
        options = dict(part.head) or {"kind": "segmentation"}
        self.options = options | {"classes": len(self.classes)}
        self.stride = int(options.get("output_stride", 1))
        if options.get("loss", "cross_entropy") != "cross_entropy":
            raise ValueError(
                f"{self.where}head.loss must be cross_entropy for masks, whose classes exclude "
                f"one another, got {options['loss']!r}."
            )
        self.tiles = {
            split: Tiles(data.sizes, part.data.shape) for split, data in self.data.items()
        }

    def model_fields(self) -> dict[str, Any]:
        return {"num_classes": 0, "heads": {self.head: self.options}}

    def length(self, split: str) -> int:
        return len(self.tiles[split]) if split in self.tiles else 0

    def item(
        self, split: str, index: int, rng: np.random.Generator | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Crop `[C, H, W]`; classes `[h, w]` of the cells of the head's map, 255 for none."""
        tiles, data = self.tiles[split], self.data[split]
        assert isinstance(data, Masked)
        number, window = tiles[index] if rng is None else tiles.random(index, rng)
        image = read_crop(
            data.images[number], window, bands=self.part.data.bands, in_chans=self.in_chans
        )
        mask = data.mask(number, window)
        if rng is not None:
            turn = Turn.draw(self.part.augment, self.part.data.shape, rng)
            image, mask = turn.image(image), turn.image(mask)
        return image, reduce_mask(mask, self.stride)

    def record(self, model: XT, output: torch.Tensor, batch: Batch) -> list[Any]:
        """The confusion matrix of the batch, true classes down."""
        count, known = len(self.classes), batch.targets != IGNORED
        pairs = batch.targets[known].long() * count + output.argmax(1)[known]
        return [pairs.bincount(minlength=count * count).view(count, count).tolist()]

    def metrics(self, records: list[Any]) -> dict[str, float]:
        confusion = np.array(records, dtype=np.float64).sum(0)
        right = confusion.diagonal()
        union = confusion.sum(0) + confusion.sum(1) - right
        occurs = union > 0
        return {
            "miou": 100 * float((right[occurs] / union[occurs]).mean()),
            "accuracy": 100 * float(right.sum() / max(confusion.sum(), 1)),
        }
