"""Image sources: every kind of file reads back exactly, and every kind of bad file says why not."""

from __future__ import annotations

import json
import os
import pickle
import random
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from xt_models.source import ImageSource, SourceError, open_image

tifffile = pytest.importorskip("tifffile")
imagecodecs = pytest.importorskip("imagecodecs")
zarr = pytest.importorskip("zarr")
pillow = pytest.importorskip("PIL.Image")

HEIGHT, WIDTH = 70, 93


def pixels(bands: int, dtype: str, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Smooth plus noise, `[bands, height, width]`."""
    rng = np.random.default_rng(bands)
    rows, columns = np.mgrid[:height, :width]
    smooth = np.sin(rows / 9)[None] + np.cos(columns / 7)[None] + np.arange(bands)[:, None, None]
    noisy = smooth * 12 + rng.random((bands, height, width)) * 20 + 40
    return noisy.astype(dtype)


def check(image: Any, expected: np.ndarray, level: int = 0, **options: Any) -> None:
    """Random windows of a source equal those of `[bands, height, width]`."""
    rng = np.random.default_rng(7)
    with open_image(image, **options) as source:
        _, height, width = expected.shape
        assert source.level_sizes[level] == (height, width)
        assert (source.bands, source.dtype) == (expected.shape[0], expected.dtype)
        assert source.dtype.isnative
        json.dumps(source.metadata)
        windows = [(0, 0, height, width), (height - 1, width - 1, 1, 1), (0, 0, 1, 1)]
        for _ in range(4):
            rows, columns = int(rng.integers(1, height + 1)), int(rng.integers(1, width + 1))
            top = int(rng.integers(0, height - rows + 1))
            windows.append((top, int(rng.integers(0, width - columns + 1)), rows, columns))
        for top, left, rows, columns in windows:
            got = source.read(top, left, rows, columns, level)
            assert got.dtype == expected.dtype and got.dtype.isnative and got.flags.writeable
            want = expected[:, top : top + rows, left : left + columns]
            np.testing.assert_array_equal(got, want)
        assert source.bytes_read > 0


def write_tiff(path: Path, image: np.ndarray, planar: bool = False, **options: Any) -> Path:
    bands = image.shape[0]
    data = image[0] if bands == 1 else image if planar else np.moveaxis(image, 0, -1)
    colour = "rgb" if bands in (3, 4) and image.dtype.itemsize < 4 else "minisblack"
    options = {"photometric": colour, **options}
    if bands > 1:
        options["planarconfig"] = "separate" if planar else "contig"
    tifffile.imwrite(path, data, **options)
    return path


# What a TIFF can be


@pytest.mark.parametrize("tile", [None, (16, 32)])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("bands", [1, 2, 3, 4, 7])
def test_tiff_layouts(tmp_path: Path, bands: int, dtype: str, tile: Any) -> None:
    image = pixels(bands, dtype)
    for planar in (False, True):
        for compression in (None, "zlib"):
            for order in "<>":
                options: dict[str, Any] = {"tile": tile, "compression": compression}
                if not tile:
                    options["rowsperstrip"] = 11
                path = write_tiff(tmp_path / "a.tif", image, planar, byteorder=order, **options)
                check(path, image)


@pytest.mark.parametrize("codec", ["lzw", "zlib", "zstd", "lzma", "packbits"])
@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "float32"])
def test_tiff_codecs(tmp_path: Path, codec: str, dtype: str) -> None:
    image = pixels(3, dtype)
    predictors = [1] if codec == "packbits" else [1, 3] if dtype == "float32" else [1, 2]
    for predictor in predictors:
        for tile in (None, (32, 32)):
            options: dict[str, Any] = {"compression": codec, "tile": tile, "predictor": predictor}
            check(write_tiff(tmp_path / "a.tif", image, rowsperstrip=None, **options), image)
            check(write_tiff(tmp_path / "b.tif", image, bigtiff=True, **options), image)


@pytest.mark.parametrize(
    "dtype", ["int8", "uint32", "int32", "uint64", "int64", "float16", "float64"]
)
def test_tiff_other_types(tmp_path: Path, dtype: str) -> None:
    image = pixels(2, dtype)
    for order in "<>":
        check(write_tiff(tmp_path / "a.tif", image, byteorder=order), image)
        check(write_tiff(tmp_path / "a.tif", image, byteorder=order, compression="zlib"), image)


@pytest.mark.parametrize("size", [(1, 1), (1, 93), (70, 1)])
def test_tiff_thin(tmp_path: Path, size: tuple[int, int]) -> None:
    image = pixels(3, "uint8", *size)
    check(write_tiff(tmp_path / "a.tif", image), image)
    check(write_tiff(tmp_path / "b.tif", image, compression="zlib", tile=(16, 16)), image)


def test_tiff_float_values_survive(tmp_path: Path) -> None:
    image = pixels(1, "float32")
    image[0, 3, 4], image[0, 5, 6], image[0, 7, 8] = np.nan, -np.inf, 1e-42
    for options in ({}, {"compression": "zlib", "predictor": 3, "tile": (16, 16)}):
        check(write_tiff(tmp_path / "a.tif", image, **options), image)


@pytest.mark.parametrize("space", ["ycbcr", "rgb", "minisblack"])
def test_tiff_jpeg(tmp_path: Path, space: str) -> None:
    image = pixels(1 if space == "minisblack" else 3, "uint8")
    for options in ({"tile": (32, 48)}, {"rowsperstrip": 16}):
        for subsampling in ((1, 1), (2, 2)) if space == "ycbcr" else ((1, 1),):
            path = write_tiff(
                *(tmp_path / "a.tif", image),
                **{"photometric": "rgb" if space != "minisblack" else space, **options},
                compression="jpeg",
                compressionargs={"level": 90},
                **({"subsampling": subsampling} if space == "ycbcr" else {}),
            )
            want = tifffile.imread(path)
            want = want[None] if want.ndim == 2 else np.moveaxis(want, -1, 0)
            assert np.abs(want.astype(int) - image).mean() < 8
            check(path, want)


@pytest.mark.parametrize("options", [{}, {"photometric": "ycbcr"}, {"interleave": "band"}])
def test_tiff_jpeg_of_gdal(tmp_path: Path, options: dict[str, str]) -> None:
    rasterio = pytest.importorskip("rasterio")
    path = tmp_path / "a.tif"
    for bands in (1, 3) if not options else (3,):
        image = pixels(bands, "uint8")
        form = {"tiled": True, "blockxsize": 32, "blockysize": 32, "compress": "jpeg", **options}
        size = {"height": HEIGHT, "width": WIDTH, "count": bands, "dtype": "uint8"}
        with rasterio.open(path, "w", driver="GTiff", **size, **form) as file:
            file.write(image)
        with rasterio.open(path) as file:
            want = file.read()
        with open_image(path) as source:
            got = source.read(0, 0, HEIGHT, WIDTH)
            # Two JPEG libraries may round colours by one.
            assert np.abs(got.astype(int) - want).max() <= (2 if options.get("photometric") else 0)


def test_tiff_palette_bilevel_inverted(tmp_path: Path) -> None:
    index = pixels(1, "uint8")[0]
    colours = np.random.default_rng(0).integers(0, 2**16, (3, 256)).astype(np.uint16)
    path = tmp_path / "palette.tif"
    tifffile.imwrite(path, index, photometric="palette", colormap=colours)
    check(path, (colours >> 8).astype(np.uint8)[:, index])

    bits = index > 60
    for codec in (None, "group4", "group3", "tiff_lzw"):
        pillow.fromarray(bits).save(tmp_path / "bits.tif", compression=codec)
        check(tmp_path / "bits.tif", bits[None] * np.uint8(255))

    for options in ({}, {"compression": "zlib"}):
        tifffile.imwrite(path, index, photometric="miniswhite", **options)
        check(path, 255 - index[None])


def test_tiff_bit_order(tmp_path: Path) -> None:
    image = pixels(1, "uint8")
    for options in ({}, {"compression": "lzw", "tile": (80, 96)}):
        tiff = Tiff(write_tiff(tmp_path / "a.tif", image, metadata=None, **options))
        struct.pack_into("<HHII", tiff.data, tiff.entry(296), 266, 3, 1, 2)
        start, count = (tiff.get_item(tag, 0) for tag in ((324, 325) if options else (273, 279)))
        stored = bytes(tiff.data[start : start + count])
        tiff.data[start : start + count] = imagecodecs.bitorder_decode(stored)
        tiff.path.write_bytes(tiff.data)
        check(tiff.path, image)


@pytest.mark.parametrize("sub_ifds", [True, False])
def test_pyramid(tmp_path: Path, sub_ifds: bool) -> None:
    image = pixels(3, "uint8", 141, 187)
    levels = [image, image[:, ::2, ::2], image[:, ::4, ::4]]
    thumbnail = pixels(3, "uint8", 40, 20)
    path = tmp_path / "a.tif"
    options: dict[str, Any] = {"photometric": "rgb", "compression": "zlib", "metadata": None}
    with tifffile.TiffWriter(path) as writer:
        for i, level in enumerate(levels):
            extra = {"subifds": 2} if sub_ifds and i == 0 else {"subfiletype": 1} if i else {}
            writer.write(np.moveaxis(level, 0, -1), tile=(32, 32), **options, **extra)
        writer.write(np.moveaxis(thumbnail, 0, -1), **options)
    with open_image(path) as source:
        assert source.level_sizes == ((141, 187), (71, 94), (36, 47))
        assert source.block == (32, 32)
        assert source.metadata["other_pages"] == 1
    for i, level in enumerate(levels):
        check(path, level, level=i)


def test_pyramid_without_marks_needs_tiles(tmp_path: Path) -> None:
    image = pixels(1, "uint8", 64, 64)[0]
    for tile, levels in (((16, 16), 2), (None, 1)):
        with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
            writer.write(image, tile=tile, metadata=None)
            writer.write(image[::2, ::2], tile=tile, metadata=None)
        with open_image(tmp_path / "a.tif") as source:
            assert len(source.level_sizes) == levels


def test_blocks(tmp_path: Path) -> None:
    image = pixels(3, "uint8")
    cases: list[tuple[dict[str, Any], tuple[int, int]]] = [
        ({}, (1, WIDTH)),
        ({"tile": (16, 32)}, (16, 32)),
        ({"compression": "zlib", "rowsperstrip": 9}, (9, WIDTH)),
    ]
    for options, block in cases:
        with open_image(write_tiff(tmp_path / "a.tif", image, **options)) as source:
            assert source.block == block


# Other files and arrays


@pytest.mark.parametrize(
    ("mode", "bands"),
    [("1", 1), ("L", 1), ("LA", 2), ("RGB", 3), ("RGBA", 4), ("P", 3), ("I;16", 1)],
)
def test_png(tmp_path: Path, mode: str, bands: int) -> None:
    if mode == "I;16":
        picture = pillow.fromarray(pixels(1, "uint16")[0] * 300)
    else:
        picture = pillow.fromarray(np.moveaxis(pixels(3, "uint8"), 0, -1)).convert(mode)
    picture.save(tmp_path / "a.png")
    shown = {"1": "L", "P": "RGB"}.get(mode)
    want = np.asarray(picture.convert(shown) if shown else picture)
    want = np.moveaxis(want.reshape(HEIGHT, WIDTH, -1), -1, 0)
    assert want.shape[0] == bands
    check(tmp_path / "a.png", want)


def test_png_of_16_bit_colour_keeps_its_bits(tmp_path: Path) -> None:
    for bands in (3, 4):
        image = pixels(bands, "uint16") * 301
        data = imagecodecs.png_encode(np.ascontiguousarray(np.moveaxis(image, 0, -1)))
        (tmp_path / "a.png").write_bytes(data)
        check(tmp_path / "a.png", image)


def test_jpeg_file(tmp_path: Path) -> None:
    picture = pillow.fromarray(np.moveaxis(pixels(3, "uint8"), 0, -1))
    for mode in ("RGB", "L", "CMYK"):
        path = tmp_path / "a.bin"  # found by content
        picture.convert(mode).save(path, format="JPEG")
        with pillow.open(path) as back:
            want = np.asarray(back.convert("RGB") if mode == "CMYK" else back)
        check(path, np.moveaxis(want.reshape(HEIGHT, WIDTH, -1), -1, 0))
    exif = pillow.Exif()
    exif[0x0112] = 6  # turn clockwise to see it upright
    picture.save(tmp_path / "a.jpg", exif=exif, quality=95)
    plain = np.asarray(pillow.open(tmp_path / "a.jpg"))
    check(tmp_path / "a.jpg", np.moveaxis(np.rot90(plain, -1), -1, 0))


def test_npy(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    for dtype in ("uint8", ">u2", "float32"):
        image = pixels(3, dtype)
        native = image.astype(np.dtype(dtype).newbyteorder("="))
        np.save(path, image)
        check(path, native)
        np.save(path, np.moveaxis(image, 0, -1).copy())
        check(path, native)
        np.save(path, image[0])
        check(path, native[:1])
    np.save(path, image[0] > 60)
    check(path, (image[:1] > 60) * np.uint8(255))
    np.save(path, np.asfortranarray(image[0]))
    with pytest.raises(SourceError, match="C order"):
        open_image(path)


def test_arrays_and_axes(tmp_path: Path) -> None:
    image = pixels(3, "float32")
    check(image, image)
    check(np.moveaxis(image, 0, -1), image)
    check(image[0], image[:1])
    check(image.astype(">f4"), image)
    check(image[:, :5, :5], image[:, :5, :5], axes="CHW")
    check(image[:, :5, :5], np.moveaxis(image[:, :5, :5], -1, 0), axes="HWC")
    check(image[:1] > 60, (image[:1] > 60) * np.uint8(255))
    for shape in ((3, 5, 3), (40, 40, 40)):
        with pytest.raises(SourceError, match=r"array: expected axes=.* does not tell the bands"):
            open_image(np.zeros(shape))
    with pytest.raises(SourceError, match="expected an array of 3 axes"):
        open_image(image[0], axes="CHW")
    with pytest.raises(SourceError, match="at least one row, column and band, found 0 x 9 px"):
        open_image(np.zeros((0, 9)))
    with pytest.raises(SourceError, match=r"expected a data type of .* found complex128"):
        open_image(np.zeros((20, 20), complex))
    source = open_image(image)
    assert open_image(source) is source
    source.read(0, 0, 5, 5)[:] = 0  # what a caller does with a window stays with the caller
    np.testing.assert_array_equal(source.read(0, 0, 5, 5), image[:, :5, :5])


def test_torch_tensors() -> None:
    torch = pytest.importorskip("torch")
    image = pixels(3, "uint8", 5, 5)
    check(torch.from_numpy(image), image)
    with pytest.raises(SourceError, match=r"found torch\.bfloat16"):
        open_image(torch.zeros(3, 5, 5, dtype=torch.bfloat16))
    with pytest.raises(SourceError, match="expected a tensor on the CPU, found meta"):
        open_image(torch.zeros(3, 5, 5, device="meta"))


def test_zarr(tmp_path: Path) -> None:
    image = pixels(3, "uint16")
    for version in (2, 3):
        path = tmp_path / f"a{version}.zarr"
        options: dict[str, Any] = {"shape": image.shape, "chunks": (1, 16, 32), "dtype": "uint16"}
        array = zarr.create_array(path, zarr_format=version, **options)
        array[:] = image
        check(path, image)
        check(zarr.open(path), image)
        with open_image(path) as source:
            assert source.block == (16, 32)
    group = zarr.create_group(tmp_path / "ome.zarr", zarr_format=2)
    for i, part in enumerate((image, image[:, ::2, ::2])):
        group.create_array(str(i), data=part[None, :, None], chunks=(1, 1, 1, 16, 16))
    with pytest.raises(
        SourceError, match="a zarr array or a group with multiscales, found a group"
    ):
        open_image(tmp_path / "ome.zarr")
    group.attrs["multiscales"] = [{"datasets": [{"path": "0"}, {"path": "1"}]}]
    check(tmp_path / "ome.zarr", image)
    check(tmp_path / "ome.zarr", image[:, ::2, ::2], level=1)


def test_rasterio(tmp_path: Path) -> None:
    rasterio = pytest.importorskip("rasterio")
    path = tmp_path / "a.tif"
    image = pixels(3, "float32")
    transform = rasterio.Affine(10.0, 0.5, 4e5, 0.25, -10.0, 5e6)
    size = {"height": HEIGHT, "width": WIDTH, "count": 3, "dtype": "float32"}
    place: dict[str, Any] = {"crs": "EPSG:32633", "transform": transform, "nodata": -9999}
    form = {"tiled": True, "blockxsize": 32, "blockysize": 16, "compress": "deflate"}
    with rasterio.open(path, "w", driver="GTiff", **size, **place, **form) as file:
        file.write(image)
        file.build_overviews([2], rasterio.enums.Resampling.nearest)
    check(path, image, backend="rasterio")
    with open_image(path) as plain, open_image(path, backend="rasterio") as source:
        # One georeference, whoever reads it.
        for key in ("crs", "transform", "nodata"):
            assert plain.metadata[key] == source.metadata[key]
        assert source.metadata["crs"] == "EPSG:32633"
        assert source.metadata["transform"] == list(transform[:6])
        assert source.level_sizes == plain.level_sizes == ((70, 93), (35, 47))
        window = (3, 5, 20, 30, 1)
        np.testing.assert_array_equal(source.read(*window), plain.read(*window))


@pytest.mark.parametrize("point", [False, True])
def test_geotiff_tags(tmp_path: Path, point: bool) -> None:
    rasterio = pytest.importorskip("rasterio")
    path = tmp_path / "a.tif"
    size = {"height": 8, "width": 9, "count": 1, "dtype": "uint8"}
    transform = rasterio.Affine(0.5, 0, 12.0, 0, -0.25, 48.0)
    own = "+proj=laea +lat_0=10 +lon_0=20 +datum=WGS84 +units=m"
    for crs in ("EPSG:4326", "EPSG:3857", own):
        with rasterio.open(path, "w", driver="GTiff", crs=crs, transform=transform, **size) as file:
            file.write(np.ones((1, 8, 9), np.uint8))
            if point:
                file.update_tags(AREA_OR_POINT="Point")
        with open_image(path) as source, rasterio.open(path) as want:
            assert source.metadata["transform"] == list(want.transform[:6])
            assert rasterio.crs.CRS.from_string(source.metadata["crs"]) == want.crs


def test_world_file(tmp_path: Path) -> None:
    write_tiff(tmp_path / "a.tif", pixels(1, "uint8"))
    (tmp_path / "a.tfw").write_text("2\n0\n0\n-2\n101\n199\n")
    with open_image(tmp_path / "a.tif") as source:
        assert source.metadata["transform"] == [2, 0, 100, 0, -2, 200]
    (tmp_path / "a.tfw").write_text("hello")
    with pytest.raises(SourceError, match="expected six numbers"):
        open_image(tmp_path / "a.tif")


def test_microns_per_pixel(tmp_path: Path) -> None:
    image = pixels(1, "uint8")
    path = tmp_path / "a.ome.tif"
    sizes = {"PhysicalSizeX": 0.5, "PhysicalSizeY": 250, "PhysicalSizeYUnit": "nm"}
    tifffile.imwrite(path, image[0], metadata={"axes": "YX", **sizes})
    cases: list[tuple[dict[str, Any], Any]] = [
        ({"resolution": (20000, 40000), "resolutionunit": "centimeter"}, [0.25, 0.5]),
        ({"resolution": (72, 72), "resolutionunit": "inch"}, None),
        ({"description": "Aperio Image Library |AppMag = 20|MPP = 0.499"}, [0.499, 0.499]),
        ({"description": "Aperio Image Library |MPP = 0.4.9"}, None),
    ]
    with open_image(path) as source:
        assert source.metadata["mpp"] == [0.25, 0.5]
    for options, mpp in cases:
        with open_image(write_tiff(path, image, metadata=None, **options)) as source:
            assert source.metadata.get("mpp") == mpp


def test_openslide(tmp_path: Path) -> None:
    pytest.importorskip("openslide")
    image = pixels(3, "uint8", 300, 400)
    path = tmp_path / "a.tif"
    data = np.moveaxis(image, 0, -1)
    with tifffile.TiffWriter(path) as writer:
        for i in (1, 2):
            options: dict[str, Any] = {"subfiletype": 1} if i > 1 else {}
            writer.write(data[::i, ::i], tile=(64, 64), photometric="rgb", metadata=None, **options)
    check(path, image, backend="openslide")
    with open_image(path, backend="openslide") as source:
        assert source.level_sizes == ((300, 400), (150, 200))
        assert source.block == (64, 64)
        np.testing.assert_array_equal(source.read(10, 20, 30, 40, 1), image[:, 20:80:2, 40:120:2])
        assert pickle.loads(pickle.dumps(source)).level_sizes == source.level_sizes


def test_optional_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rasterio", None)
    monkeypatch.setitem(sys.modules, "openslide", None)
    for suffix, extra in ((".jp2", "geo"), (".mrxs", "wsi")):
        path = tmp_path / f"a{suffix}"
        path.write_bytes(b"something")
        with pytest.raises(SourceError, match=rf"pip install 'xt-kernels\[{extra}\]'"):
            open_image(path)


# How a source behaves


@pytest.fixture(scope="module")
def tiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    image = pixels(3, "uint8", 410, 530)
    path = tmp_path_factory.mktemp("tiled") / "a.tif"
    return write_tiff(path, image, tile=(64, 64), compression="zlib"), image


def test_windows_outside_are_refused(tiled: tuple[Path, np.ndarray]) -> None:
    with open_image(tiled[0]) as source:
        cases = [
            ((-1, 0, 5, 5), "top must be >= 0"),
            ((0, 0, 0, 5), "height >= 1"),
            ((0, 0, 5, -5), "width >= 1"),
            ((406, 0, 5, 5), r"top \+ height <= 410 for level 0 of .*, got top 406, height 5"),
            ((0, 530, 5, 1), r"left \+ width <= 530"),
            ((0, 0, 5, 5, 1), r"level must be in 0\.\.0"),
            ((0, 0, 5, 5, -1), r"level must be in 0\.\.0"),
        ]
        for window, message in cases:
            with pytest.raises(ValueError, match=message) as caught:
                source.read(*window)
            assert not isinstance(caught.value, SourceError)
    source.close()
    with pytest.raises(SourceError, match="closed"):
        source.read(0, 0, 1, 1)


@pytest.mark.parametrize("backend", ["tiff", "rasterio", "rows", "npy", "png", "zarr"])
def test_threads_agree(tiled: tuple[Path, np.ndarray], tmp_path: Path, backend: str) -> None:
    path, image = tiled
    if backend == "rasterio":
        pytest.importorskip("rasterio")
    elif backend == "rows":
        path = write_tiff(tmp_path / "a.tif", image, rowsperstrip=13)
    elif backend == "npy":
        np.save(path := tmp_path / "a.npy", image)
    elif backend == "png":
        pillow.fromarray(np.moveaxis(image, 0, -1)).save(path := tmp_path / "a.png")
    elif backend == "zarr":
        array = zarr.create_array(
            path := tmp_path / "z", shape=image.shape, chunks=(3, 64, 64), dtype="u1"
        )
        array[:] = image
    rng = random.Random(3)
    windows = []
    for _ in range(64 if backend == "zarr" else 160):
        top, left = rng.randrange(400), rng.randrange(520)
        windows.append((top, left, rng.randint(1, 410 - top), rng.randint(1, 530 - left)))
    with (
        open_image(path, backend=backend if backend == "rasterio" else None) as source,
        ThreadPoolExecutor(8) as pool,
    ):
        for (top, left, rows, columns), got in zip(
            windows, pool.map(lambda window: source.read(*window), windows), strict=True
        ):
            want = image[:, top : top + rows, left : left + columns]
            np.testing.assert_array_equal(got, want)


def test_pickling(tiled: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    path, image = tiled
    np.save(tmp_path / "a.npy", image)
    whole_map = np.load(tmp_path / "a.npy", mmap_mode="r")
    images: list[tuple[Any, np.ndarray]] = [
        (path, image),
        (tmp_path / "a.npy", image),
        (whole_map, image),
        (whole_map[:, 5:], image[:, 5:]),
        (image, image),
    ]
    for item, want in images:
        with open_image(item) as source:
            data = pickle.dumps(source)
            assert (len(data) < 1000) == (item is path or item is whole_map or item is images[1][0])
            copy = pickle.loads(data)
            np.testing.assert_array_equal(copy.read(3, 5, 50, 60), want[:, 3:53, 5:65])
            copy.close()


def test_forked_children_read(tiled: tuple[Path, np.ndarray]) -> None:
    code = (
        "import multiprocessing as m, sys; from xt_models.source import open_image\n"
        "source = open_image(sys.argv[1]); first = source.read(0, 0, 400, 500)\n"
        "with m.get_context('fork').Pool(2) as pool:\n"
        "    parts = pool.starmap(source.read, [(0, 0, 400, 500)] * 4)\n"
        "print(all((part == first).all() for part in parts))\n"
    )
    command = [sys.executable, "-W", "error", "-c", code, str(tiled[0])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout == "True\n", done.stderr


def test_descriptors_do_not_leak(tiled: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    bad = tmp_path / "bad.tif"
    bad.write_bytes(tiled[0].read_bytes()[:50_000])
    pillow.fromarray(tiled[1][0]).save(tmp_path / "a.png")
    before = len(os.listdir("/proc/self/fd"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(200):
            with open_image(tiled[0]) as source:
                source.read(0, 0, 10, 10)
            open_image(tiled[0])  # dropped, not closed
            with open_image(tmp_path / "a.png") as source:
                source.read(0, 0, 1, 1)
            with pytest.raises(SourceError):
                open_image(bad)
    assert len(os.listdir("/proc/self/fd")) <= before


def test_a_file_that_changes_is_noticed(tiled: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    path.write_bytes(tiled[0].read_bytes())
    with open_image(path) as source:
        source.read(0, 0, 10, 10)
        os.truncate(path, 1000)
        with pytest.raises(SourceError, match="changed while it was open"):
            source.read(300, 300, 50, 50)
    np.save(tmp_path / "a.npy", tiled[1])
    with open_image(tmp_path / "a.npy") as source:
        (tmp_path / "a.npy").unlink()  # the open file lives on
        source.read(0, 0, 10, 10)


def test_rows_may_arrive_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As one call does beyond 2 GiB.
    image = pixels(3, "uint16")
    np.save(tmp_path / "a.npy", image)
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: whole(fd, [views[0][:1000]], at))
    with open_image(tmp_path / "a.npy") as source:
        np.testing.assert_array_equal(source.read(0, 0, HEIGHT, WIDTH), image)
        np.testing.assert_array_equal(source.read(2, 3, 60, 80), image[:, 2:62, 3:83])
        assert source.bytes_read == image.nbytes + 3 * 60 * 80 * 2


def test_importing_is_light() -> None:
    code = "import sys, xt_models.source; print([m for m in sys.modules if m in %r])"
    heavy = ["tifffile", "zarr", "imagecodecs", "PIL", "rasterio", "openslide"]
    command = [sys.executable, "-c", code % heavy]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n", done.stderr


def test_a_window_costs_a_window(tmp_path: Path) -> None:
    side = 8192
    path = tmp_path / "a.tif"
    row = np.arange(side, dtype=np.uint8)
    strip = np.repeat(row[None, :, None], 3, axis=2)

    def tiles() -> Any:
        for i in range((side // 256) ** 2):
            yield np.broadcast_to(strip[:, i % 32 * 256 : i % 32 * 256 + 256], (256, 256, 3)).copy()

    options: dict[str, Any] = {"photometric": "rgb", "compression": "zlib", "tile": (256, 256)}
    tifffile.imwrite(path, tiles(), shape=(side, side, 3), dtype=np.uint8, **options)
    whole = side * side * 3
    with open_image(path) as source:
        source.read(0, 0, 16, 16)
        tracemalloc.start()
        for top in range(0, 2048, 512):
            got = source.read(top, 3900, 500, 500)
            np.testing.assert_array_equal(got[1, 7], row[3900:4400])
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 16 << 20 < whole
        assert source.bytes_read < os.path.getsize(path) / 8
    np.save(tmp_path / "a.npy", np.broadcast_to(strip, (2048, side, 3)))
    with open_image(tmp_path / "a.npy") as source:
        source.read(1000, 4000, 256, 256)
        assert source.bytes_read == 256 * 256 * 3


def test_the_tile_cache_is_bounded(tiled: tuple[Path, np.ndarray], monkeypatch: Any) -> None:
    path, image = tiled
    monkeypatch.setattr("xt_models.source.tiff.CACHE_BYTES", 10 * 64 * 64 * 3)
    with open_image(path) as source:
        for _ in range(2):
            for top in range(0, 384, 32):
                for left in range(0, 512, 32):
                    got = source.read(top, left, 32, 32)
                    want = image[:, top : top + 32, left : left + 32]
                    np.testing.assert_array_equal(got, want)
        cache = source._cache
        held = sum(tile.result().nbytes for tile in cache._tiles.values())
        assert held == cache._bytes <= 10 * 64 * 64 * 3


# Files that are bad


class Tiff:
    """The bytes of a little-endian classic TIFF, with its tags at hand."""

    def __init__(self, path: Path) -> None:
        self.path, self.data = path, bytearray(path.read_bytes())
        self.start = struct.unpack_from("<I", self.data, 4)[0]
        self.count = struct.unpack_from("<H", self.data, self.start)[0]
        self.next_at = self.start + 2 + 12 * self.count

    def entry(self, tag: int) -> int:
        """Byte offset of a tag's entry in the first directory."""
        for i in range(self.count):
            at = self.start + 2 + 12 * i
            if struct.unpack_from("<H", self.data, at)[0] == tag:
                return at
        raise KeyError(tag)

    def set(self, tag: int, value: int, count: int | None = None) -> Tiff:
        at = self.entry(tag)
        if count is not None:
            struct.pack_into("<I", self.data, at + 4, count)
        kind = struct.unpack_from("<H", self.data, at + 2)[0]
        struct.pack_into("<H" if kind == 3 else "<I", self.data, at + 8, value)
        return self

    def item(self, tag: int, index: int) -> tuple[int, str]:
        """Byte offset and struct format of one value of a tag with many."""
        kind, count, where = struct.unpack_from("<HII", self.data, self.entry(tag) + 2)
        size, form = (2, "<H") if kind == 3 else (4, "<I")
        where = self.entry(tag) + 8 if count * size <= 4 else where
        return where + size * index, form

    def set_item(self, tag: int, index: int, value: int) -> Tiff:
        at, form = self.item(tag, index)
        struct.pack_into(form, self.data, at, value)
        return self

    def get_item(self, tag: int, index: int) -> int:
        at, form = self.item(tag, index)
        return int(struct.unpack_from(form, self.data, at)[0])

    def refused(self, message: str, read: bool = False) -> None:
        self.path.write_bytes(self.data)
        with pytest.raises(SourceError, match=message) as caught:
            source = open_image(self.path)
            if read:
                source.read(0, 0, source.height, source.width)
        text = str(caught.value)
        assert text.startswith(str(self.path)) and text.endswith(".") and "\n" not in text


@pytest.fixture
def tiff(tmp_path: Path) -> Tiff:
    """70 x 93, RGB, 15 deflate tiles of 16 x 32."""
    path = write_tiff(tmp_path / "a.tif", pixels(3, "uint8"), tile=(16, 32), compression="zlib")
    return Tiff(path)


def test_not_an_image(tmp_path: Path) -> None:
    def refuse(path: Path, message: str) -> None:
        with pytest.raises(SourceError, match=message) as caught:
            open_image(path)
        assert str(caught.value).startswith(str(path))

    refuse(tmp_path / "none.tif", "found No such file or directory")
    refuse(tmp_path, "a zarr folder, found a folder without zarr metadata")
    os.mkfifo(tmp_path / "pipe.tif")
    refuse(tmp_path / "pipe.tif", "expected a regular file")
    path = tmp_path / "a.tif"
    cases = [
        (b"", r"found an empty file \(0 bytes\)"),
        (b"hello, I am text", "expected TIFF, PNG, .* found a file that starts with b'hello"),
        (b"II*\0", "a whole TIFF header"),
        (b"II*\0\0\0\0\0", "at least one page"),
        (b"II+\0\x04\0\0\0" + bytes(8), "a whole TIFF header"),
        (b"II*\0\xff\xff\0\0", "directory of at most 4096 tags at byte 65,535, found the end"),
        (b"\x89PNG\r\n\x1a\n", "expected a file for pillow"),
        (b"\xff\xd8\xff\xe0", "expected a file for pillow"),
        (b"\x93NUMPY\x01\x00\xff\xff", "expected a file for npy"),
    ]
    for content, message in cases:
        path.write_bytes(content)
        refuse(path, message)
    (tmp_path / "a.vrt").write_text("<VRTDataset>")
    refuse(tmp_path / "a.vrt", 'backend="rasterio" to follow')
    if os.getuid():
        path.chmod(0)
        refuse(path, "Permission denied")
    with pytest.raises(SourceError, match="expected a backend of tiff, pillow"):
        open_image(path, backend="magic")
    with pytest.raises(SourceError, match="a path, an array, a zarr array or a CPU tensor"):
        open_image([[1, 2], [3, 4]])


def test_header_against_file(tiff: Tiff) -> None:
    original = bytes(tiff.data)
    size = len(original)
    cases: list[tuple[Any, str]] = [
        (lambda t: t.set(256, 0), "at least one row, column and band, found 70 x 0 px"),
        (lambda t: t.set(257, 7000), "expected 1,314 tile offsets in level 0 .* found 15"),
        (lambda t: t.set(324, 0, count=14), "expected 15 tile offsets .* found 14"),
        (lambda t: t.set(325, 0, count=16), "expected 15 tile counts .* found 16"),
        (lambda t: t.set(324, size), "tile_offsets of the page .* inside the file, found an end"),
        (lambda t: t.set_item(324, 7, size - 3), f"tile 7 of level 0 inside the {size:,} bytes"),
        (lambda t: t.set_item(325, 7, size), f"tile 7 of level 0 inside the {size:,} bytes"),
        (lambda t: t.set_item(325, 7, 0), "tile 7 of level 0, found 0 bytes"),
        (lambda t: t.set_item(325, 7, 0).set_item(324, 7, 0), "tile 7 .* nodata value"),
        (lambda t: t.set(259, 1), "expected 1,536 to .* bytes of none .* tile 0"),
        (lambda t: t.set(259, 12345), "TIFF compression of .* found number 12345"),
        (lambda t: t.set(262, 5), "found CMYK; convert it to RGB"),
        (lambda t: t.set(262, 32803), "found a sensor mosaic"),
        (lambda t: t.set(262, 6), "YCbCr of 3 interleaved bands in JPEG"),
        (lambda t: t.set(277, 0), "at least one row, column and band"),
        (lambda t: t.set(322, 0), "tiles or strips of some pixels, found 16 x 0"),
        (lambda t: t.set_item(258, 1, 16), "one integer as bits"),
    ]
    for change, message in cases:
        tiff.data[:] = original
        change(tiff).refused(message)


def test_sample_types_that_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, np.zeros((8, 8), np.complex64))
    Tiff(path).refused(r"found 64 bits of sample format 6 \(complex\)")
    packed = imagecodecs.packints_encode(np.zeros((8, 8), np.uint16), 12)
    tifffile.imwrite(path, np.frombuffer(packed, np.uint8).reshape(8, 12))
    Tiff(path).set(258, 12).set(256, 8).refused("found 12 bits of sample format 1")


def test_chains_of_pages(tiff: Tiff) -> None:
    original = bytes(tiff.data)
    struct.pack_into("<I", tiff.data, tiff.next_at, tiff.start)
    tiff.refused("a chain of at most 2,000 pages, found a loop")
    tiff.data[:] = original
    struct.pack_into("<I", tiff.data, tiff.next_at, len(original) + 5)
    tiff.refused("a page directory .* found the end of the file")
    tiff.data[:] = original
    struct.pack_into("<H", tiff.data, tiff.start, 60_000)
    tiff.refused("at most 4096 tags .* found 60,000 tags")


def test_stacks_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, np.zeros((5, 70, 93), np.uint8), photometric="minisblack")
    Tiff(path).refused("found a stack")


def test_references_to_other_files_are_refused(tmp_path: Path) -> None:
    files = "".join(f'<UUID FileName="{name}.tif">urn:x</UUID>' for name in "ab")
    path = tmp_path / "a.tif"
    write_tiff(path, pixels(1, "uint8"), metadata=None, description=f"<OME>{files}</OME>")
    Tiff(path).refused("an OME-TIFF that is complete in itself, found references to 2 files")


def test_sparse_tiles_read_as_nodata(tiff: Tiff, tmp_path: Path) -> None:
    image = pixels(3, "uint8")
    options: dict[str, Any] = {"tile": (16, 32), "compression": "zlib"}
    tag = [(42113, 2, 0, "7", True)]
    sparse = Tiff(write_tiff(tmp_path / "b.tif", image, extratags=tag, **options))
    sparse.set_item(324, 4, 0).set_item(325, 4, 0)
    sparse.path.write_bytes(sparse.data)
    image[:, 16:32, 32:64] = 7
    check(sparse.path, image)


@pytest.mark.parametrize("codec", ["zlib", "lzw", "zstd", "jpeg"])
def test_a_damaged_tile_raises(tmp_path: Path, codec: str) -> None:
    image = pixels(3, "uint8", 96, 96)
    path = write_tiff(tmp_path / "a.tif", image, tile=(32, 32), compression=codec)
    bad = Tiff(path)
    offset, count = bad.get_item(324, 4), bad.get_item(325, 4)
    middle = range(offset + count // 2, offset + count)
    bad.data[middle.start : middle.stop] = bytes(len(middle))
    message = rf"tile 4 \(row 1, column 1\) of level 0 in {count:,} bytes at byte {offset:,}"
    bad.refused(message, read=True)
    with open_image(path) as source:
        source.read(0, 0, 96, 32)  # the others are fine
        for _ in range(2):
            with pytest.raises(SourceError, match="damaged data"):
                source.read(40, 40, 5, 5)


def test_a_jpeg_tile_that_claims_more(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "a.tif", pixels(3, "uint8"), tile=(32, 32), compression="jpeg")
    bad = Tiff(path)
    frame = bad.data.index(b"\xff\xc0", bad.get_item(324, 0))
    struct.pack_into(">HH", bad.data, frame + 5, 65_000, 65_000)
    bad.refused("JPEG of 65000 x 65000 px instead of 32 x 32", read=True)


def bomb_tiff(size: int, tile: int, count: int, compression: int, held: int) -> bytes:
    """A BigTIFF of size x size px, whose tags claim `count` tiles of which `held` have entries."""
    tags = [(256, 4, 1, size), (257, 4, 1, size), (258, 3, 1, 8), (259, 3, 1, compression)]
    tags += [(262, 3, 1, 1), (277, 3, 1, 1), (322, 4, 1, tile), (323, 4, 1, tile)]
    start = 16 + 8 + 20 * 10 + 8
    tags += [(324, 16, count, start), (325, 16, count, start + 8 * held)]
    body = b"".join(struct.pack("<HHQQ", *tag) for tag in tags)
    head = b"II+\0" + struct.pack("<HHQQ", 8, 0, 16, len(tags)) + body + bytes(8)
    offset = start + 16 * held
    return head + struct.pack("<Q", offset) * held + struct.pack("<Q", 100) * held + bytes(4000)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (bomb_tiff(1 << 20, 16, 1 << 32, 8, 25), "tiles, found|at most 2,097,152 tiles"),
        (bomb_tiff(92_000, 16, 5750**2, 8, 25), "at most 2,097,152 tiles"),
        (bomb_tiff(16_000, 16, 1_000_000, 8, 25), "tile_offsets .* inside the file"),
        (bomb_tiff(1 << 17, 1 << 14, 64, 8, 64), "268,435,456 bytes of pixels in tile 0"),
        (bomb_tiff(1 << 17, 1 << 14, 64, 50000, 64), "268,435,456 bytes of pixels in tile 0"),
        (bomb_tiff(1 << 17, 1 << 15, 16, 50000, 16), "at most 536,870,912 decoded bytes"),
        (bomb_tiff(1 << 17, 1 << 14, 64, 1, 64), "268,435,456 to .* bytes of none"),
    ],
)
def test_bombs_are_refused_at_once(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bomb.tif"
    path.write_bytes(content)
    tracemalloc.start()
    began = time.process_time()
    with pytest.raises(SourceError, match=message):
        open_image(path)
    took, peak = time.process_time() - began, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert took < 1 and peak < 100 << 20


def test_a_long_true_header_is_cheap(tmp_path: Path) -> None:
    path = tmp_path / "many.tif"
    side = 1448  # 2,096,704 tiles, all of them listed: 32 MiB of header
    path.write_bytes(bomb_tiff(side * 16, 16, side**2, 8, side**2))
    tracemalloc.start()
    began = time.process_time()
    with open_image(path) as source:
        assert source.height == side * 16
    took, peak = time.process_time() - began, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert took < 1 and peak < 100 << 20


def test_many_pages_end_soon(tmp_path: Path) -> None:
    path = tmp_path / "pages.tif"
    with tifffile.TiffWriter(path) as writer:
        writer.write(np.zeros((64, 64), np.uint8), metadata=None)
    data = bytearray(path.read_bytes())
    first = Tiff(path)
    entries = bytes(data[first.start : first.next_at])
    for i in range(3000):  # each of its own size, so no stack
        at = len(data)
        struct.pack_into("<I", data, first.next_at if not i else at - 4, at)
        data += entries + bytes(4)
        struct.pack_into("<H", data, at + 2 + first.entry(256) - first.start - 2 + 8, 1 + i % 60)
    path.write_bytes(data)
    began = time.process_time()
    with pytest.raises(SourceError, match="at most 2,000 pages, found one more"):
        open_image(path)
    assert time.process_time() - began < 1


def test_picture_bombs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    pillow.fromarray(pixels(1, "uint8")[0]).save(path)
    data = bytearray(path.read_bytes())

    def claim(side: int) -> None:
        struct.pack_into(">II", data, 16, side, side)
        struct.pack_into(">I", data, 29, __import__("zlib").crc32(data[12:29]))
        path.write_bytes(data)

    claim(40_000)
    with pytest.raises(SourceError, match=r"at most 1,000,000,000 px .* tiled TIFF"):
        open_image(path)
    claim(20_000)  # above Pillow's own limit, below ours, above what the bytes can hold
    with pytest.raises(SourceError, match="found a claim of 20,000 x 20,000"):
        open_image(path)
    claim(400)
    with open_image(path) as source, pytest.raises(SourceError, match="found"):
        source.read(0, 0, 1, 1)
    pillow.fromarray(pixels(3, "uint8")[0]).save(tmp_path / "a.jpg")
    cut = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(cut[: len(cut) // 2])
    with open_image(tmp_path / "a.jpg") as source, pytest.raises(SourceError, match="truncated"):
        source.read(0, 0, 1, 1)


def test_npy_that_claims_more(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    np.save(path, pixels(3, "uint8"))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(SourceError, match=r"expected 19,530 bytes of .* found 19,529 bytes"):
        open_image(path)
    np.save(path, np.array([{"a": 1}] * 4).reshape(2, 2))
    with pytest.raises(SourceError, match="expected a data type of"):
        open_image(path)


def test_zarr_that_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "a.zarr"
    options: dict[str, Any] = {"chunks": (32, 32), "zarr_format": 2}
    zarr.create_array(path, data=pixels(1, "uint8")[0], **options)
    (path / "1.1").write_bytes(b"rubbish")
    with open_image(path) as source, pytest.raises(SourceError, match="expected a window of 9 x 9"):
        source.read(40, 40, 9, 9)
    meta = json.loads((path / ".zarray").read_text())
    meta["shape"] = meta["chunks"] = [1 << 20, 1 << 20]
    (path / ".zarray").write_text(json.dumps(meta))
    with pytest.raises(SourceError, match="chunks of at most"):
        open_image(path)
    (path / ".zarray").write_text("{")
    with pytest.raises(SourceError, match="expected a file for zarr"):
        open_image(path)


def read_all(source: ImageSource) -> None:
    for level, (height, width) in enumerate(source.level_sizes):
        for top in range(0, height, 512):
            rows = min(512, height - top)
            source.read(top, 0, rows, min(width, 4096), level)
            if top > 4096:
                break


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["zlib", "lzw", "jpeg", "none", "png", "npy"])
def test_random_damage_reads_or_says_so(tmp_path: Path, kind: str) -> None:
    rng = random.Random(kind)
    image = pixels(3, "uint8")
    path = tmp_path / "a.bin"
    if kind == "png":
        pillow.fromarray(np.moveaxis(image, 0, -1)).save(path, format="PNG")
    elif kind == "npy":
        with open(path, "wb") as stream:
            np.save(stream, image)
    else:
        options: dict[str, Any] = {"tile": (16, 32)} if kind != "none" else {"rowsperstrip": 7}
        codec = None if kind == "none" else kind
        with tifffile.TiffWriter(path) as writer:
            for step in (1, 2):
                data = np.moveaxis(image[:, ::step, ::step], 0, -1)
                writer.write(
                    data, photometric="rgb", compression=codec, subfiletype=step - 1, **options
                )
    good = path.read_bytes()
    refused = 0
    tracemalloc.start()
    for i in range(60):
        data = bytearray(good)
        if i % 4 == 0:
            del data[rng.randrange(len(data)) :]
        else:
            for _ in range(rng.choice((1, 1, 3, 10))):
                data[rng.randrange(len(data) if i % 2 else min(600, len(data)))] = rng.randrange(
                    256
                )
        path.write_bytes(data)
        began = time.process_time()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with open_image(path) as source:
                    read_all(source)
        except SourceError as error:
            refused += 1
            assert str(path) in str(error) and "\n" not in str(error)
        assert time.process_time() - began < 3
    assert tracemalloc.get_traced_memory()[1] < 200 << 20
    tracemalloc.stop()
    assert refused > 10


def test_threads_that_meet_a_bad_tile_all_hear_of_it(tmp_path: Path) -> None:
    image = pixels(1, "uint8", 64, 64)
    bad = Tiff(write_tiff(tmp_path / "a.tif", image, tile=(64, 64), compression="zlib"))
    bad.data[bad.get_item(324, 0)] ^= 255
    bad.path.write_bytes(bad.data)
    heard = []
    with open_image(bad.path) as source:

        def read() -> None:
            try:
                source.read(1, 1, 5, 5)
            except SourceError:
                heard.append(1)

        threads = [threading.Thread(target=read) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
    assert len(heard) == 8
