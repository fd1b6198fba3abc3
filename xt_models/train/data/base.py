"""What every form of data has in common: fields, the files it names, and the error."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

Size = int | tuple[int, int]


@dataclass(frozen=True)
class Data:
    """Fields of every form.

    root: folder that the other paths start at. size: of the crops that a model is trained on and
    validated with, pixels: a side, or height and width. bands: which of each image, numbered from
    1; none for all.
    """

    task: ClassVar[str]

    form: str = "folder"
    root: str = "."
    size: Size = 512
    bands: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if min(self.shape) < 1:
            raise ValueError(f"data.size must be at least 1, got {self.size}.")
        if any(band < 1 for band in self.bands):
            raise ValueError(f"data.bands must be numbers from 1, got {self.bands}.")

    @property
    def shape(self) -> tuple[int, int]:
        """`size` as (height, width)."""
        return (self.size, self.size) if isinstance(self.size, int) else self.size

    def read(self, split: str, classes: tuple[str, ...] = ()) -> Any:
        """What a split holds; `classes` are those of the training images, for other splits."""
        raise NotImplementedError

    def path(self, *parts: str) -> Path:
        """A path below `root`."""
        return Path(self.root).joinpath(*parts)


@dataclass(frozen=True)
class Labelled:
    """Images for classification: a class number each, or the numbers of all that hold."""

    classes: tuple[str, ...]
    paths: Sequence[Path]
    labels: Sequence[int | tuple[int, ...]]

    def __len__(self) -> int:
        return len(self.paths)

    def rows(self) -> Iterator[str]:
        """One line for all that an item is."""
        for path, label in zip(self.paths, self.labels, strict=True):
            yield f"{path}\t{label}"


def check_files(paths: Iterable[Path], what: str) -> None:
    """Raises ValueError, naming the first, unless every file exists."""
    missing = [path for path in paths if not path.exists()]
    if missing:
        others = f" and {len(missing) - 1:,} others" if len(missing) > 1 else ""
        raise ValueError(f"{what}: every image must exist, missing {missing[0]}{others}.")


def read_json(path: Path) -> Any:
    """What a JSON file holds. Raises ValueError if there is none, or no JSON in it."""
    if not path.is_file():
        raise ValueError(f"{path}: expected a JSON file, found none.")
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, found: {error}.") from None
