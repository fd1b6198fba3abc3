"""What is trained, by kind of data: items of a batch, loss, and the numbers of a validation.

Every random choice about the item at position p of the endless training order depends on the
recipe's seed and on p alone, so a run that goes on needs no generator states.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from ..model import XT
from ..source import open_image
from .config import Recipe
from .data import Labelled, Window, middle_window, random_window, read_crop


class Batch(NamedTuple):
    """images `[B, C, H, W]`, not normalised; targets as the task's loss takes them."""

    images: torch.Tensor
    targets: Any


@contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """The global generators of Python, numpy and torch start from these numbers in the block, and
    are on the CPU what they were before after it."""
    words = np.random.SeedSequence(numbers).generate_state(4)
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(int(words[0]))
    np.random.seed(words[1:2])
    torch.manual_seed(int(words[2]) << 32 | int(words[3]))
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


class Order(Dataset[Batch]):
    """The endless training order: each pass over `length` images in an order of its own.

    Position p is image `p mod length` of pass `p // length`.
    """

    def __init__(self, task: Classification, seed: int) -> None:
        self.task, self.seed = task, seed

    def __getitem__(self, position: int) -> Any:
        length = self.task.length("train")
        index = _shuffled(length, self.seed, position // length)[position % length]
        with seeded(self.seed, position, 1):
            return self.task.item("train", index, np.random.default_rng((self.seed, position)))


@lru_cache(maxsize=2)
def _shuffled(length: int, seed: int, epoch: int) -> list[int]:
    order: list[int] = np.random.default_rng((seed, epoch, 2)).permutation(length).tolist()
    return order


class InOrder(Dataset[Batch]):
    """The validation images one after the other."""

    def __init__(self, task: Classification) -> None:
        self.task = task

    def __len__(self) -> int:
        return self.task.length("val")

    def __getitem__(self, index: int) -> Any:
        return self.task.item("val", index, None)


class Classification:
    """One label an image, or several that each hold or do not.

    Metrics: "top1", percent of the images whose best class is right; of several labels, "f1" over
    all images and classes at once, percent, where a score of 0.5 counts as found.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        data: Any = recipe.data
        self.data: dict[str, Labelled] = {"train": data.read("train")}
        self.classes = self.data["train"].classes
        if data.val:
            self.data["val"] = data.read("val", self.classes)
        self.multi_label = isinstance(self.data["train"].labels[0], tuple)
        self.best = "f1" if self.multi_label else "top1"
        self.in_chans = 3
        self._augment = _rand_augment(recipe.augment.randaugment)
        self._mixup = self._make_mixup()

    def length(self, split: str) -> int:
        """Images of a split, 0 without one."""
        return len(self.data[split].paths) if split in self.data else 0

    def identity(self) -> dict[str, Any]:
        """What the data is, for a run that goes on to compare."""
        import hashlib

        digest = hashlib.sha256()
        for split in self.data.values():
            for path, label in zip(split.paths, split.labels, strict=True):
                digest.update(f"{path}\t{label}\n".encode())
        return {"classes": len(self.classes), "images": digest.hexdigest()}

    def item(
        self, split: str, index: int, rng: np.random.Generator | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Image `[C, H, W]` and target: a class, or ones and zeros `[classes]`."""
        data, recipe = self.data[split], self.recipe
        shape, path = recipe.data.shape, data.paths[index]
        with open_image(path) as source:
            size = source.height, source.width
            if rng is None:
                window = middle_window(size, shape[1] / shape[0])
            else:
                window = random_window(size, recipe.augment.scale, recipe.augment.ratio, rng)
            image = read_crop(
                source, window, shape, bands=recipe.data.bands, in_chans=self.in_chans
            )
        if rng is not None:
            image = turn(image, recipe, rng)
            if self._augment is not None:
                image = self._augmented(image, path)
        label = data.labels[index]
        if isinstance(label, tuple):
            target = torch.zeros(len(self.classes))
            target[list(label)] = 1
            return image, target
        return image, torch.tensor(label)

    def collate(self, items: list[tuple[torch.Tensor, torch.Tensor]]) -> Batch:
        """A batch of items."""
        return Batch(stack([image for image, _ in items]), torch.stack([t for _, t in items]))

    def mix(self, model: XT, batch: Batch) -> Batch:
        """Mixup or cutmix of a training batch, as the recipe says."""
        if self._mixup is None:
            return batch
        images, targets = self._mixup(as_float(model, batch.images), batch.targets)
        return Batch(images, targets)

    def loss(self, model: XT, batch: Batch, *, training: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean loss over the batch, and what `add` takes."""
        logits = model(batch.images).logits.float()
        if self.multi_label:
            return F.binary_cross_entropy_with_logits(logits, batch.targets), logits
        smoothing = 0.0 if self._mixup or not training else self.recipe.augment.label_smoothing
        return F.cross_entropy(logits, batch.targets, label_smoothing=smoothing), logits

    def record(self, output: torch.Tensor, batch: Batch) -> list[Any]:
        """What a validation keeps of a batch, plain values that processes can exchange."""
        if self.multi_label:
            found, true = output > 0, batch.targets > 0.5
            counts = (found & true).sum(), (found ^ true).sum()
        else:
            counts = (output.argmax(1) == batch.targets).sum(), torch.tensor(len(output))
        return [tuple(int(count) for count in counts)]

    def metrics(self, records: list[Any]) -> dict[str, float]:
        """The metrics of a validation from the records of all batches."""
        first, second = (sum(column) for column in zip(*records, strict=True))
        if self.multi_label:
            return {"f1": 200 * first / max(2 * first + second, 1)}
        return {"top1": 100 * first / second}

    def _make_mixup(self) -> Any:
        augment, train = self.recipe.augment, self.recipe.train
        if not (augment.mixup or augment.cutmix):
            return None
        from timm.data.mixup import Mixup

        if train.batch_size // train.accumulate % 2:
            raise ValueError(
                f"train.batch_size / train.accumulate must be even for mixup and cutmix, got "
                f"{train.batch_size} / {train.accumulate}."
            )
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


def _rand_augment(words: str) -> Any:
    if not words:
        return None
    from timm.data.auto_augment import rand_augment_transform

    try:
        return rand_augment_transform(words, {})
    except (AssertionError, ValueError, KeyError) as error:
        raise ValueError(
            f'augment.randaugment must be as "rand-m9-mstd0.5-inc1" in timm, got {words!r}.'
        ) from error


def turn(image: torch.Tensor, recipe: Recipe, rng: np.random.Generator) -> torch.Tensor:
    """Mirrored and turned at random; a turn by 90 degrees only of squares."""
    augment = recipe.augment
    if rng.random() < augment.flip:
        image = image.flip(-1)
    if rng.random() < augment.flip_vertical:
        image = image.flip(-2)
    if augment.rotate:
        step = 1 if image.shape[-1] == image.shape[-2] else 2
        image = image.rot90(step * int(rng.integers(4 // step)), (-2, -1))
    return image.contiguous()


def stack(images: list[torch.Tensor]) -> torch.Tensor:
    """Images of one batch. Raises ValueError if their types differ."""
    kinds = sorted({str(image.dtype).removeprefix("torch.") for image in images})
    if len(kinds) > 1:
        raise ValueError(f"data: images of a batch must have one type, got {' and '.join(kinds)}.")
    return torch.stack(images)


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
