"""Heads over a stream: the same prediction as in memory, in files that others can read."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import rasterio
import tifffile
import torch
import zarr
from click.testing import CliRunner

import xt_models as xm
from xt_kernels.regions import RegionGrid
from xt_models import planning
from xt_models.cli import main
from xt_models.group_walk import GroupWalk
from xt_models.journal import verify
from xt_models.predictions import read_points, write_tiff

pytestmark = pytest.mark.filterwarnings("ignore::xt_models.registry.RandomWeightsWarning")
SMALL = {"region": 64, "dim": 32, "depth": 2, "num_heads": 2, "chunk_regions": 3, "residual": False}
HEADS = {
    "ground": {"kind": "dense", "classes": 4, "output_stride": 2},
    "ships": {"kind": "dense", "classes": 2, "loss": "bce", "output_stride": 8},
    "fields": {"kind": "segmentation", "classes": 3, "decoder_channels": [8, 8, 8, 8, 8]},
    "roads": {"kind": "segmentation", "classes": 2, "decoder_channels": [8, 8], "group": 2,
              "loss": "focal", "output_stride": 8},
    "boxes": {"kind": "fcos", "classes": 3, "dim": 32, "group": 2, "score_threshold": 0.0},
    "vessels": {"kind": "xview3", "decoder_channels": [8, 8, 8], "output_stride": 4,
                "threshold": 0.0},
    "tags": {"kind": "classification", "classes": 5, "multi_label": True},
}  # fmt: skip


def small(heads=HEADS, context="xl", **kwargs):
    model = xm.create_model("convnext_atto", context=context, heads=heads, **SMALL | kwargs)
    if "boxes" in heads:  # as initialised all scores are nearly equal, and rounding would rank them
        head, generator = model.heads["boxes"].fcos.head, torch.Generator().manual_seed(0)
        torch.nn.init.normal_(head.classification_head.cls_logits.weight, 0, 0.5, generator)
        torch.nn.init.normal_(head.regression_head.bbox_reg.weight, 0, 0.5, generator)
    return model


def scene(height=200, width=330, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def in_memory(model, pixels):
    with torch.inference_mode():
        out = model(torch.from_numpy(pixels).permute(2, 0, 1))
        return out, {n: head.predict(out.heads[n])[0] for n, head in model.heads.items()}


def test_a_model_of_maps_alone_streams_without_a_folder():
    model = small({"ground": HEADS["ground"]})
    result, plain = xm.stream(model, scene()), xm.stream(model, scene(), heads=False)
    assert result.heads == {}
    np.testing.assert_array_equal(result.embedding, plain.embedding)


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_a_map_that_gdal_wrote_in_part_is_refused(share, tmp_path, monkeypatch):
    """GDAL reports some writes that fail, and not others."""
    import rasterio.shutil

    heads = {"land": {"kind": "dense", "classes": 3}}
    xm.stream(small(heads), scene(600, 600), tmp_path / "whole", tokens=False)
    expected = (tmp_path / "whole" / "land.tif").read_bytes()
    real = rasterio.shutil.copy

    def full(plain, path, **options):
        real(plain, path, **options)
        os.truncate(path, int(share * len(expected)))

    monkeypatch.setattr(rasterio.shutil, "copy", full)
    with pytest.raises(OSError, match="wrote it in part: is the disk full"):
        xm.stream(small(heads), scene(600, 600), tmp_path / "out", tokens=False)
    monkeypatch.undo()
    assert not (tmp_path / "out").exists()
    xm.stream(small(heads), scene(600, 600), tmp_path / "out", tokens=False)
    assert (tmp_path / "out" / "land.tif").read_bytes() == expected


def bands_last(folder, name):
    data = torch.from_numpy(tifffile.imread(folder / f"{name}.tif"))
    return data[..., None] if data.dim() == 2 else data


def close(a, b, scale=1.0):
    torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=1e-4, atol=1e-5 * scale)


def check_same(model, pixels, folder, heads):
    """Files and arrays against the model in memory. Classes may differ where logits are tied to
    rounding."""
    out, expected = in_memory(model, pixels)
    for name in ("ships", "roads", "vessels"):
        close(bands_last(folder, name), expected[name].permute(1, 2, 0), scale=10)
    check_points(model.heads["vessels"].points(expected["vessels"]), heads["vessels"])
    for name, logits in ((n, out.heads[n][0]) for n in ("ground", "fields")):
        ours = bands_last(folder, name)[..., 0].long()
        assert ours.shape == logits.shape[1:]
        chosen = logits.gather(0, ours[None])[0]
        assert (logits.max(0).values - chosen < 1e-4).all()
        assert (ours == expected[name]).float().mean() > 0.99
    close(heads["tags"], expected["tags"])
    for key in ("boxes", "scores", "labels"):
        close(heads["boxes"][key], expected["boxes"][key], scale=max(pixels.shape))


def check_points(expected, ours):
    """Maxima that are tied to rounding may be others."""
    places = [
        {(round(float(r), 2), round(float(c), 2)): i for i, (r, c) in enumerate(rows)}
        for rows in (zip(p["row"], p["col"], strict=True) for p in (expected, ours))
    ]
    both = set(places[0]) & set(places[1])
    assert len(set(places[0]) ^ set(places[1])) <= 0.02 * len(both)
    for key, value in expected.items():
        a, b = (
            [float(v[at[p]]) for p in sorted(both)]
            for at, v in zip(places, (value, ours[key]), strict=True)
        )
        assert a == pytest.approx(b, rel=1e-3)


@pytest.mark.parametrize("tiling", ["row", "zigzag", "two-stream"])
@pytest.mark.parametrize("size", [(1, 1), (65, 63), (200, 330)])
def test_streamed_prediction_is_the_one_in_memory(tiling, size, tmp_path):
    model = small(tiling=tiling)
    pixels = scene(*size)
    source = xm.open_image(pixels, axes="HWC")
    result = xm.stream(model, source, tmp_path / "out", batch_size=2, tokens=False)
    check_same(model, pixels, tmp_path / "out", result.heads)
    assert verify(tmp_path / "out") == []
    names = {f"{n}.tif" for n in ("ground", "ships", "fields", "roads", "vessels")}
    names |= {"boxes.json", "boxes.geojson", "vessels.csv", "vessels.geojson"}
    names |= {"embedding.json", "run.json"}
    assert {p.name for p in (tmp_path / "out").iterdir()} == names


@pytest.mark.parametrize(
    "context, options",
    [
        ("hyper", {"chunk_regions": None, "pool": "token"}),
        ("hyper", {"tiling": "zigzag"}),
        ("vit", {"chunk_regions": None}),
        ("vit", {"tiling": "zigzag"}),
        ("mamba", {}),
        ("mamba", {"tiling": "two-stream"}),
        (None, {}),
        (None, {"tiling": "zigzag"}),
    ],
)
def test_streamed_prediction_is_the_one_in_memory_for_every_context(context, options, tmp_path):
    model = small(context=context, num_classes=3, **options)
    pixels = scene()
    result = xm.stream(model, pixels, tmp_path / "out", batch_size=4)
    check_same(model, pixels, tmp_path / "out", result.heads)
    assert (tmp_path / "out" / "tokens.zarr").is_dir()


def test_a_group_that_is_the_whole_image(tmp_path):
    heads = {"roads": HEADS["roads"] | {"group": None}}
    model = small(heads)
    pixels = scene()
    xm.stream(model, pixels, tmp_path / "out", tokens=False)
    expected = in_memory(model, pixels)[1]["roads"]
    close(bands_last(tmp_path / "out", "roads"), expected.permute(1, 2, 0))


def test_logits_and_zarr(tmp_path):
    model = small()
    pixels = scene()
    source = xm.open_image(pixels, axes="HWC")
    source.metadata |= {"crs": "EPSG:32633", "transform": [10, 0, 5e5, 0, -10, 6e6]}
    options = {"tokens": False, "maps": "logits", "map_format": "zarr"}
    xm.stream(model, source, tmp_path / "out", **options)
    out, _ = in_memory(model, pixels)
    for name in ("ground", "ships", "fields", "roads"):
        array = zarr.open_array(str(tmp_path / "out" / f"{name}.zarr"), mode="r")
        close(array[:], out.heads[name][0].permute(1, 2, 0))
    assert array.attrs["transform"] == [80, 0, 5e5, 0, -80, 6e6]
    assert verify(tmp_path / "out") == []


def test_without_an_output_boxes_and_scores_are_returned():
    model = small()
    pixels = scene()
    result = xm.stream(model, pixels)
    _, expected = in_memory(model, pixels)
    assert set(result.heads) == {"tags", "boxes"}
    close(result.heads["tags"], expected["tags"])
    close(result.heads["boxes"]["boxes"], expected["boxes"]["boxes"], scale=330)
    assert xm.stream(model, pixels, heads=False).heads == {}


def geo_scene(path, crs="EPSG:32633"):
    pixels = scene()
    transform = rasterio.transform.Affine(10, 0, 500_000, 0, -10, 6_000_000)
    with rasterio.open(
        path, "w", driver="GTiff", height=200, width=330, count=3, dtype="uint8",
        crs=crs, transform=transform,
    ) as data:  # fmt: skip
        data.write(pixels.transpose(2, 0, 1))
    return pixels


@pytest.mark.parametrize("crs", ["EPSG:32633", "EPSG:4326"])
@pytest.mark.parametrize("has_rasterio", [True, False])
def test_the_georeference_is_kept(crs, has_rasterio, tmp_path, monkeypatch):
    geo_scene(tmp_path / "scene.tif", crs)
    if not has_rasterio:
        monkeypatch.setitem(sys.modules, "rasterio.shutil", None)
    heads = {name: HEADS[name] for name in ("ground", "ships", "boxes")}
    xm.stream(small(heads), tmp_path / "scene.tif", tmp_path / "out", tokens=False)
    for name, stride in (("ground", 2), ("ships", 8)):
        with rasterio.open(tmp_path / "out" / f"{name}.tif") as data:
            assert data.crs.to_string() == crs
            assert tuple(data.transform)[:6] == (
                10 * stride, 0, 500_000, 0, -10 * stride, 6_000_000,
            )  # fmt: skip
            assert data.shape == (-(-200 // stride), -(-330 // stride))
            assert data.profile["tiled"] and data.profile["compress"] == "deflate"
            layout = data.tags(ns="IMAGE_STRUCTURE").get("LAYOUT")
            assert layout == ("COG" if has_rasterio else None)
            assert data.nodata == 255 if name == "ground" else np.isnan(data.nodata)
        assert tifffile.TiffFile(tmp_path / "out" / f"{name}.tif").is_bigtiff
    collection = json.loads((tmp_path / "out" / "boxes.geojson").read_text())
    code = crs.split(":")[1]
    assert collection["crs"]["properties"]["name"] == f"urn:ogc:def:crs:EPSG::{code}"
    coco = json.loads((tmp_path / "out" / "boxes.json").read_text())
    assert len(coco["annotations"]) == len(collection["features"]) > 0
    for annotation, feature in zip(coco["annotations"], collection["features"], strict=True):
        left, top, width, height = annotation["bbox"]
        assert 0 <= left and 0 <= top and left + width <= 330 and top + height <= 200
        ring = feature["geometry"]["coordinates"][0]
        assert ring[0] == ring[-1]
        assert ring[0] == pytest.approx([500_000 + 10 * left, 6_000_000 - 10 * top])
        corner = [500_000 + 10 * (left + width), 6_000_000 - 10 * (top + height)]
        assert ring[2] == pytest.approx(corner)
        assert feature["properties"]["score"] == annotation["score"]


@pytest.mark.parametrize("has_rasterio", [True, False])
@pytest.mark.parametrize("channels, dtype", [(1, "uint8"), (3, "float32")])
def test_a_map_of_many_tiles_and_a_turned_image(
    has_rasterio, channels, dtype, tmp_path, monkeypatch
):
    if not has_rasterio:
        monkeypatch.setitem(sys.modules, "rasterio.shutil", None)
    values = np.random.default_rng(0).integers(0, 200, (300, 1300, channels)).astype(dtype)
    array = zarr.create_array(
        str(tmp_path / "a.zarr"), shape=values.shape, chunks=(64, 512, channels), dtype=dtype
    )
    array[:] = values
    turned = [8.0, 6.0, 1000.0, 6.0, -8.0, 2000.0]
    attributes = {"transform": turned, "nodata": 255 if dtype == "uint8" else None}
    metadata = {"crs": "EPSG:4326", "crs_kind": "geographic"}
    write_tiff(tmp_path / "a.tif", tmp_path / "a.zarr", metadata, attributes)
    assert [p.name for p in tmp_path.glob("a.tif*")] == ["a.tif"]
    with rasterio.open(tmp_path / "a.tif") as data:
        np.testing.assert_array_equal(data.read(), values.transpose(2, 0, 1))
        assert list(data.transform)[:6] == turned
        assert data.crs.to_string() == "EPSG:4326"
        assert bool(data.overviews(1)) == has_rasterio


def test_boxes_are_what_pycocotools_reads(tmp_path):
    from pycocotools.coco import COCO

    heads = {"boxes": HEADS["boxes"]}
    result = xm.stream(small(heads), scene(), tmp_path / "out", tokens=False)
    coco = COCO(str(tmp_path / "out" / "boxes.json"))
    found = coco.loadAnns(coco.getAnnIds(imgIds=[1]))
    assert [a["score"] for a in found] == pytest.approx(result.heads["boxes"]["scores"].tolist())


def test_names_of_classes_go_with_the_model_into_what_it_says(tmp_path):
    names = {"head": ("sea", "land"), "boxes": ("ship", "buoy", "plane"), "tags": tuple("abcde"),
             "ground": ("a", "b", "c", "d")}  # fmt: skip
    heads = {name: HEADS[name] for name in ("boxes", "tags", "ground")}
    model = small(heads, num_classes=2)
    model.class_names = names
    model.save_pretrained(tmp_path / "model")
    model = xm.XT.from_pretrained(tmp_path / "model")
    assert model.class_names == names
    source = xm.open_image(scene(), axes="HWC")
    xm.stream(model, source, tmp_path / "out", tokens=False)
    coco = json.loads((tmp_path / "out" / "boxes.json").read_text())
    assert [c["name"] for c in coco["categories"]] == ["ship", "buoy", "plane"]
    features = json.loads((tmp_path / "out" / "boxes.geojson").read_text())["features"]
    for note, feature in zip(coco["annotations"], features, strict=True):
        assert feature["properties"]["name"] == names["boxes"][note["category_id"]]
    scores = json.loads((tmp_path / "out" / "embedding.json").read_text())
    assert scores["classes"] == ["sea", "land"] and scores["top"][0][0] in ("sea", "land")
    assert scores["heads"]["tags"]["classes"] == list("abcde")
    with rasterio.open(tmp_path / "out" / "ground.tif") as data:
        assert json.loads(data.tags()["TIFFTAG_IMAGEDESCRIPTION"]) == {"classes": list("abcd")}
    model.class_names = {}
    model.save_pretrained(tmp_path / "model")  # over the one with names
    assert xm.XT.from_pretrained(tmp_path / "model").class_names == {}


@pytest.mark.parametrize("text", ["[1", '["a"]', '{"head": [1]}'])
def test_names_of_another_form_are_refused(text, tmp_path):
    small({}, num_classes=2).save_pretrained(tmp_path)
    (tmp_path / "classes.json").write_text(text)
    with pytest.raises(ValueError, match=r"classes\.json must hold lists of names by head"):
        xm.XT.from_pretrained(tmp_path)


def test_places_without_a_region_have_no_prediction(tmp_path):
    pixels = scene()
    pixels[64:128, :128] = 7
    source = xm.open_image(pixels, axes="HWC")
    xm.stream(small(), source, tmp_path / "out", tokens=False, drop=7)
    empty = torch.zeros(200, 330, dtype=torch.bool)
    empty[64:128, :128] = True
    for name, stride, value in (("ground", 2, 255), ("fields", 1, 255), ("ships", 8, None)):
        data = bands_last(tmp_path / "out", name)[..., 0]
        missing = data.isnan() if value is None else data == value
        assert torch.equal(missing, empty[::stride, ::stride])
    assert bands_last(tmp_path / "out", "roads").isnan().any(-1).sum() == 64 * 128 // 64


@pytest.mark.parametrize(
    "group, overlap, kept_rows, heights",
    [(1, 0, 0, (8, 16)), (2, 0, 1, (8, 16)), (3, 1, 2, (9, 17))],
)
def test_what_waits_is_rows_of_regions_not_the_image(group, overlap, kept_rows, heights):
    options = {"kind": "fcos", "classes": 1, "dim": 32, "group": group, "overlap": overlap}
    model = small({"boxes": options | {"min_stride": 64}})
    most = []
    for rows in heights:
        grid = RegionGrid(rows * 64, 6 * 64, 64)
        walk = GroupWalk(model, grid, ["boxes"])
        sizes, seen = [], []
        for step in model.walk(grid):
            tokens = torch.zeros(4 * len(step.regions), 32)
            pieces = walk.add(step.regions, tokens, {}, [])
            seen += [(piece.group.row, piece.group.col) for piece in pieces]
            sizes.append(len(walk.held))
        assert sorted(seen) == [(g.row, g.col) for g in model.heads["boxes"].groups(grid)]
        assert sizes[-1] == 0
        most.append(max(sizes))
    # At most kept_rows whole rows, and one that is under way.
    assert most[0] == most[1] and 6 * kept_rows <= most[0] <= 6 * (kept_rows + 1)


def test_a_plan_counts_what_waits_for_a_head_and_its_calls(monkeypatch):
    """Three rows of six regions of 2 x 2 tokens; twelve groups of 3 x 3, one a call."""
    options = {"kind": "fcos", "classes": 1, "dim": 32, "group": 3, "overlap": 1}
    heads = {"boxes": options | {"min_stride": 64}, "ground": HEADS["ground"]}
    calls = []

    def measured(run, device):
        calls.append(run())
        return 0.5, 9

    monkeypatch.setattr(planning, "_measure", measured)
    one, both = (
        planning._heads_cost(small({n: heads[n] for n in names}), RegionGrid(512, 384, 64),
                             torch.device("cpu"), torch.float32)
        for names in (["boxes"], ["boxes", "ground"])
    )  # fmt: skip
    token = 4 * 32
    assert one == (12 * 0.5, 3 * 6 * 4 * token + 9 * 4 * token + 9)
    # `ground` sees regions alone, sixteen at once, and keeps none.
    assert both == (12 * 0.5 + 3 * 0.5, 3 * 6 * 4 * token + 16 * 4 * token + 9)
    source = xm.open_image(scene(512, 384), axes="HWC")
    plans = [xm.plan(small(part), source) for part in ({}, {"boxes": heads["boxes"]})]
    assert plans[1].seconds > 6 and len(calls) == 4


class _Stop(Exception):
    pass


@pytest.mark.parametrize("stop_after", [4, 13])
def test_a_stopped_run_goes_on_and_gives_the_same_bytes(stop_after, tmp_path):
    model = small()
    source = xm.open_image(scene(), axes="HWC")
    options = {"batch_size": 2, "tokens": False, "checkpoint_seconds": 0.0}
    xm.stream(model, source, tmp_path / "whole", **options)
    done = 0

    def stop(count):
        nonlocal done
        done += count
        if done > stop_after:
            raise _Stop

    with pytest.raises(_Stop):
        xm.stream(model, source, tmp_path / "out", progress=stop, **options)
    assert (tmp_path / "out.part" / "journal" / "maps").is_dir()
    result = xm.stream(model, source, tmp_path / "out", **options)
    assert result.stats.resumed == 1
    names = {p.name for p in (tmp_path / "whole").iterdir()}
    assert {p.name for p in (tmp_path / "out").iterdir()} == names
    for name in names - {"run.json"}:
        ours, whole = tmp_path / "out" / name, tmp_path / "whole" / name
        assert ours.read_bytes() == whole.read_bytes(), name


def test_a_run_that_lacks_only_its_name_gives_the_same_result(tmp_path, monkeypatch):
    model = small()
    source = xm.open_image(scene(), axes="HWC")
    first = xm.stream(model, source, tmp_path / "whole", tokens=False)
    rename = xm.journal.os.rename

    def refuse(a, b):
        if Path(b) == tmp_path / "out":
            raise OSError(28, "No space left on device")
        rename(a, b)

    monkeypatch.setattr("xt_models.journal.os.rename", refuse)
    with pytest.raises(OSError, match="No space"):
        xm.stream(model, source, tmp_path / "out", tokens=False)
    monkeypatch.undo()
    second = xm.stream(model, source, tmp_path / "out", tokens=False)
    np.testing.assert_array_equal(first.heads["tags"], second.heads["tags"])
    for name in ("boxes", "vessels"):
        for key, value in first.heads[name].items():
            np.testing.assert_array_equal(value, second.heads[name][key])


def xt(*args):
    return CliRunner().invoke(main, [str(arg) for arg in args])


def test_the_command_line(tmp_path):
    pixels = geo_scene(tmp_path / "scene.tif")
    model = small(num_classes=2)
    model.save_pretrained(tmp_path / "model")
    options = ["--model", tmp_path / "model", "--device", "cpu"]
    result = xt("predict", tmp_path / "scene.tif", *options, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "wrote" in result.output and "ground.tif" in result.output
    heads = xm.stream(model, pixels).heads
    assert "vessels" not in heads
    heads["vessels"] = read_points(tmp_path / "out" / "vessels.csv")
    check_same(model, pixels, tmp_path / "out", heads)
    collection = json.loads((tmp_path / "out" / "vessels.geojson").read_text())
    row, col = (float(heads["vessels"][name][0]) for name in ("row", "col"))
    assert collection["features"][0]["geometry"] == {
        "type": "Point", "coordinates": [500_000 + 10 * (col + 0.5), 6_000_000 - 10 * (row + 0.5)],
    }  # fmt: skip
    assert len(json.loads((tmp_path / "out" / "embedding.json").read_text())["scores"]) == 2
    again = xt("predict", tmp_path / "scene.tif", *options, "-o", tmp_path / "out")
    assert again.exit_code == 1 and "exists already" in again.output
    more = ["--maps", "logits", "--map-format", "zarr", "-o", tmp_path / "logits"]
    assert xt("predict", tmp_path / "scene.tif", *options, *more).exit_code == 0
    assert (tmp_path / "logits" / "roads.zarr").is_dir()
    missing = xt("predict", tmp_path / "scene.tif", *options)
    assert missing.exit_code == 2 and "name a folder with -o" in missing.output
    assert xt("embed", tmp_path / "scene.tif", *options, "-o", tmp_path / "map").exit_code == 0
    assert not list((tmp_path / "map").glob("*.tif"))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"maps": "masks"}, "maps must be one of prediction, logits, got 'masks'"),
        ({"map_format": "png"}, "map_format must be one of tif, zarr, got 'png'"),
    ],
)
def test_refuses_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        xm.stream(small({}), scene(), **options)
