"""One label an image, or several that each hold or do not."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import torch

from ...model import XT
from ...source import open_image
from ..config import Augment, Part
from ..data import Labels, Window, middle_window, random_window, read_crop
from .base import Batch, Task, Turn


class Classification(Task):
    """One label an image, or several that each hold or do not.

    Metrics: "top1", percent of the images whose best class is right; of several labels, "f1" over
    all images and classes at once, percent, where a score of 0.5 counts as found.
    """

    augments = tuple(option.name for option in fields(Augment))

    def __init__(self, part: Part, name: str = "") -> None:
        super().__init__(part, name)
        assert isinstance(part.data, Labels)
        self.fit = part.data.fit
        self.multi_label = isinstance(self.data["train"].labels[0], tuple)
        self.best = "f1" if self.multi_label else "top1"
        self.head = name or ("labels" if self.multi_label else None)
        augment = part.augment
        self.mixes_pairs = bool(augment.mixup or augment.cutmix)
        if part.head:
            raise ValueError(
                f"{self.where}head must be left out for labels, whose head follows from the "
                f"data, got {dict(part.head)}."
            )
        if self.multi_label and augment.label_smoothing and not self.mixes_pairs:
            raise ValueError(
                f"{self.where}augment.label_smoothing must be 0 for several labels an image "
                f"without mixup or cutmix, got {augment.label_smoothing}."
            )
        self._augment: Any = _rand_augment(part.augment.randaugment, self.where)
        self._mixup = self._make_mixup()

    def model_fields(self) -> dict[str, Any]:
        if self.head is None:
            return {"num_classes": len(self.classes)}
        head = {"kind": "classification", "classes": len(self.classes)}
        return {"num_classes": 0, "heads": {self.head: head | {"multi_label": self.multi_label}}}

    def item(
        self, split: str, index: int, rng: np.random.Generator | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Image `[C, H, W]` and target: a class, or ones and zeros `[classes]`."""
        data, part = self.data[split], self.part
        shape, path = part.data.shape, data.paths[index]
        with open_image(path) as source:
            size = source.height, source.width
            if rng is not None:
                window = random_window(size, part.augment.scale, part.augment.ratio, rng)
            elif self.fit == "crop":
                window = middle_window(size, shape[1] / shape[0])
            else:
                window = Window(0, 0, *size)
            image = read_crop(source, window, shape, bands=part.data.bands, in_chans=self.in_chans)
        if rng is not None:
            image = Turn.draw(part.augment, shape, rng).image(image)
            if self._augment is not None:
                image = self._augmented(image, path)
        label = data.labels[index]
        if isinstance(label, tuple):
            target = torch.zeros(len(self.classes))
            target[list(label)] = 1
            return image, target
        return image, torch.tensor(label)

    def mix(self, model: XT, batch: Batch) -> Batch:
        if self._mixup is None:
            return batch
        images, targets = self._mixup(as_float(model, batch.images), batch.targets)
        return Batch(images, targets)

    def loss(self, model: XT, batch: Batch, *, training: bool) -> tuple[torch.Tensor, Any]:
        out = model(batch.images)
        head: Any = model.head if self.head is None else model.heads[self.head]
        logits = out.logits if self.head is None else out.heads[self.head]
        smoothing = self.part.augment.label_smoothing
        if self._mixup is not None or not training:  # mixup smooths what it mixes
            smoothing = 0.0
        return head.loss(logits, batch.targets, label_smoothing=smoothing), logits

    def record(self, model: XT, output: torch.Tensor, batch: Batch) -> list[Any]:
        if self.multi_label:
            found, true = output > 0, batch.targets > 0.5
            counts = (found & true).sum(), (found ^ true).sum()
        else:
            counts = (output.argmax(1) == batch.targets).sum(), torch.tensor(len(output))
        return [tuple(int(count) for count in counts)]

    def metrics(self, records: list[Any]) -> dict[str, float]:
        first, second = (sum(column) for column in zip(*records, strict=True))
        if self.multi_label:
            return {"f1": 200 * first / max(2 * first + second, 1)}
        return {"top1": 100 * first / second}

    def _make_mixup(self) -> Any:
        augment = self.part.augment
        if not self.mixes_pairs:
            return None
        from timm.data.mixup import Mixup

        return Mixup(
            augment.mixup,
            augment.cutmix,
            prob=augment.mix_chance,
            label_smoothing=augment.label_smoothing,
            num_classes=len(self.classes),
            multi_label=self.multi_label,
        )

    def _augmented(self, image: torch.Tensor, path: Any) -> torch.Tensor:
        from PIL import Image

        if image.dtype != torch.uint8 or len(image) != 3:
            raise ValueError(
                f"{path}: augment.randaugment takes three bands of uint8, found {len(image)} of "
                f"{str(image.dtype).removeprefix('torch.')}."
            )
        picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
        return torch.from_numpy(np.array(self._augment(picture))).permute(2, 0, 1).contiguous()


def _rand_augment(words: str, where: str) -> Any:
    if not words:
        return None
    from timm.data.auto_augment import rand_augment_transform

    try:
        return rand_augment_transform(words, {})
    except (AssertionError, ValueError, KeyError) as error:
        raise ValueError(
            f'{where}augment.randaugment must be as "rand-m9-mstd0.5-inc1" in timm, got {words!r}.'
        ) from error


def as_float(model: XT, images: torch.Tensor) -> torch.Tensor:
    """float32 images that the model sees as it sees these unsigned ones, to mix them."""
    if images.is_floating_point():
        return images.float()

    def shaped(values: Any, otherwise: float) -> torch.Tensor:
        values = [otherwise] * images.shape[1] if values is None else values
        return torch.tensor(values, device=images.device)[:, None, None]

    (mean, std), (float_mean, float_std) = map(model.normalization, (images.dtype, torch.float32))
    top = 65535 if images.dtype == torch.uint16 else 255
    seen = (images.float() / top - shaped(mean, 0)) / shaped(std, 1)
    return seen * shaped(float_std, 1) + shaped(float_mean, 0)
