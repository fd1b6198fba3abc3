"""Images with labels: a folder for each class, a list in a CSV file, iNaturalist 2018."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from .base import Data, Labelled, check_files, check_list, read_csv, read_json

SUFFIXES = frozenset(".tif .tiff .btf .png .jpg .jpeg .npy .zarr .jp2 .svs".split())
UNREAD = frozenset(".webp .bmp .gif .heic .heif .avif .tga .ppm .pgm".split())
"""Pictures that `open_image` does not read: left out in silence they would be missed by nobody."""


@dataclass(frozen=True)
class Labels(Data):
    """Fields of the forms with labels.

    fit: how validation images come to the shape of `size`: "crop", the largest window in their
    middle; "squash", all of them.
    """

    task: ClassVar[str] = "classification"

    fit: str = "crop"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fit not in ("crop", "squash"):
            raise ValueError(f"data.fit must be crop or squash, got {self.fit!r}.")


@dataclass(frozen=True)
class ImageFolder(Labels):
    """`train/<class>/<image>` (the form of torchvision's ImageFolder), any depth below a class.

    train, val: folders; val "" for none. Classes are the folders of `train`, sorted by name.
    """

    train: str = "train"
    val: str = "val"

    def read(self, split: str, classes: tuple[str, ...] = ()) -> Labelled:
        """The images of a split. Raises ValueError for none, or for a folder not in `classes`."""
        folder = self.path(getattr(self, split))
        if not folder.is_dir():
            raise ValueError(f"data.{split} must be a folder of one folder a class, got {folder}.")
        found = tuple(sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name[0] != "."))
        if not found:
            raise ValueError(f"{folder}: expected one folder a class, found none.")
        classes = classes or found
        strange = [name for name in found if name not in classes]
        if strange:
            raise ValueError(f"{folder / strange[0]}: expected a class of the training images.")
        paths, labels = [], []
        for name in found:
            inner = image_files(folder / name, deep=True)
            if not inner:
                raise ValueError(f"{folder / name}: expected at least one image, found none.")
            paths += inner
            labels += [classes.index(name)] * len(inner)
        return Labelled(classes, paths, labels)


@dataclass(frozen=True)
class ImageList(Labels):
    """A CSV file with the columns `path` and `label`, a path a line, relative to `images`.

    train, val: CSV files; val "" for none. images: folder of the images. classes: names of the
    labels; empty for those of `train`, sorted. multi_label: a label is any number of names with
    ";" between.
    """

    train: str = "train.csv"
    val: str = ""
    images: str = ""
    classes: tuple[str, ...] = ()
    multi_label: bool = False

    def read(self, split: str, classes: tuple[str, ...] = ()) -> Labelled:
        """The images of a split. Raises ValueError for a missing file or a label out of classes."""
        path = self.path(getattr(self, split))
        if not path.is_file():
            raise ValueError(f"data.{split} must be a CSV file, got {path}.")
        lines = list(read_csv(path, ("path", "label")))
        if not lines:
            raise ValueError(f"{path}: expected at least one image, found none.")
        names = [self._names(row["label"]) for _, row in lines]
        classes = self.classes or classes or tuple(sorted({n for each in names for n in each}))
        number = {name: i for i, name in enumerate(classes)}
        for (line, row), each in zip(lines, names, strict=True):
            if not row["path"].strip():
                raise ValueError(f"{path}, line {line}: path must be that of an image, got ''.")
            strange = [name for name in each if name not in number]
            if strange or not (each or self.multi_label):
                got = strange[0] if strange else ""
                raise ValueError(
                    f"{path}, line {line}: label must be one of the {len(classes)} classes, "
                    f"got {got!r}."
                )
        paths = [self.path(self.images, row["path"].strip()) for _, row in lines]
        check_files(paths, str(path))
        labels = [tuple(sorted(number[name] for name in each)) for each in names]
        if self.multi_label:
            return Labelled(classes, paths, labels)
        return Labelled(classes, paths, [label for (label,) in labels])

    def _names(self, label: str) -> list[str]:
        if not self.multi_label:
            return [label.strip()] if label.strip() else []
        return [name.strip() for name in label.split(";") if name.strip()]


@dataclass(frozen=True)
class INaturalist(Labels):
    """iNaturalist 2018: `train2018.json`, `val2018.json` (images, annotations) and
    `categories.json`, which names the supercategory of each species.

    train, val: JSON files. categories: the JSON file of categories; the 2018 files give them
    numbers alone. images: folder that `file_name` starts at. supercategory: keep the species of
    this one, such as "Reptilia"; "" for all.
    """

    train: str = "train2018.json"
    val: str = "val2018.json"
    categories: str = "categories.json"
    images: str = ""
    supercategory: str = ""

    def read(self, split: str, classes: tuple[str, ...] = ()) -> Labelled:
        """The images of a split; classes are the species kept, by category number."""
        path = self.path(getattr(self, split))
        table = read_json(path)
        images = check_list(table, "images", path, {"id": int | str, "file_name": str})
        kinds = {"image_id": int | str, "category_id": int}
        notes = check_list(table, "annotations", path, kinds)
        named = self._categories(table.get("categories", []))
        kept = [c for c in sorted(named) if self._holds(named[c])]
        if not kept:
            groups = sorted({c.get("supercategory", "") for c in named.values()})
            raise ValueError(
                f"data.supercategory must be one of {', '.join(groups)}, got "
                f"{self.supercategory!r}."
            )
        number = {category: i for i, category in enumerate(kept)}
        files = {image["id"]: image["file_name"] for image in images}
        paths, labels = [], []
        for note in notes:
            category, image = note["category_id"], note["image_id"]
            if category not in named:
                raise ValueError(
                    f"{path}: annotation {note.get('id')} must have one of the {len(named)} "
                    f"categories, got {category}."
                )
            if image not in files:
                raise ValueError(
                    f"{path}: annotation {note.get('id')} must have an image of the file, "
                    f"got {image}."
                )
            if category in number:
                paths.append(self.path(self.images, files[image]))
                labels.append(number[category])
        check_files(paths, str(path))
        return Labelled(tuple(str(named[c]["name"]) for c in kept), paths, labels)

    def _categories(self, own: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
        """Category number -> its entry, from the file of categories or the annotations' own."""
        path = self.path(self.categories)
        if path.is_file() or (self.supercategory and not any("supercategory" in c for c in own)):
            own = read_json(path)
        found = check_list({"categories": own}, "categories", path, {"id": int})
        return {c["id"]: {"name": c["id"]} | c for c in found}

    def _holds(self, category: dict[str, Any]) -> bool:
        return not self.supercategory or category.get("supercategory") == self.supercategory


def image_files(folder: Path, deep: bool = False) -> list[Path]:
    """The image files in a folder, at any depth if `deep`, sorted by name.

    Raises ValueError for images of a form that is not read.
    """
    found = sorted(folder.rglob("*") if deep else folder.iterdir())
    other = [p for p in found if p.suffix.lower() in UNREAD]
    if other:
        more = f" (and {len(other) - 1:,} others)" if len(other) > 1 else ""
        raise ValueError(f"{other[0]}: expected TIFF, PNG, JPEG, .npy or zarr, found "
                         f"{other[0].suffix}{more}: convert it, or take it away.")  # fmt: skip
    return [p for p in found if p.suffix.lower() in SUFFIXES]
