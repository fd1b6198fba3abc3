"""The scenes of `xt demo`: a photograph enlarged to a tiled TIFF of 7,143 x 8,192 px, and one of
shoreline vessels, on which small trained models that the package holds are shown.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

WIDTH = 8192
TILE = 256
FILE = "hubble_deep_field.jpg"
MODELS = {"region-only": "each region alone", "xl-through": "xT: XL memory over all regions"}
SCENE_SEED = 2026
ZOOM = 2
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


def show_vessels(out: Path) -> dict[str, float]:
    """Draws a scene of shoreline vessels, streams both models of the package over it, and makes
    `out` with scene.tif, a folder for each model, and comparison.png. Returns title -> F1, percent.
    """
    import tifffile
    import torch

    from .model import XT
    from .streaming import stream
    from .train import shoreline

    out.mkdir()
    panels, found = [], {}
    with as_file(files("xt_models") / "assets" / "shoreline") as folder:
        models = {name: XT.from_pretrained(folder / f"{name}-0") for name in MODELS}
    chunk = models["xl-through"].config.chunk_regions
    assert chunk is not None
    regions = int((4 * chunk) ** 0.5)
    scene = shoreline.draw(1, torch.Generator().manual_seed(SCENE_SEED), regions)
    scene = shoreline.Layout(*(column[:1] for column in scene))
    pixels = shoreline.render(scene, regions)[0, 0].numpy()
    vessels = shoreline.target(scene, regions)[0, 0]
    tifffile.imwrite(out / "scene.tif", pixels, tile=(256, 256), compression="deflate")
    for name, title in MODELS.items():
        stream(models[name], out / "scene.tif", out / name, tokens=False)
        called = torch.from_numpy(tifffile.imread(out / name / "map.tif"))[..., 0] > 0.5
        found[title] = shoreline.f1(called, vessels)
        panels.append(_panel(pixels, called.numpy(), vessels.numpy(), title, found[title]))
    _side_by_side(panels).save(out / "comparison.png")
    return found


def _panel(
    pixels: np.ndarray[Any, Any],
    called: np.ndarray[Any, Any],
    vessels: np.ndarray[Any, Any],
    title: str,
    score: float,
) -> Image.Image:
    """The scene, with a frame around each cell that is a vessel or was called one."""
    from PIL import Image, ImageDraw

    gray = (np.clip((pixels + 1) / 3, 0, 1) * 255).astype(np.uint8)
    side = ZOOM * gray.shape[0]
    panel = Image.new("RGB", (side, side + 48), "white")
    panel.paste(Image.fromarray(gray).resize((side, side), Image.Resampling.NEAREST), (0, 48))
    draw = ImageDraw.Draw(panel)
    draw.text((4, 4), f"{title}: F1 {score:.1f} %", fill="black")
    left, cell = 4, side // called.shape[0]
    for label, cells, colour in (
        ("vessel found", called & vessels, "lime"),
        ("none, called one", called & ~vessels, "red"),
        ("vessel missed", vessels & ~called, "yellow"),
    ):
        draw.rectangle((left, 28, left + 10, 38), outline="black", fill=colour)
        draw.text((left + 16, 26), f"{label}: {cells.sum()}", fill="black")
        left += 150
        for row, col in np.argwhere(cells):
            corner = col * cell, 48 + row * cell
            draw.rectangle((*corner, corner[0] + cell, corner[1] + cell), outline=colour, width=3)
    return panel


def _side_by_side(panels: list[Image.Image]) -> Image.Image:
    from PIL import Image

    width = sum(panel.width for panel in panels) + 16 * (len(panels) - 1)
    whole = Image.new("RGB", (width, panels[0].height), "white")
    for i, panel in enumerate(panels):
        whole.paste(panel, (i * (panel.width + 16), 0))
    return whole
