"""xView3-SAR: Sentinel-1 scenes of two bands in dB, detections in a CSV file, shorelines.

A scene is a folder `<scene_id>` with a float GeoTIFF for each band, or one GeoTIFF of two bands,
`<scene_id>.tif`. The CSV file has a line a detection; `scene_id`, `detect_scene_row` and
`detect_scene_column` (pixels) must be there, `is_vessel`, `is_fishing`, `vessel_length_m`,
`distance_from_shore_km` and `confidence` may be empty, which is unknown.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from ...source import open_image
from .base import Data, read_csv
from .crops import Window, read_crop

COLUMNS = (
    "row", "column", "is_vessel", "is_fishing", "length_m", "shore_km", "confidence",
)  # fmt: skip
"""Columns of `Scenes.points`: pixels from the scene's corner; 1, 0 or NaN for unknown; metres; km;
confidence 0 low, 1 medium, 2 high."""

_CSV = {
    "row": "detect_scene_row",
    "column": "detect_scene_column",
    "is_vessel": "is_vessel",
    "is_fishing": "is_fishing",
    "length_m": "vessel_length_m",
    "shore_km": "distance_from_shore_km",
    "confidence": "confidence",
}
_LEVELS = ("low", "medium", "high")
_ANSWER = {"true": 1.0, "false": 0.0}
_WORDS = {
    "is_vessel": _ANSWER,
    "is_fishing": _ANSWER,
    "confidence": {word: float(i) for i, word in enumerate(_LEVELS)},
}
"""Column -> its words; a number must be that of one."""


@dataclass(frozen=True)
class Scenes:
    """Scenes, the files of their bands, sizes (height, width) and detections.

    points: float64 `[N, len(COLUMNS)]` of each scene. shores: file of the shoreline, or None.
    lowest: confidence of the points to learn from; unknown is enough.
    """

    classes: tuple[str, ...]
    names: Sequence[str]
    files: Sequence[tuple[Path, ...]]
    sizes: Sequence[tuple[int, int]]
    points: Sequence[torch.Tensor]
    shores: Sequence[Path | None]
    empty: float
    fill: float
    lowest: int

    def __len__(self) -> int:
        return len(self.names)

    def rows(self) -> Iterator[str]:
        """One line for all that an item is."""
        for files, points in zip(self.files, self.points, strict=True):
            yield f"{files}\t{points.tolist()}"

    def crop(self, index: int, window: Window) -> torch.Tensor:
        """dB of a window `[bands, h, w]`, float32; `fill` where the scene is empty or ends."""
        pixels = torch.cat([read_crop(path, window) for path in self.files[index]]).float()
        rows, cols = self.sizes[index]
        known = pixels.isfinite() & (pixels > self.empty)
        known[:, max(rows - window.top, 0) :] = False
        known[:, :, max(cols - window.left, 0) :] = False
        return pixels.where(known, pixels.new_tensor(self.fill))

    def inside(self, index: int, window: Window) -> torch.Tensor:
        """The detections in a window, `[N, len(COLUMNS)]`, its corner as origin."""
        points = self.points[index].clone()
        points[:, :2] -= torch.tensor([window.top, window.left])
        limit = torch.tensor([window.height, window.width])
        return points[((points[:, :2] >= 0) & (points[:, :2] < limit)).all(1)]

    def is_low(self, points: torch.Tensor) -> torch.Tensor:
        """Which of some points not to learn from, bool `[N]`."""
        return points[:, COLUMNS.index("confidence")] < self.lowest

    def shoreline(self, index: int) -> np.ndarray[Any, np.dtype[np.float64]] | None:
        """Points (row, column) of a scene's shoreline `[N, 2]`, or None if no file is known."""
        path = self.shores[index]
        return None if path is None else read_shoreline(path)


@dataclass(frozen=True)
class XView3(Data):
    """xView3-SAR as it is distributed.

    train, val: folders of scenes; val "" for none. train_labels, val_labels: their CSV files.
    files: names of the bands' files in a scene's folder. shorelines: folder of
    `<scene_id>_shoreline.npy`; "" for none. confidence: the lowest to learn from, "low", "medium"
    or "high". empty: dB up to which a pixel holds nothing; fill: what it is then. near: share of
    training crops that are laid around a detection.
    """

    task: ClassVar[str] = "vessels"

    train: str = "train"
    val: str = "validation"
    train_labels: str = "train.csv"
    val_labels: str = "validation.csv"
    files: tuple[str, ...] = ("VH_dB.tif", "VV_dB.tif")
    shorelines: str = ""
    confidence: str = "medium"
    empty: float = -32768.0
    fill: float = -50.0
    near: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.confidence not in _LEVELS:
            raise ValueError(
                f"data.confidence must be {', '.join(_LEVELS)}, got {self.confidence!r}."
            )
        if not 0 <= self.near <= 1:
            raise ValueError(f"data.near must be in 0..1, got {self.near}.")

    def read(self, split: str, classes: tuple[str, ...] = ()) -> Scenes:
        """The scenes of a split. Raises ValueError for a scene without one of its bands, and for a
        detection outside its scene or of a scene that is not there."""
        folder = self.path(getattr(self, split))
        if not folder.is_dir():
            raise ValueError(f"data.{split} must be a folder of scenes, got {folder}.")
        found = {path.stem: files for path in sorted(folder.iterdir())
                 if (files := self._files(path))}  # fmt: skip
        if not found:
            raise ValueError(f"{folder}: expected at least one scene, found none.")
        sizes = [_size(files) for files in found.values()]
        points = self._points(
            self.path(getattr(self, f"{split}_labels")), dict(zip(found, sizes, strict=True))
        )
        shores = [self.path(self.shorelines, f"{name}_shoreline.npy") for name in found]
        known = [path if self.shorelines else None for path in shores]
        for path in known:
            if path is not None and not path.is_file():
                raise ValueError(f"data.shorelines must hold {path.name}, missing {path}.")
        names = list(found)
        return Scenes(("vessel", "fishing"), names, list(found.values()), sizes,
                      [points[name] for name in names], known, self.empty, self.fill,
                      _LEVELS.index(self.confidence))  # fmt: skip

    def _files(self, path: Path) -> tuple[Path, ...]:
        """The files of a scene's bands, none if `path` is no scene."""
        if path.is_file():
            return (path,) if path.suffix.lower() in (".tif", ".tiff") else ()
        files = tuple(path / name for name in self.files)
        missing = [file for file in files if not file.is_file()]
        if missing and path.name[0] != ".":
            raise ValueError(f"{path}: expected a scene with {missing[0].name}, found none.")
        return files if not missing else ()

    def _points(self, path: Path, sizes: dict[str, tuple[int, int]]) -> dict[str, torch.Tensor]:
        if not path.is_file():
            raise ValueError(f"{path}: expected a CSV file of detections, found none.")
        out: dict[str, list[list[float]]] = {name: [] for name in sizes}
        for line, row in read_csv(path, ("scene_id", _CSV["row"], _CSV["column"])):
            name = row["scene_id"]
            if name not in sizes:
                raise ValueError(f"{path}, line {line}: expected a scene, found no {name!r}.")
            point = [
                _number(row.get(_CSV[c], ""), f"{path}, line {line}: {_CSV[c]}", _WORDS.get(c, {}))
                for c in COLUMNS
            ]
            rows, cols = sizes[name]
            if not (0 <= point[0] < rows and 0 <= point[1] < cols):
                raise ValueError(
                    f"{path}, line {line}: a detection must lie in its scene of {rows} x "
                    f"{cols} px, got row {point[0]:g}, column {point[1]:g}."
                )
            out[name].append(point)
        return {
            name: torch.tensor(rows, dtype=torch.float64).view(-1, len(COLUMNS))
            for name, rows in out.items()
        }


def _number(text: str, where: str, words: dict[str, float]) -> float:
    word = text.strip().lower()
    if not word or word in words:
        return words.get(word, math.nan)
    with suppress(ValueError):
        value = float(word)
        if not words or value in words.values():
            return value
    numbers = ", ".join(f"{value:g}" for value in words.values())
    rule = f"{', '.join(words)}, {numbers}" if words else "a number"
    raise ValueError(f"{where} must be {rule} or empty, got {text!r}.")


def _size(files: Sequence[Path]) -> tuple[int, int]:
    sizes, bands = [], 0
    for path in files:
        with open_image(path) as source:
            sizes.append((source.height, source.width))
            bands += source.bands
    if len(set(sizes)) > 1:
        raise ValueError(f"{files[0].parent}: expected bands of one size, found {sizes}.")
    return sizes[0]


class _ArraysOnly(pickle.Unpickler):
    """Of a pickle, arrays of numbers and nothing that could run."""

    _KNOWN = frozenset({"_reconstruct", "ndarray", "dtype"})

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] == "numpy" and name in self._KNOWN:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name}")


def read_shoreline(path: Path) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Points (row, column) of all contours in a `.npy` file of arrays `[N, 2]`, `[N, 2]`.

    The file holds a pickle; arrays are read from it, anything else is refused and does not run.
    """
    with path.open("rb") as file:
        try:
            version = np.lib.format.read_magic(file)
            read = {(1, 0): np.lib.format.read_array_header_1_0,
                    (2, 0): np.lib.format.read_array_header_2_0}[version]  # fmt: skip
            shape, _, dtype = read(file)
            if dtype.hasobject:
                whole = np.asarray(_ArraysOnly(io.BytesIO(file.read())).load(), dtype=object)
                parts = [np.asarray(part, dtype=np.float64) for part in whole.ravel()]
            else:
                parts = [np.frombuffer(file.read(), dtype).reshape(shape).astype(np.float64)]
            points = [part.reshape(-1, 2) for part in parts if part.size]
            return np.concatenate(points) if points else np.zeros((0, 2))
        except (pickle.UnpicklingError, ValueError, TypeError, KeyError, EOFError) as error:
            raise ValueError(f"{path}: expected contours as arrays, found {error}.") from None
