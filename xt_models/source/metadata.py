"""What an image file tells besides pixels: georeference, microns per pixel, nodata.

Sources: OGC GeoTIFF 1.1 (tags and GeoKeys), ESRI world files, OME-XML, Aperio's descriptions.
"""

from __future__ import annotations

import math
import re
import warnings
from pathlib import Path
from typing import Any

from .base import SourceError, expect
from .tiff_directory import Directory

# GeoKeys, and values of them.
_MODEL, _RASTER, _GEOGRAPHIC, _PROJECTED, _VERTICAL = 1024, 1025, 2048, 3072, 4096
_IS_PROJECTED, _IS_GEOGRAPHIC, _IS_GEOCENTRIC, _IS_POINT, _USER_DEFINED = 1, 2, 3, 2, 32767


_KINDS = {_IS_PROJECTED: "projected", _IS_GEOGRAPHIC: "geographic", _IS_GEOCENTRIC: "geocentric"}


def tiff_metadata(directory: Directory) -> dict[str, Any]:
    """Georeference, microns per pixel, nodata, orientation: whatever the first page tells."""
    name, description = directory.file.name, directory.text("description")
    files = set(re.findall(r'FileName="([^"]*)"', description)) if "<OME" in description else set()
    one = "an OME-TIFF that is complete in itself"
    expect(len(files) < 2, name, one, f"references to {len(files)} files")
    orientation = directory.number("orientation", 1)
    found = {
        "orientation": orientation if orientation != 1 else None,
        "nodata": json_number(directory.text("nodata").strip()),
        "mpp": _microns_per_pixel(directory, description),
        "transform": _geo_transform(directory) or world_file(name),
        "crs": _geo_crs(directory),
        "crs_kind": _KINDS.get(_geo_keys(directory).get(_MODEL, 0)),
    }
    return {key: value for key, value in found.items() if value is not None}


def json_number(text: str) -> float | str | None:
    """A finite number as a number, other text as it is, nothing as None."""
    try:
        value = float(text)
    except ValueError:
        return text or None
    return value if math.isfinite(value) else text


def world_file(path: str) -> list[float] | None:
    """The transform of a world file beside an image (`.tfw`, `.pgw`, `.jgw`, `.wld`), if any."""
    suffix = Path(path).suffix
    for end in (f".{suffix[1:2]}{suffix[-1:]}w", f"{suffix}w", ".wld"):  # .tfw, .tifw
        beside = Path(path).with_suffix(end)
        if suffix and beside.is_file() and beside.stat().st_size < 4096:
            words = beside.read_text(errors="replace").split()[:6]
            try:
                a, d, b, e, c, f = (float(word) for word in words)
            except ValueError as error:
                raise SourceError(f"{beside}: expected six numbers, found {words}.") from error
            return _corner(a, b, c, d, e, f)
    return None


def _corner(a: float, b: float, c: float, d: float, e: float, f: float) -> list[float]:
    """The transform for corners of pixels, from one for their centres."""
    return [a, b, c - (a + b) / 2, d, e, f - (d + e) / 2]


def _microns_per_pixel(directory: Directory, description: str) -> list[float] | None:
    """[y, x]: from OME-XML, from Aperio's text, or from resolution tags finer than 10 microns.

    Coarser resolution tags tell how a page prints (72 dpi is 353 microns), not how large it is.
    """
    units = {"µm": 1.0, "um": 1.0, "&#181;m": 1.0, "nm": 1e-3, "mm": 1e3, "cm": 1e4}
    sizes = []
    for axis in "YX":
        size = re.search(rf'PhysicalSize{axis}="([0-9.eE+-]+)"', description)
        unit = re.search(rf'PhysicalSize{axis}Unit="([^"]+)"', description)
        scale = units.get(unit.group(1) if unit else "um")
        if size and scale:
            sizes.append(_number(size.group(1)) * scale)
    aperio = re.search(r"\bMPP\s*=\s*([0-9.]+)", description)
    if len(sizes) < 2 and aperio:
        sizes = [_number(aperio.group(1))] * 2
    elif len(sizes) < 2:
        microns = {2: 25_400.0, 3: 10_000.0}.get(directory.number("resolution_unit", 2), math.inf)
        for tag in ("y_resolution", "x_resolution"):
            ratio = directory.array(tag, 1)
            if ratio is not None and ratio.shape == (1, 2) and ratio.all():
                sizes.append(microns * float(ratio[0, 1]) / float(ratio[0, 0]))
        sizes = sizes if all(size < 10 for size in sizes) else []
    return sizes if len(sizes) == 2 and all(0 < size < math.inf for size in sizes) else None


def _number(text: str) -> float:
    """A number, or NaN: a description in odd form says nothing, and is no reason to refuse."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def _geo_transform(directory: Directory) -> list[float] | None:
    """Six affine numbers, for the upper left corner of pixel (0, 0)."""
    matrix, scale = directory.array("geo_matrix", 16), directory.array("geo_scale", 3)
    tiepoint = directory.array("geo_tiepoint", 1 << 16)
    if matrix is not None and len(matrix) == 16:
        a, b, c, d, e, f = (float(matrix[i]) for i in (0, 1, 3, 4, 5, 7))
    elif scale is not None and len(scale) >= 2 and tiepoint is not None and len(tiepoint) >= 6:
        column, row, _, x, y = (float(value) for value in tiepoint[:5])
        a, b, d, e = float(scale[0]), 0.0, 0.0, -float(scale[1])
        c, f = x - column * a, y - row * e
    else:
        if tiepoint is not None:
            lost = "ground control points are left out; only an affine georeference is kept"
            warnings.warn(f"{directory.file.name}: {lost}.", stacklevel=2)
        return None
    is_point = _geo_keys(directory).get(_RASTER) == _IS_POINT
    return _corner(a, b, c, d, e, f) if is_point else [a, b, c, d, e, f]


def _geo_keys(directory: Directory) -> dict[int, int]:
    """GeoKeys whose value is a short number."""
    values = directory.array("geo_keys", 1 << 14)
    if values is None or values.dtype.itemsize != 2:
        return {}
    table = values[4 : len(values) // 4 * 4].reshape(-1, 4)
    return {int(key): int(value) for key, place, _, value in table if place == 0}


def _geo_crs(directory: Directory) -> str | None:
    """An EPSG code, or WKT by rasterio where the file defines its own coordinate system."""
    keys = _geo_keys(directory)
    model = keys.get(_MODEL)
    if model not in (_IS_PROJECTED, _IS_GEOGRAPHIC, _IS_GEOCENTRIC):
        return None
    code = keys.get(_PROJECTED if model == _IS_PROJECTED else _GEOGRAPHIC, _USER_DEFINED)
    vertical = keys.get(_VERTICAL)
    if 1024 <= code < _USER_DEFINED and vertical != _USER_DEFINED:
        return f"EPSG:{code}" + (f"+{vertical}" if vertical else "")
    try:
        import rasterio
    except ImportError:
        lost = "its coordinate system has no EPSG code and is left out"
        hint = "pip install 'xt-kernels[geo]' to keep it"
        warnings.warn(f"{directory.file.name}: {lost}; {hint}.", stacklevel=2)
        return None
    with rasterio.open(directory.file.name) as dataset:
        return str(dataset.crs.to_wkt()) if dataset.crs else None
