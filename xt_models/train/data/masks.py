"""Images with masks: a file of class numbers for each image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from PIL import PngImagePlugin

from ...source import ImageSource, open_image
from .base import Data
from .crops import Window, read_crop
from .labels import image_files
from .tiles import Tiles

IGNORED = 255
PART = 4096
"""Side of the parts of a mask, in pixels, that are in memory to see which classes there are."""


@dataclass(frozen=True)
class Masked:
    """Images for segmentation, their masks and sizes (height, width)."""

    classes: tuple[str, ...]
    images: Sequence[Path]
    masks: Sequence[Path]
    sizes: Sequence[tuple[int, int]]
    values: tuple[int, ...]
    ignore: int

    def __len__(self) -> int:
        return len(self.images)

    def rows(self) -> Iterator[str]:
        """One line for all that an item is."""
        for row in zip(self.images, self.masks, self.sizes, strict=True):
            yield "\t".join(map(str, row))

    def mask(self, index: int, window: Window) -> torch.Tensor:
        """Class numbers `[h, w]`, uint8; 255 where there is none: beyond the image, or ignored.

        Raises ValueError for a value that is neither a class nor to be ignored.
        """
        path, (rows, cols) = self.masks[index], self.sizes[index]
        with _open_mask(path) as source:
            found = read_crop(source, window)[0].to(torch.int64)
        out = torch.full(found.shape, IGNORED, dtype=torch.uint8)
        inside = torch.zeros(found.shape, dtype=torch.bool)
        top, left = max(-window.top, 0), max(-window.left, 0)
        inside[top : rows - window.top, left : cols - window.left] = True
        known = (found == self.ignore) | ~inside
        for number, value in enumerate(self.values):
            at = (found == value) & inside
            out[at] = number
            known |= at
        if not known.all():
            strange = int(found[~known][0])
            raise ValueError(
                f"{path}: values must be those of the {len(self.values)} classes "
                f"({', '.join(map(str, self.values[:8]))}{', ...' * (len(self.values) > 8)}) or "
                f"{self.ignore} to ignore, got {strange}."
            )
        return out

    def check_classes(self) -> None:
        """Raises ValueError unless every class is in some mask; reads until all were seen."""
        found: set[int] = set()
        tiles = Tiles(self.sizes, (PART, PART))
        for number, window in map(tiles.__getitem__, range(len(tiles))):
            found |= set(torch.unique(self.mask(number, window)).tolist())
            if found >= set(range(len(self.classes))):
                return
        missing = next(i for i in range(len(self.classes)) if i not in found)
        held = ", ".join(str(self.values[i]) for i in sorted(found - {IGNORED}))
        ignored = f" and {self.ignore}, data.ignore" if IGNORED in found else ""
        raise ValueError(
            f"{self.masks[0].parent}: every class must occur, found none of "
            f"{self.classes[missing]!r}, value {self.values[missing]}; there are {held or 'none'}"
            f"{ignored}. data.values gives the value of each class, such as [0, 255] with "
            f"data.ignore = 254."
        )


@dataclass(frozen=True)
class MaskPairs(Data):
    """`train/images/<name>.<any>` and `train/masks/<name>.<any>`, one band of class numbers, or a
    PNG file with a palette, whose entries they number.

    train, val: folders; val "" for none. images, masks: folders in them. classes: their names.
    values: the value of each class in the masks; empty for 0, 1, 2, ... ignore: value of pixels
    that teach nothing.
    """

    task: ClassVar[str] = "segmentation"

    train: str = "train"
    val: str = "val"
    images: str = "images"
    masks: str = "masks"
    classes: tuple[str, ...] = ()
    values: tuple[int, ...] = ()
    ignore: int = IGNORED

    def read(self, split: str, classes: tuple[str, ...] = ()) -> Masked:
        """The pairs of a split. Raises ValueError for an image without a mask, one of another size,
        and a class that no training mask holds."""
        values = self.values or tuple(range(len(self.classes)))
        if not 2 <= len(self.classes) <= IGNORED:
            raise ValueError(f"data.classes must be 2 to {IGNORED} names, got {self.classes}.")
        if len(set(values) - {self.ignore}) != len(self.classes):
            raise ValueError(
                f"data.values must be one number a class ({len(self.classes)}), none twice and "
                f"none {self.ignore}, got {values}."
            )
        where = {kind: self.path(getattr(self, split), getattr(self, kind)) for kind in
                 ("images", "masks")}  # fmt: skip
        for kind, folder in where.items():
            if not folder.is_dir():
                raise ValueError(f"data.{split} must hold a folder data.{kind}, missing {folder}.")
        images = image_files(where["images"])
        by_name = {path.stem: path for path in image_files(where["masks"])}
        if not images:
            raise ValueError(f"{where['images']}: expected at least one image, found none.")
        missing = [path for path in images if path.stem not in by_name]
        if missing:
            raise ValueError(
                f"{missing[0]}: expected a mask {where['masks'] / missing[0].stem}.*, found none."
            )
        masks = [by_name[path.stem] for path in images]
        found = Masked(self.classes, images, masks, list(map(_size, images, masks)), values,
                       self.ignore)  # fmt: skip
        if split == "train":
            found.check_classes()
        return found


def _open_mask(path: Path) -> ImageSource:
    """As `open_image`, but a PNG file with a palette gives the numbers of its entries."""
    source = open_image(path)
    if source.metadata.get("format") != "png" or source.bands < 3:
        return source
    with PngImagePlugin.PngImageFile(path) as image:  # without Pillow's own, lower limit
        if image.mode != "P":
            return source
        source.close()
        return open_image(np.asarray(image))


def _size(image: Path, mask: Path) -> tuple[int, int]:
    """(height, width) of both. Raises ValueError unless they are one, and the mask has one band."""
    with open_image(image) as a, _open_mask(mask) as b:
        size, other = (a.height, a.width), (b.height, b.width)
        if size != other or b.bands != 1 or b.dtype.kind not in "ui":
            raise ValueError(
                f"{mask}: expected a mask of one band of integers and {size[0]} x {size[1]} px "
                f"like {image.name}, found {b.bands} of {b.dtype} and {other[0]} x {other[1]} px."
            )
    return size


def reduce_mask(mask: torch.Tensor, stride: int) -> torch.Tensor:
    """The class in the middle of each cell of `stride` px, `[ceil(h / stride), ..]`."""
    rows, cols = (np.minimum(np.arange(0, n, stride) + stride // 2, n - 1) for n in mask.shape)
    return mask[torch.from_numpy(rows)[:, None], torch.from_numpy(cols)]
