"""What heads make of an image as it streams by: maps as zarr or tiled BigTIFF, boxes as COCO and
GeoJSON, scores."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from .group_walk import GroupWalk, Held, Piece
from .heads import Group
from .heads.boxes import Boxes, BoxHead
from .heads.dense import MapHead, own_part
from .heads.xview3 import Points, XView3Head
from .model import XT
from .output import MapWriter, map_attributes, named_classes
from .source import ImageSource

TILE = 256
"""Side of the tiles of a TIFF, in cells."""

Maps = Literal["prediction", "logits"]
MapFormat = Literal["tif", "zarr"]

_GEOGRAPHIC, _PROJECTED = 2048, 3072  # GeoKeys


class HeadOutputs:
    """The heads of a model over one image: `take` runs them chunk by chunk, `write` keeps what they
    say, `finish` makes the files. `write` and `saved` belong to one thread, `take` and `held` to
    another.

    maps, map_format: as in `stream`. folder: where the files go, scratch: where maps wait; without
    a folder heads that give maps do not run. seen, left_out: regions of chunks before, of which
    `held` and `saved` are what they were then.
    """

    def __init__(
        self,
        model: XT,
        source: ImageSource,
        maps: Maps,
        map_format: MapFormat,
        folder: Path | None = None,
        scratch: Path | None = None,
        seen: Sequence[int] = (),
        left_out: Sequence[int] = (),
        held: dict[int, Held] | None = None,
        saved: dict[str, Any] | None = None,
    ) -> None:
        self._model, self._source, self._folder = model, source, folder
        self._grid = model.grid(source.height, source.width)
        saved = {"blocks": {}, "found": {}} if saved is None else saved
        self._maps: dict[str, MapFile] = {}
        self._boxes: dict[str, BoxHead] = {}
        for name, head in model.group_heads.items():
            if isinstance(head, BoxHead):
                self._boxes[name] = head
            elif folder is not None and scratch is not None:
                self._maps[name] = MapFile(
                    folder, scratch, name, model, source, maps, map_format,
                    saved["blocks"].get(name),
                )  # fmt: skip
        self._found: dict[str, list[Boxes]] = {n: saved["found"].get(n, []) for n in self._boxes}
        names = [*self._maps, *self._boxes]
        self._walk = GroupWalk(model, self._grid, names, seen, held)
        self._left_out = set(left_out)

    @property
    def held(self) -> dict[int, Held]:
        """What the next chunks need of the chunks so far."""
        return self._walk.held

    @property
    def saved(self) -> dict[str, Any]:
        """What was kept in memory of the pieces so far."""
        return {
            "blocks": {name: file.writer.blocks for name, file in self._maps.items()},
            "found": self._found,
        }

    def take(
        self,
        regions: Sequence[int],
        tokens: torch.Tensor,
        stages: Mapping[int, Mapping[int, torch.Tensor]],
        left_out: Sequence[int],
    ) -> list[Piece]:
        """Runs the heads on the groups that a chunk completes: see `GroupWalk.add`."""
        self._left_out |= set(left_out)
        with torch.inference_mode():
            return list(self._walk.add(regions, tokens, stages, left_out))

    def write(self, pieces: list[Piece]) -> list[Path]:
        """Keeps what the heads said; the files that are new and whole."""
        for name, group, raw in pieces:
            if name in self._maps:
                self._maps[name].add(group, raw, self._left_out)
            else:
                boxes = self._boxes[name].candidates(raw, group, self._grid)
                self._found[name].append({key: value.cpu() for key, value in boxes.items()})
        new: list[Path] = []
        for file in self._maps.values():
            new += file.writer.written
            file.writer.written.clear()
        return new

    def finish(self) -> tuple[dict[str, Any], list[Path]]:
        """(boxes or points by head, the files that are new), once all chunks were taken."""
        files = [path for file in self._maps.values() for path in file.finish()]
        found: dict[str, Any] = {}
        for name, file in self._maps.items():
            if isinstance(file.head, XView3Head) and self._folder is not None:
                points = file.points(file.head)
                found[name] = {key: value.numpy() for key, value in points.items()}
                files += write_points(self._folder, name, self._source, found[name])
        for name, head in self._boxes.items():
            boxes = head.merge(self._found[name])
            found[name] = {key: value.numpy() for key, value in boxes.items()}
            if self._folder is not None:
                names = self._model.class_names.get(name, ())
                files += write_boxes(self._folder, name, self._source, found[name], names)
        return found, files


class MapFile:
    """The map of one head, written region by region; `finish` makes the file.

    folder: of the run. maps: "prediction", classes or scores, or "logits".
    """

    def __init__(
        self,
        folder: Path,
        scratch: Path,
        name: str,
        model: XT,
        source: ImageSource,
        maps: Maps,
        kind: MapFormat,
        blocks: dict[str, Any] | None,
    ) -> None:
        head = model.group_heads[name]
        assert isinstance(head, MapHead)
        self.head, self._logits, self._kind = head, maps == "logits", kind
        self._grid = grid = model.grid(source.height, source.width)
        self._source, self._path = source, folder / f"{name}.{kind}"
        self._array = self._path if kind == "zarr" else scratch / f"{name}.zarr"
        self._array.parent.mkdir(exist_ok=True)
        dtype, channels, self.empty = map_type(head, maps)
        self._dtype = np.dtype(dtype)
        attributes = map_attributes(model, source, head.output_stride)
        self._attributes = attributes | {"nodata": None if np.isnan(self.empty) else self.empty}
        self._attributes |= named_classes(model.class_names.get(name, ()))
        self.writer = MapWriter(
            self._array, grid, head.output_stride, channels, dtype, self.empty,
            self._attributes, blocks,
        )  # fmt: skip

    def add(self, group: Group, raw: torch.Tensor, left_out: set[int]) -> None:
        """Writes the regions of a group that belong to no group before it."""
        values = raw if self._logits else self.head.predict(raw)
        values = values[None] if values.dim() == 3 else values  # classes have no channel
        side = self._grid.region // self.head.output_stride
        own = own_part(values[0], group, side).permute(1, 2, 0)
        cells = own.cpu().to(torch.float32 if self._dtype.kind == "f" else own.dtype).numpy()
        row, col, rows, cols = group.own
        for i in range(rows):
            for j in range(cols):
                region = (row + i) * self._grid.cols + col + j
                part = cells[i * side : (i + 1) * side, j * side : (j + 1) * side]
                self.writer.put(region, None if region in left_out else part)

    def finish(self) -> list[Path]:
        """The files that are new, once all groups are there."""
        self.writer.close()
        if self._kind == "zarr":
            return []
        write_tiff(self._path, self._array, self._source.metadata, self._attributes)
        return [self._path]

    def points(self, head: XView3Head) -> Points:
        """The objects in the map, read in bands of whole blocks with two rows on each side."""
        import zarr

        data = zarr.open_array(str(self._array), mode="r")
        height, step = data.shape[0], data.chunks[0]
        parts = []
        for top in range(0, height, step):
            first, last = max(top - 2, 0), min(top + step + 2, height)
            band = torch.from_numpy(np.asarray(data[first:last])).permute(2, 0, 1)
            if self._logits:
                band = head.predict(band[None])[0]
            end = min(top + step, height)
            found = head.points(band, (top - first, end - first))
            found["row"] = found["row"] + first * head.output_stride
            parts.append(found)
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def map_type(head: MapHead, maps: Maps) -> tuple[str, int, float]:
    """(dtype, channels, value of cells without a prediction) of the map of a head."""
    if maps == "logits" or not head.is_exclusive:
        return "float32", head.classes, np.nan
    return ("uint8", 1, 255) if head.classes <= 255 else ("uint16", 1, 65535)


def write_tiff(
    path: Path, array: Path, metadata: dict[str, Any], attributes: dict[str, Any]
) -> None:
    """A tiled, deflated BigTIFF of a zarr map `[h, w, C]`, strip by strip; a cloud-optimised one
    with overviews where rasterio is installed.

    metadata: of the image, for its coordinate system. attributes: transform and nodata of the map,
    and the names of its classes, which the file's description then holds as JSON.
    """
    import tifffile
    import zarr

    data = zarr.open_array(str(array), mode="r")
    tags = geo_tags(attributes.get("transform"), metadata)
    nodata, classes = attributes["nodata"], attributes.get("classes")
    tags.append((42113, 2, 0, "nan" if nodata is None else str(nodata), True))
    rows, cols, channels = data.shape
    shape = (rows, cols) if channels == 1 else (rows, cols, channels)
    with tifffile.TiffWriter(path, bigtiff=True) as file:
        file.write(
            _tiles(data),
            shape=shape,
            dtype=data.dtype,
            tile=(TILE, TILE),
            photometric="minisblack",
            planarconfig=None if channels == 1 else "contig",
            compression="zlib",
            extratags=tags,
            metadata=None,
            description=json.dumps({"classes": classes}) if classes else None,
            software=False,
            buffersize=1 << 24,  # bytes of tiles that wait to be compressed
        )
    _optimise(path, metadata, attributes)


def _tiles(data: Any) -> Iterator[np.ndarray[Any, Any]]:
    """Tiles of a map, row-major; each block is read once for each row of tiles."""
    rows, cols, channels = data.shape
    width = -(-data.chunks[1] // TILE) * TILE
    for top in range(0, rows, TILE):
        for left in range(0, cols, width):
            part = np.asarray(data[top : top + TILE, left : left + width])
            for start in range(0, part.shape[1], TILE):
                tile = np.zeros((TILE, TILE, channels), data.dtype)
                piece = part[:, start : start + TILE]
                tile[: piece.shape[0], : piece.shape[1]] = piece
                yield tile[..., 0] if channels == 1 else tile


def geo_tags(transform: list[float] | None, metadata: dict[str, Any]) -> list[tuple[Any, ...]]:
    """GeoTIFF tags of an affine transform and of a coordinate system with an EPSG code."""
    tags: list[tuple[Any, ...]] = []
    if transform is None:
        return tags
    a, b, c, d, e, f = transform
    if b == d == 0 and a > 0 > e:
        tags.append((33550, 12, 3, (a, -e, 0.0), True))
        tags.append((33922, 12, 6, (0.0, 0.0, 0.0, c, f, 0.0), True))
    else:
        matrix = (a, b, 0.0, c, d, e, 0.0, f, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0)
        tags.append((34264, 12, 16, matrix, True))
    code = metadata.get("crs", "").removeprefix("EPSG:").partition("+")[0]
    kind = {"projected": 1, "geographic": 2, "geocentric": 3}.get(metadata.get("crs_kind", ""))
    if code.isdigit() and kind is not None:
        key = _PROJECTED if kind == 1 else _GEOGRAPHIC
        keys = (1, 1, 0, 3, 1024, 0, 1, kind, 1025, 0, 1, 1, key, 0, 1, int(code))
        tags.append((34735, 3, len(keys), keys, True))
    return tags


def _optimise(path: Path, metadata: dict[str, Any], attributes: dict[str, Any]) -> None:
    """The same file as GDAL writes it for the cloud, with any coordinate system."""
    try:
        import rasterio
        from rasterio.shutil import copy
    except ImportError:
        return
    import errno
    import warnings

    plain = path.with_name(path.name + ".plain")
    path.rename(plain)
    with warnings.catch_warnings(), rasterio.Env(GDAL_CACHEMAX=64):  # MB
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        if "crs" in metadata and "transform" in attributes:
            with rasterio.open(plain, "r+") as data:
                data.crs = rasterio.crs.CRS.from_string(metadata["crs"])
        overviews = "AVERAGE" if attributes["nodata"] is None else "MODE"  # scores, classes
        try:
            with rasterio.open(plain) as data:
                longer, levels = max(data.shape), 0
            while longer >> levels > TILE:
                levels += 1
            copy(
                plain, path, driver="COG", BLOCKSIZE=TILE, COMPRESS="DEFLATE", BIGTIFF="YES",
                OVERVIEW_RESAMPLING=overviews, OVERVIEW_COUNT=levels, NUM_THREADS=1,
            )  # fmt: skip
            _decode_all(path, 1 + levels)
        except Exception as error:
            text = f"GDAL wrote it in part: is the disk full? ({error})"
            raise OSError(errno.EIO, text, str(path)) from error
    plain.unlink()


def _decode_all(path: Path, pages: int) -> None:
    """Decodes every tile of a TIFF and of its overviews, each of which ends in a checksum.

    GDAL does not tell of every write that failed.
    """
    import tifffile

    with tifffile.TiffFile(path) as file:
        if len(file.pages) != pages:
            raise ValueError(f"expected {pages} levels, found {len(file.pages)}")
        for page in file.pages:
            for _ in page.segments():
                pass


def write_boxes(
    folder: Path,
    name: str,
    source: ImageSource,
    found: dict[str, np.ndarray[Any, Any]],
    classes: Sequence[str] = (),
) -> list[Path]:
    """`<name>.json`, a COCO data set of one image with scores, boxes in pixels; `<name>.geojson`,
    rectangles in the image's coordinate system, in pixels where it has none. classes: names of the
    labels; without them those that occur are named by their numbers."""
    boxes, scores, labels = (found[key] for key in ("boxes", "scores", "labels"))
    names = dict(enumerate(classes)) or {int(i): str(i) for i in np.unique(labels)}
    coco, geojson = folder / f"{name}.json", folder / f"{name}.geojson"
    record: dict[str, Any] = {
        "images": [
            {"id": 1, "file_name": source.name, "height": source.height, "width": source.width}
        ],
        "categories": [{"id": i, "name": each} for i, each in names.items()],
        "annotations": [
            {
                "id": i + 1,
                "image_id": 1,
                "category_id": int(label),
                "bbox": [left, top, right - left, bottom - top],
                "area": (right - left) * (bottom - top),
                "iscrowd": 0,
                "score": float(score),
            }
            for i, ((left, top, right, bottom), score, label) in enumerate(
                zip(boxes.astype(float).tolist(), scores, labels, strict=True)
            )
        ],
    }
    coco.write_text(json.dumps(record))
    place = _placer(source)
    features = (
        _feature(
            "Polygon",
            [[place(x, y) for x, y in ((x0, y0), (x1, y0), (x1, y1), (x0, y1), (x0, y0))]],
            {"label": int(label), "name": names[int(label)], "score": float(score)},
        )
        for (x0, y0, x1, y1), score, label in zip(
            boxes.astype(float).tolist(), scores, labels, strict=True
        )
    )
    _write_geojson(geojson, source, features)
    return [coco, geojson]


def write_points(
    folder: Path, name: str, source: ImageSource, found: dict[str, np.ndarray[Any, Any]]
) -> list[Path]:
    """`<name>.csv` with the columns of xView3's predictions and the scores behind them;
    `<name>.geojson`, points at the centres of pixels, as `write_boxes`."""
    table, geojson = folder / f"{name}.csv", folder / f"{name}.geojson"
    rows = list(zip(*(found[key].tolist() for key in _POINTS), strict=True))
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            "scene_id detect_scene_row detect_scene_column is_vessel is_fishing vessel_length_m "
            "score vessel_score fishing_score".split()
        )
        for row, col, vessel, fishing, length, score in rows:
            answers = row, col, vessel >= 0.5, fishing >= 0.5, length
            writer.writerow([Path(source.name).stem, *answers, score, vessel, fishing])
    place = _placer(source)
    features = (
        _feature(
            "Point",
            place(point[1] + 0.5, point[0] + 0.5),
            dict(zip(_POINTS[2:], point[2:], strict=True)),
        )
        for point in rows
    )
    _write_geojson(geojson, source, features)
    return [table, geojson]


_POINTS = ("row", "col", "is_vessel", "is_fishing", "length_m", "score")


def read_points(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """What `write_points` was given, from its table."""
    columns = (1, 2, 7, 8, 5, 6)
    with path.open(newline="") as file:
        rows = [[float(row[i]) for i in columns] for row in list(csv.reader(file))[1:]]
    values = np.array(rows, dtype=np.float32).reshape(-1, len(columns)).T
    return dict(zip(_POINTS, values, strict=True))


def _placer(source: ImageSource) -> Callable[[float, float], list[float]]:
    """(x, y) in pixels -> coordinates, those of the image where it has some."""
    a, b, c, d, e, f = source.metadata.get("transform", (1, 0, 0, 0, 1, 0))
    return lambda x, y: [a * x + b * y + c, d * x + e * y + f]


def _feature(kind: str, coordinates: list[Any], properties: dict[str, Any]) -> dict[str, Any]:
    geometry = {"type": kind, "coordinates": coordinates}
    return {"type": "Feature", "geometry": geometry, "properties": properties}


def _write_geojson(path: Path, source: ImageSource, features: Iterable[dict[str, Any]]) -> None:
    with path.open("w") as file:
        file.write('{"type": "FeatureCollection", ')
        crs = str(source.metadata.get("crs", ""))
        if crs.startswith("EPSG:") and "transform" in source.metadata:
            urn = f"urn:ogc:def:crs:EPSG::{crs[5:].partition('+')[0]}"
            member = {"type": "name", "properties": {"name": urn}}
            file.write(f'"crs": {json.dumps(member)}, ')
        file.write('"features": [')
        for i, feature in enumerate(features):
            file.write((",\n" if i else "\n") + json.dumps(feature))
        file.write("\n]}\n")


def read_boxes(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """boxes `[N, 4]` (left, top, right, bottom), scores, labels of what `write_boxes` wrote."""
    found = json.loads(path.read_text())["annotations"]
    corners = np.array([a["bbox"] for a in found], dtype=np.float64).reshape(-1, 4)
    corners[:, 2:] += corners[:, :2]
    return {
        "boxes": corners.astype(np.float32),
        "scores": np.array([a["score"] for a in found], dtype=np.float32),
        "labels": np.array([a["category_id"] for a in found], dtype=np.int64),
    }
