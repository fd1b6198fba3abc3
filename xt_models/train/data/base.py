"""What every form of data has in common: fields, the files it names, and the error."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
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


_ENTRIES = {"images": "image", "annotations": "annotation", "categories": "category"}


def check_list(
    table: Any, key: str, where: str | Path, kinds: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The list under `key`, whose entries all hold values of these kinds.

    Raises ValueError, naming the entry by its id or place.
    """
    found = table.get(key) if isinstance(table, dict) else None
    if not isinstance(found, list):
        raise ValueError(f"{where}: expected a list {key!r}, found none.")
    for place, entry in enumerate(found):
        name = entry.get("id", f"at {place}") if isinstance(entry, dict) else f"at {place}"
        what = f"{where}: {_ENTRIES[key]} {name}"
        if not isinstance(entry, dict):
            raise ValueError(f"{what} must be an object, got {entry!r}.")
        for option, kind in kinds.items():
            if not isinstance(entry.get(option), kind) or isinstance(entry[option], bool):
                words = getattr(kind, "__name__", str(kind))
                raise ValueError(f"{what} must have {option} ({words}), got {entry.get(option)!r}.")
    return found


def read_csv(path: Path, columns: Iterable[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Line number and values by column, "" for none, of a CSV file with a line of names, UTF-8.

    Raises ValueError if one of `columns` is not there, or for other bytes.
    """
    try:
        text = path.read_text("utf-8-sig")  # spreadsheets put a mark before the first name
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8, found other bytes ({error.reason}).") from None
    reader = csv.DictReader(io.StringIO(text, newline=""))
    missing = set(columns) - set(reader.fieldnames or ())
    if missing:
        raise ValueError(f"{path}: expected a column {sorted(missing)[0]}, found none.")
    for row in reader:
        yield reader.line_num, {name: row.get(name) or "" for name in reader.fieldnames or ()}


def read_json(path: Path) -> Any:
    """What a JSON file holds. Raises ValueError if there is none, or no JSON in it."""
    if not path.is_file():
        raise ValueError(f"{path}: expected a JSON file, found none.")
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, found: {error}.") from None
