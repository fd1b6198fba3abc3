"""Images with boxes in the form of COCO: one JSON file of images, annotations and categories."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from ...source import open_image
from .base import Data, check_files, check_list, read_json
from .crops import Window


@dataclass(frozen=True)
class Boxed:
    """Images for detection, their sizes (height, width) and boxes.

    boxes: of each image `[N, 4]` (left, top, right, bottom), pixels. labels: `[N]`. crowd: `[N]`,
    whether a box stands for a group of objects. ids: those of the images in the file.
    """

    classes: tuple[str, ...]
    paths: Sequence[Path]
    sizes: Sequence[tuple[int, int]]
    boxes: Sequence[torch.Tensor]
    labels: Sequence[torch.Tensor]
    crowd: Sequence[torch.Tensor]
    ids: Sequence[int]

    def __len__(self) -> int:
        return len(self.paths)

    def rows(self) -> Iterator[str]:
        """One line for all that an item is."""
        for path, boxes, labels in zip(self.paths, self.boxes, self.labels, strict=True):
            yield f"{path}\t{boxes.tolist()}\t{labels.tolist()}"

    def target(self, index: int, window: Window, visible: float) -> dict[str, torch.Tensor]:
        """Boxes and labels inside a window, its corner as origin, cut at its edges; those of which
        less than a share `visible` of the area is left, and groups, are left out."""
        boxes, labels = self.boxes[index], self.labels[index]
        offset = torch.tensor([window.left, window.top] * 2, dtype=torch.float32)
        limit = torch.tensor([window.width, window.height] * 2, dtype=torch.float32)
        cut = (boxes - offset).clamp(min=0).minimum(limit)
        area = (cut[:, 2:] - cut[:, :2]).prod(1)
        whole = (boxes[:, 2:] - boxes[:, :2]).prod(1)
        keep = (area > 0) & (area >= visible * whole) & ~self.crowd[index]
        return {"boxes": cut[keep], "labels": labels[keep]}


@dataclass(frozen=True)
class Coco(Data):
    """COCO JSON: `images` (id, file_name, height, width), `annotations` (image_id, category_id,
    bbox [left, top, width, height] in pixels, iscrowd), `categories` (id, name).

    train, val: JSON files; val "" for none. train_images, val_images: folders of the images.
    classes: names of the categories to keep, in their order; empty for all, by number.
    visible: share of a box that a training crop must show.
    """

    task: ClassVar[str] = "detection"

    train: str = "annotations/train.json"
    val: str = "annotations/val.json"
    train_images: str = "train"
    val_images: str = "val"
    classes: tuple[str, ...] = ()
    visible: float = 0.3

    def read(self, split: str, classes: tuple[str, ...] = ()) -> Boxed:
        """The images of a split. Raises ValueError for a missing file, a box of no size or outside
        its image, or a category that the file does not have."""
        path = self.path(getattr(self, split))
        table = read_json(path)
        kinds: dict[str, Any] = {"id": int | str, "file_name": str, "height": int, "width": int}
        entries = check_list(table, "images", path, kinds)
        kinds = {"image_id": int | str, "category_id": int, "bbox": list}
        notes = check_list(table, "annotations", path, kinds)
        categories = check_list(table, "categories", path, {"id": int, "name": str})
        named = {c["id"]: c["name"] for c in sorted(categories, key=lambda c: c["id"])}
        classes = self.classes or classes or tuple(named.values())
        strange = [name for name in classes if name not in named.values()]
        if strange:
            raise ValueError(f"{path}: expected a category {strange[0]!r}, found none.")
        images = {image["id"]: image for image in entries}
        found: dict[Any, list[tuple[list[float], int, bool]]] = {key: [] for key in images}
        for note in notes:
            where = f"{path}: annotation {note.get('id')}"
            if note["image_id"] not in images:
                raise ValueError(f"{where} must have an image of the file, got {note['image_id']}.")
            if note["category_id"] not in named:
                raise ValueError(
                    f"{where} must have a category of the file, got {note['category_id']}."
                )
            name = named[note["category_id"]]
            box = _box(note, images[note["image_id"]], where)
            if name in classes:
                found[note["image_id"]].append(
                    (box, classes.index(name), bool(note.get("iscrowd")))
                )
        folder = getattr(self, f"{split}_images")
        paths = [self.path(folder, image["file_name"]) for image in images.values()]
        check_files(paths, str(path))
        if not paths:
            raise ValueError(f"{path}: expected at least one image, found none.")
        for file, image in zip(paths, images.values(), strict=True):
            _check_size(file, image, path)
        rows = list(found.values())
        return Boxed(
            classes,
            paths,
            [(image["height"], image["width"]) for image in images.values()],
            [torch.tensor([r[0] for r in row], dtype=torch.float32).view(-1, 4) for row in rows],
            [torch.tensor([r[1] for r in row], dtype=torch.int64) for row in rows],
            [torch.tensor([r[2] for r in row], dtype=torch.bool) for row in rows],
            list(images),
        )


def _box(note: dict[str, Any], image: dict[str, Any], where: str) -> list[float]:
    """(left, top, right, bottom), cut to the image where it is out by less than a pixel."""
    numbers = [v for v in note["bbox"] if isinstance(v, int | float)]
    if not len(numbers) == len(note["bbox"]) == 4:
        raise ValueError(
            f"{where} must have a box of left, top, width, height, got {note['bbox']}."
        )
    left, top, width, height = map(float, numbers)
    if not (width > 0 and height > 0):
        raise ValueError(
            f"{where} must have a box of a width and height above 0, got {note['bbox']}."
        )
    right, bottom, rows, cols = left + width, top + height, image["height"], image["width"]
    if not (left > -1 and top > -1 and right < cols + 1 and bottom < rows + 1):
        raise ValueError(
            f"{where} must have a box inside its image of {rows} x {cols} px, got {note['bbox']}."
        )
    box = [max(left, 0.0), max(top, 0.0), min(right, float(cols)), min(bottom, float(rows))]
    if box[0] >= box[2] or box[1] >= box[3]:
        raise ValueError(
            f"{where} must have a part inside its image of {rows} x {cols} px, got {note['bbox']}."
        )
    return box


def _check_size(file: Path, image: dict[str, Any], where: Path) -> None:
    """Raises ValueError unless a file has the size that the JSON file says."""
    with open_image(file) as source:
        found, said = (source.height, source.width), (image["height"], image["width"])
    if found != said:
        raise ValueError(
            f"{where}: image {image['id']} must be {said[0]} x {said[1]} px as it says, found "
            f"{found[0]} x {found[1]} px in {file}."
        )
