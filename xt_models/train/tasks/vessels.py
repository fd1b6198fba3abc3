"""Vessels in radar scenes, as in xView3-SAR."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ...host import need
from ...metrics import xview3_scores
from ...model import XT
from ..config import Part
from ..data import Scenes, Tiles, XView3
from .base import Batch, Task, Turn, stack

_ANSWERS = ("is_vessel", "is_fishing", "length_m")


class Vessels(Task):
    """Crops of `data.size` at full resolution, a share `data.near` of those of training around a
    detection, those of validation side by side.

    Metrics: those of xView3-SAR, percent, of the objects found in the crops of a scene; "aggregate"
    is their product and sum. The shore's F1 needs shorelines, and is 0 without.
    """

    best, head = "aggregate", "vessels"

    def __init__(self, part: Part, name: str = "") -> None:
        need("xt train", "scipy", "scipy", "det")
        super().__init__(part, name)
        assert isinstance(part.data, XView3)
        self.near = part.data.near
        self.tiles = {
            split: Tiles(data.sizes, part.data.shape) for split, data in self.data.items()
        }

    def model_fields(self) -> dict[str, Any]:
        options = dict(self.part.head) or {"kind": "xview3"}
        return {"num_classes": 0, "heads": {self.head: options}}

    def length(self, split: str) -> int:
        return len(self.tiles[split]) if split in self.tiles else 0

    def item(
        self, split: str, index: int, rng: np.random.Generator | None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Crop `[2, H, W]` in dB; its objects as the head takes them, and the tile's number."""
        tiles, data = self.tiles[split], self.data[split]
        assert isinstance(data, Scenes)
        number, window = tiles[index] if rng is None else tiles.random(index, rng)
        if rng is not None and rng.random() < self.near:
            around = data.points[number][~data.is_low(data.points[number])]
            if len(around):
                row, col = around[int(rng.integers(len(around))), :2].tolist()
                number, window = tiles.around(number, (row, col), rng)
        image, points = data.crop(number, window), data.inside(number, window)
        if rng is not None:
            turn = Turn.draw(self.part.augment, self.part.data.shape, rng)
            image = turn.image(image)
            places = turn.points(points[:, :2].floor(), self.part.data.shape)
            points = torch.cat([places, points[:, 2:]], 1)
        target = objects(points[~data.is_low(points)])
        return image, target | {"tile": torch.tensor(index)}

    def collate(self, items: list[tuple[Any, Any]]) -> Batch:
        images, targets = zip(*items, strict=True)
        return Batch(stack(list(images)), list(targets))

    def record(self, model: XT, output: torch.Tensor, batch: Batch) -> list[Any]:
        """The objects found in each tile, by its number, in pixels of the tile."""
        head: Any = model.heads[self.head]
        found = [head.points(maps) for maps in head.predict(output)]
        return [
            (int(target["tile"]), {name: values.tolist() for name, values in points.items()})
            for target, points in zip(batch.targets, found, strict=True)
        ]

    def metrics(self, records: list[Any]) -> dict[str, float]:
        data, tiles = self.data["val"], self.tiles["val"]
        assert isinstance(data, Scenes)
        names = ("row", "col", *_ANSWERS)
        found: list[dict[str, list[float]]] = [{n: [] for n in names} for _ in range(len(data))]
        for tile, points in sorted(records):
            number, window = tiles[tile]
            for name in names:
                shift = {"row": window.top, "col": window.left}.get(name, 0)
                found[number][name] += [value + shift for value in points[name]]
        targets = [
            objects(points) | {"shore_km": points[:, 5], "is_low": data.is_low(points)}
            for points in data.points
        ]
        shores = [data.shoreline(i) for i in range(len(data))] if data.shores[0] else None
        scores = xview3_scores(found, targets, shores)
        return {name: 100 * value for name, value in scores.items()}


def objects(points: torch.Tensor) -> dict[str, torch.Tensor]:
    """Detections `[N, len(COLUMNS)]` as the head takes them: -1 for an unknown answer, NaN for an
    unknown length."""
    row, col, is_vessel, is_fishing, length = points[:, :5].float().unbind(1)
    return {
        "row": row,
        "col": col,
        "is_vessel": is_vessel.nan_to_num(-1),
        "is_fishing": is_fishing.nan_to_num(-1),
        "length_m": length.where(length > 0, torch.nan),
    }
