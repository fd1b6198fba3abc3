"""The scene of `xt demo`: a photograph enlarged to a tiled TIFF of 7,143 x 8,192 px."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np

WIDTH = 8192
TILE = 256
FILE = "hubble_deep_field.jpg"
PHOTOGRAPH = "the Hubble eXtreme Deep Field (NASA, ESA; public domain)"


def write_scene(path: Path) -> None:
    """Writes the photograph, enlarged to `WIDTH` pixels, as a tiled JPEG TIFF.

    One band of tiles is in memory at a time.
    """
    import tifffile
    from PIL import Image

    with as_file(files("xt_models") / "assets" / FILE) as file, Image.open(file) as image:
        photo = image.convert("RGB")
    width = WIDTH
    height = photo.height * width // photo.width
    scale = photo.width / width

    def tiles() -> Iterator[np.ndarray[Any, np.dtype[np.uint8]]]:
        for top in range(0, height, TILE):
            rows = min(TILE, height - top)
            box = (0, top * scale, photo.width, min((top + rows) * scale, photo.height))
            band = np.asarray(photo.resize((width, rows), Image.Resampling.BICUBIC, box))
            band = np.pad(band, ((0, TILE - rows), (0, -width % TILE), (0, 0)), mode="edge")
            for left in range(0, width, TILE):
                yield np.ascontiguousarray(band[:, left : left + TILE])

    part = path.with_name(path.name + ".part")
    tifffile.imwrite(
        part,
        tiles(),
        shape=(height, width, 3),
        dtype=np.uint8,
        tile=(TILE, TILE),
        photometric="rgb",
        compression="jpeg",
        compressionargs={"level": 92},
        metadata=None,
    )
    part.rename(path)
