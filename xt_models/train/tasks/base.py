"""What every task gives the trainer: items of a batch, a loss, and the numbers of a validation.

Every random choice about the item at position p of the endless training order depends on the
recipe's seed and on p alone, so a run that goes on needs no generator states.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from functools import lru_cache, wraps
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from ...model import XT
from ..config import Augment, Part


class Batch(NamedTuple):
    """images `[B, C, H, W]`, not normalised; targets as the head's loss takes them."""

    images: torch.Tensor
    targets: Any


class Task:
    """Data, loss and metrics of one head.

    name: of several tasks on one trunk, and then of the head too; "" for the only one.

    Attributes: classes, their names; best, the metric that tells which model is best, in percent;
    head, the name of the head in `XTOutput.heads`, None for `XTOutput.logits`; in_chans,
    bands that the model takes, set once it is built; whole_images, whether validation takes images
    as they are, one at a time; mixes_pairs, whether `mix` needs an even number of images; augments,
    the fields of `Augment` that count here.
    """

    classes: tuple[str, ...]
    best: str
    head: str | None
    whole_images = False
    mixes_pairs = False
    augments: tuple[str, ...] = ("flip", "flip_vertical", "rotate")

    def __init__(self, part: Part, name: str = "") -> None:
        self.where = f"tasks.{name}." if name else ""  # before a key in a message
        for option in fields(Augment):
            value = getattr(part.augment, option.name)
            if option.name not in self.augments and value != option.default:
                raise ValueError(
                    f"{self.where}augment.{option.name} must be left out for {part.data.task}, "
                    f"which takes {', '.join(self.augments)}, got {value!r}."
                )
        if name:
            self.head = name
        self.part = part
        self.in_chans = 3
        self.data: dict[str, Any] = {"train": part.data.read("train")}
        self.classes = self.data["train"].classes
        if getattr(part.data, "val", ""):
            self.data["val"] = part.data.read("val", self.classes)

    def model_fields(self) -> dict[str, Any]:
        """Fields of `XTConfig` that follow from the data: the head, for its classes."""
        assert self.head is not None
        options = {"classes": len(self.classes)} | dict(self.part.head)
        return {"num_classes": 0, "heads": {self.head: options}}

    def length(self, split: str) -> int:
        """Items of a split, 0 without one."""
        return len(self.data[split]) if split in self.data else 0

    def item(self, split: str, index: int, rng: np.random.Generator | None) -> tuple[Any, Any]:
        """Image and target; rng makes the random choices of training, None is for validation."""
        raise NotImplementedError

    def collate(self, items: list[tuple[Any, Any]]) -> Batch:
        """A batch of items."""
        images, targets = zip(*items, strict=True)
        return Batch(stack(list(images)), torch.stack(targets))

    def mix(self, model: XT, batch: Batch) -> Batch:
        """What happens to a training batch as a whole."""
        return batch

    def loss(self, model: XT, batch: Batch, *, training: bool) -> tuple[torch.Tensor, Any]:
        """Mean loss over the batch, and the head's output."""
        assert self.head is not None
        head: Any = model.heads[self.head]
        output = model(batch.images).heads[self.head]
        return head.loss(output, batch.targets), output

    def record(self, model: XT, output: Any, batch: Batch) -> list[Any]:
        """What a validation keeps of a batch, plain values that processes can exchange."""
        raise NotImplementedError

    def metrics(self, records: list[Any]) -> dict[str, float]:
        """The metrics of a validation from the records of all batches."""
        raise NotImplementedError

    def identity(self) -> dict[str, Any]:
        """What the data is, for a run that goes on to compare."""
        digest = hashlib.sha256()
        for split in self.data.values():
            for row in split.rows():
                digest.update(f"{row}\n".encode())
        return {"classes": list(self.classes), "rows": digest.hexdigest()}


def _as_value(get: Callable[[Any, int], Any]) -> Callable[[Any, int], Any]:
    """An error becomes the item: raised in a worker, its sentence would drown in a traceback."""

    @wraps(get)
    def item(self: Any, index: int) -> Any:
        try:
            return get(self, index)
        except Exception as error:
            return error

    return item


def collate(tasks: Mapping[str, Task], items: list[Any]) -> dict[str, Batch] | Exception:
    """The batch of each task from the items of `Order` or `InOrder`, or the first error in them."""
    errors = [item for item in items if isinstance(item, Exception)]
    if errors:
        return errors[0]
    return {name: tasks[name].collate([item[name] for item in items]) for name in items[0]}


class Order(Dataset[Any]):
    """The endless training order, an item of each task: position p is item `p mod length` of pass
    `p // length`, and each pass of each task has an order of its own."""

    def __init__(self, tasks: Mapping[str, Task], seed: int) -> None:
        self.tasks, self.seed = tasks, seed

    @_as_value
    def __getitem__(self, position: int) -> Any:
        out = {}
        for number, (name, task) in enumerate(self.tasks.items()):
            length = task.length("train")
            index = _shuffled(length, self.seed, position // length, number)[position % length]
            rng = np.random.default_rng((self.seed, position, 0, number))
            with seeded(self.seed, position, 1, number):
                out[name] = task.item("train", index, rng)
        return out


@lru_cache(maxsize=16)
def _shuffled(length: int, seed: int, epoch: int, task: int) -> list[int]:
    rng = np.random.default_rng((seed, epoch, 2, task))
    order: list[int] = rng.permutation(length).tolist()
    return order


class InOrder(Dataset[Any]):
    """The validation items of a task one after the other."""

    def __init__(self, name: str, task: Task) -> None:
        self.name, self.task = name, task

    def __len__(self) -> int:
        return self.task.length("val")

    @_as_value
    def __getitem__(self, index: int) -> Any:
        return {self.name: self.task.item("val", index, None)}


@contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """The global generators of Python, numpy and torch start from these numbers in the block, and
    are on the CPU what they were before after it."""
    words = np.random.SeedSequence(numbers).generate_state(4)
    # timm draws from numpy's global generator.
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    random.seed(int(words[0]))
    np.random.seed(words[1:2])  # noqa: NPY002
    torch.manual_seed(int(words[2]) << 32 | int(words[3]))
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])


class Turn(NamedTuple):
    """Mirror images left to right and top to bottom, then turns by 90 degrees, anticlockwise."""

    flip: bool
    flip_vertical: bool
    quarters: int

    @classmethod
    def draw(cls, augment: Augment, shape: tuple[int, int], rng: np.random.Generator) -> Turn:
        """A random one as the recipe says; by 90 degrees only where `shape` is square."""
        flip, flip_vertical = rng.random(2) < (augment.flip, augment.flip_vertical)
        step = 1 if shape[0] == shape[1] else 2
        quarters = step * int(rng.integers(4 // step)) if augment.rotate else 0
        return cls(bool(flip), bool(flip_vertical), quarters)

    def image(self, tensor: torch.Tensor) -> torch.Tensor:
        """`[.., H, W]`."""
        axes = [axis for axis, on in ((-1, self.flip), (-2, self.flip_vertical)) if on]
        return tensor.flip(axes).rot90(self.quarters, (-2, -1)).contiguous()

    def points(self, points: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
        """Rows and columns of pixels `[N, 2]` on an image of `shape`."""
        (height, width), (row, col) = shape, points.unbind(1)
        col = width - 1 - col if self.flip else col
        row = height - 1 - row if self.flip_vertical else row
        for _ in range(self.quarters):
            row, col, height, width = width - 1 - col, row, width, height
        return torch.stack([row, col], 1)

    def boxes(self, boxes: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
        """Boxes (left, top, right, bottom) `[N, 4]` on an image of `shape`."""
        # Corners lie between pixels: half a pixel from the middle of the next one.
        first, second = (
            self.points(corner.flip(1) - 0.5, shape) + 0.5 for corner in torch.split(boxes, 2, 1)
        )
        return torch.cat([first.minimum(second).flip(1), first.maximum(second).flip(1)], 1)


def stack(images: list[torch.Tensor]) -> torch.Tensor:
    """Images of one batch. Raises ValueError if their types differ."""
    kinds = sorted({str(image.dtype).removeprefix("torch.") for image in images})
    if len(kinds) > 1:
        raise ValueError(f"data: images of a batch must have one type, got {' and '.join(kinds)}.")
    return torch.stack(images)
