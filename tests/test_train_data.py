"""Forms of training data, on small files in their true formats."""

import csv
import json
import pickle

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from xt_models.source import SourceError, open_image
from xt_models.train import data
from xt_models.train.data import Tiles, Window, random_window, read_crop
from xt_models.train.data.masks import reduce_mask
from xt_models.train.data.xview3 import COLUMNS, read_shoreline


@pytest.fixture
def pyramid(tmp_path):
    """A tiled TIFF of 256 x 384 px with two smaller levels, and its pixels."""
    rows, cols = np.mgrid[:256, :384]
    pixels = np.stack([rows / 2, cols / 2, (rows + cols) / 4], -1).astype(np.uint8)
    with tifffile.TiffWriter(tmp_path / "pyramid.tif") as file:
        file.write(pixels, tile=(64, 64), subifds=2, photometric="rgb")
        for step in (2, 4):
            small = pixels.reshape(256 // step, step, 384 // step, step, 3).mean((1, 3))
            file.write(small.round().astype(np.uint8), tile=(64, 64), photometric="rgb")
    return tmp_path / "pyramid.tif", torch.from_numpy(pixels).permute(2, 0, 1)


def test_a_crop_is_its_window(pyramid):
    path, pixels = pyramid
    assert torch.equal(read_crop(path, None), pixels)
    assert torch.equal(read_crop(path, Window(10, 20, 30, 40)), pixels[:, 10:40, 20:60])
    assert torch.equal(read_crop(path, Window(0, 0, 8, 8), bands=(3, 1)), pixels[[2, 0], :8, :8])


def test_a_crop_is_zero_beyond_the_image(pyramid):
    path, pixels = pyramid
    crop = read_crop(path, Window(-5, 380, 20, 10))
    assert torch.equal(crop[:, 5:, :4], pixels[:, :15, 380:])
    assert not crop[:, :5].any() and not crop[:, :, 4:].any()
    assert not read_crop(path, Window(300, 0, 4, 4)).any()


def test_a_crop_reads_no_more_than_it_needs(pyramid):
    """A small crop touches few tiles; a shrunk one comes from a smaller level, and is right."""
    path, pixels = pyramid
    with open_image(path) as source:
        before = source.bytes_read
        read_crop(source, Window(0, 0, 60, 60))
        assert source.bytes_read - before == 64 * 64 * 3
        before = source.bytes_read
        small = read_crop(source, Window(64, 128, 128, 128), (32, 32))
        assert source.bytes_read - before == 64 * 64 * 3  # of the level a quarter the size
    mean = pixels[:, 64:192, 128:256].float().unfold(1, 4, 4).unfold(2, 4, 4).mean((3, 4))
    assert small.dtype == torch.uint8 and (small - mean).abs().max() <= 2


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.float64])
def test_types(dtype, tmp_path):
    pixels = (np.arange(48).reshape(6, 8) * 5).astype(dtype)
    tifffile.imwrite(tmp_path / "a.tif", pixels)
    crop = read_crop(tmp_path / "a.tif", None, (3, 4))
    same = dtype in (np.uint8, np.uint16)
    assert crop.dtype == (getattr(torch, np.dtype(dtype).name) if same else torch.float32)
    assert crop.shape == (1, 3, 4) and crop.float().mean() == pytest.approx(pixels.mean(), abs=1)


def test_grey_and_alpha_fit_three_bands(tmp_path):
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    crop = read_crop(tmp_path / "grey.png", None, in_chans=3)
    assert crop.shape == (3, 8, 8) and (crop == torch.from_numpy(grey)).all()
    Image.fromarray(np.stack([grey] * 4, -1)).save(tmp_path / "alpha.png")
    assert read_crop(tmp_path / "alpha.png", None, in_chans=3).shape == (3, 8, 8)
    with pytest.raises(SourceError, match=r"grey\.png: expected 5 bands, found 1\."):
        read_crop(tmp_path / "grey.png", None, in_chans=5)
    with pytest.raises(SourceError, match=r"expected bands \[2\], found 1 bands"):
        read_crop(tmp_path / "grey.png", None, bands=(2,))


def test_random_windows_have_the_area_and_ratio():
    rng = np.random.default_rng(0)
    windows = [random_window((300, 500), (0.1, 0.5), (0.5, 2.0), rng) for _ in range(500)]
    for top, left, height, width in windows:
        assert top >= 0 and left >= 0 and top + height <= 300 and left + width <= 500
        assert 0.09 < height * width / 150_000 < 0.51 and 0.48 < width / height < 2.08
    areas = np.array([w.height * w.width for w in windows]) / 150_000
    assert areas.min() < 0.12 and areas.max() > 0.45
    assert random_window((10, 1000), (1, 1), (0.5, 2.0), rng) == (0, 490, 10, 20)


def test_tiles_cover_each_image_once():
    tiles = Tiles([(100, 150), (40, 40), (64, 65)], (64, 64))
    assert len(tiles) == 6 + 1 + 2
    windows = [tiles[i] for i in range(len(tiles))]
    assert [image for image, _ in windows] == [0] * 6 + [1] + [2] * 2
    assert {w[:2] for image, w in windows if not image} == {
        (y, x) for y in (0, 64) for x in (0, 64, 128)
    }
    rng = np.random.default_rng(0)
    drawn = [tiles.random(0, rng)[1] for _ in range(300)]
    assert min(w.top for w in drawn) == 0 and max(w.top for w in drawn) == 36
    assert max(w.left for w in drawn) == 86
    assert tiles.random(6, rng) == (1, Window(0, 0, 64, 64))
    for _ in range(50):
        _, window = tiles.around(0, (99.5, 3.0), rng)
        assert window.top <= 99 < window.top + 64 and 0 <= window.left <= 3
        assert window.top <= 36


# Labels.


@pytest.fixture
def photos(tmp_path):
    for i in range(5):
        Image.fromarray(np.full((8, 8, 3), i, dtype=np.uint8)).save(tmp_path / f"{i}.jpg")
    return tmp_path


def write_csv(path, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)


def test_image_folder(photos):
    for split, name, i in (("train", "b", 0), ("train", "a", 1), ("val", "b", 2)):
        (photos / split / name / "deep").mkdir(parents=True)
        (photos / f"{i}.jpg").rename(photos / split / name / "deep" / f"{i}.jpg")
    form = data.ImageFolder(root=str(photos))
    train = form.read("train")
    assert train.classes == ("a", "b") and list(train.labels) == [0, 1]
    assert [path.name for path in train.paths] == ["1.jpg", "0.jpg"]
    assert form.read("val", train.classes).labels == [1]
    (photos / "train" / "a" / "deep" / "x.webp").write_bytes(b"RIFF")
    with pytest.raises(ValueError, match=r"x\.webp: expected TIFF, PNG, JPEG, .* found \.webp:"):
        form.read("train")
    (photos / "val" / "c").mkdir()
    with pytest.raises(ValueError, match=r"val/c: expected a class of the training images\."):
        form.read("val", train.classes)
    (photos / "train" / "a" / "deep" / "x.webp").unlink()
    (photos / "train" / "c").mkdir()
    with pytest.raises(ValueError, match=r"train/c: expected at least one image, found none\."):
        form.read("train")


def test_image_list(photos):
    write_csv(photos / "train.csv", [("path", "label"), ("0.jpg", "dog"), ("1.jpg", "cat")])
    form = data.ImageList(root=str(photos))
    assert form.read("train").classes == ("cat", "dog") and form.read("train").labels == [1, 0]
    named = data.ImageList(root=str(photos), classes=("dog", "cow"))
    with pytest.raises(ValueError, match=r"csv, line 3: label must be one of the 2 classes, got "
                                         r"'cat'\."):  # fmt: skip
        named.read("train")
    write_csv(photos / "train.csv", [("path", "label"), ("0.jpg", "a;b"), ("1.jpg", "")])
    several = data.ImageList(root=str(photos), multi_label=True).read("train")
    assert several.labels == [(0, 1), ()]
    write_csv(photos / "train.csv", [("path", "label"), ("0.jpg", "a"), ("7.jpg", "a"),
                                     ("8.jpg", "a")])  # fmt: skip
    with pytest.raises(ValueError, match=r"missing .*7\.jpg and 1 others\."):
        form.read("train")
    write_csv(photos / "train.csv", [("file", "label"), ("0.jpg", "a")])
    with pytest.raises(ValueError, match=r"csv: expected a column path, found none\."):
        form.read("train")
    write_csv(photos / "train.csv", [("path", "label"), ("0.jpg", "a"), ("", "a")])
    with pytest.raises(ValueError, match=r"csv, line 3: path must be that of an image, got ''"):
        form.read("train")
    write_csv(photos / "train.csv", [("path", "label")])
    with pytest.raises(ValueError, match="expected at least one image, found none"):
        form.read("train")


def test_a_list_is_read_as_spreadsheets_write_it_and_no_other_bytes(photos):
    form = data.ImageList(root=str(photos))
    (photos / "train.csv").write_bytes("path,label\r\n0.jpg,größe\r\n".encode("utf-8-sig"))
    assert form.read("train").classes == ("größe",)
    (photos / "train.csv").write_bytes("path,label\n0.jpg,größe\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"train\.csv: expected UTF-8, found other bytes"):
        form.read("train")


@pytest.fixture
def inaturalist(photos):
    """The form of the 2018 files: categories without names, names in a file of their own."""
    categories = [
        {"id": 3, "name": "Naja naja", "supercategory": "Reptilia"},
        {"id": 7, "name": "Parus major", "supercategory": "Aves"},
        {"id": 5, "name": "Lacerta agilis", "supercategory": "Reptilia"},
    ]
    (photos / "categories.json").write_text(json.dumps(categories))
    table = {
        "images": [{"id": i, "file_name": f"{i}.jpg", "height": 8, "width": 8} for i in range(5)],
        "categories": [{"id": i} for i in (3, 5, 7)],
        "annotations": [
            {"id": i, "image_id": i, "category_id": c} for i, c in enumerate((5, 7, 3, 5, 7))
        ],
    }
    (photos / "train2018.json").write_text(json.dumps(table))
    return photos, table


def test_inaturalist_keeps_one_supercategory(inaturalist):
    root, _ = inaturalist
    reptiles = data.INaturalist(root=str(root), supercategory="Reptilia").read("train")
    assert reptiles.classes == ("Naja naja", "Lacerta agilis")
    assert [(p.name, label) for p, label in zip(reptiles.paths, reptiles.labels, strict=True)] == [
        ("0.jpg", 1), ("2.jpg", 0), ("3.jpg", 1),
    ]  # fmt: skip
    assert len(data.INaturalist(root=str(root)).read("train").classes) == 3
    with pytest.raises(ValueError, match=r"must be one of Aves, Reptilia, got 'Fungi'\."):
        data.INaturalist(root=str(root), supercategory="Fungi").read("train")


def test_inaturalist_refuses(inaturalist):
    root, table = inaturalist
    form = data.INaturalist(root=str(root), supercategory="Reptilia")

    def refused(match, **changes):
        (root / "train2018.json").write_text(json.dumps(table | changes))
        with pytest.raises(ValueError, match=match):
            form.read("train")

    notes = table["annotations"]
    refused("annotation 9 must have one of the 3 categories, got 8",
            annotations=[*notes, {"id": 9, "image_id": 0, "category_id": 8}])  # fmt: skip
    refused("annotation 9 must have an image of the file, got 77",
            annotations=[*notes, {"id": 9, "image_id": 77, "category_id": 3}])  # fmt: skip
    refused(r"expected a list 'images', found none", images={})
    refused(r"train2018\.json: annotation 9 must have image_id \(int \| str\), got None",
            annotations=[{"id": 9, "category_id": 3}])  # fmt: skip
    refused(r"image 4 must have file_name \(str\), got None", images=[{"id": 4}])
    refused(r"annotation at 0 must be an object, got 7", annotations=[7])
    (root / "3.jpg").unlink()
    refused(r"every image must exist, missing .*3\.jpg\.")
    (root / "train2018.json").write_text("{")
    with pytest.raises(ValueError, match=r"train2018\.json: expected JSON, found"):
        form.read("train")


# Masks.


@pytest.fixture
def pairs(tmp_path):
    rng = np.random.default_rng(0)
    masks = {}
    for name, size in (("a", (40, 50)), ("b", (64, 33))):
        masks[name] = rng.choice(np.array([0, 10, 20, 255], np.uint8), size)
        pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        for folder in ("images", "masks"):
            (tmp_path / "train" / folder).mkdir(parents=True, exist_ok=True)
        tifffile.imwrite(tmp_path / "train" / "images" / f"{name}.tif", pixels)
        Image.fromarray(masks[name]).save(tmp_path / "train" / "masks" / f"{name}.png")
    return tmp_path, masks


def test_masks_become_class_numbers(pairs):
    root, masks = pairs
    form = data.MaskPairs(root=str(root), classes=("sea", "land", "ice"), values=(0, 10, 20))
    found = form.read("train")
    assert found.sizes == [(40, 50), (64, 33)]
    numbers = {0: 0, 10: 1, 20: 2, 255: 255}
    expected = np.vectorize(numbers.get)(masks["a"])
    assert (found.mask(0, Window(0, 0, 40, 50)).numpy() == expected).all()
    edge = found.mask(0, Window(30, 40, 20, 20)).numpy()
    assert (edge[:10, :10] == expected[30:, 40:]).all()
    assert (edge[10:] == 255).all() and (edge[:, 10:] == 255).all()


def test_masks_refuse(pairs):
    root, masks = pairs
    three = {"classes": ("sea", "land", "ice"), "values": (0, 10, 20)}
    form = data.MaskPairs(root=str(root), **three)
    two = data.MaskPairs(root=str(root), classes=("sea", "land"), values=(0, 10))
    with pytest.raises(ValueError, match=r"a\.png: values must be those of the 2 classes \(0, 10\) "
                                         r"or 255 to ignore, got 20\."):  # fmt: skip
        two.read("train")
    with pytest.raises(ValueError, match=r"data\.values must be one number a class"):
        data.MaskPairs(root=str(root), classes=("sea", "land"), values=(0, 0)).read("train")
    with pytest.raises(ValueError, match=r"data\.classes must be 2 to 255 names, got \('sea',\)"):
        data.MaskPairs(root=str(root), classes=("sea",)).read("train")
    Image.fromarray(masks["a"][:, :49]).save(root / "train" / "masks" / "a.png")
    with pytest.raises(ValueError, match=r"a\.png: .* 40 x 50 px like a\.tif, found .* 40 x 49 px"):
        form.read("train")
    (root / "train" / "masks" / "a.png").unlink()
    with pytest.raises(ValueError, match=r"a\.tif: expected a mask .*a\.\*, found none"):
        form.read("train")


@pytest.mark.parametrize("bits", [1, 8])
def test_a_class_that_no_mask_holds_is_refused(bits, pairs):
    """Masks of 0 and 255, which is ignored unless the recipe says what it is."""
    root, masks = pairs
    for name, mask in masks.items():
        picture = Image.fromarray(np.where(mask == 10, 255, 0).astype(np.uint8))
        path = root / "train" / "masks" / f"{name}.png"
        (picture.convert("1", dither=Image.Dither.NONE) if bits == 1 else picture).save(path)
    two = {"root": str(root), "classes": ("sea", "land")}
    match = r"masks: every class must occur, found none of 'land', value 1; there are 0 and 255, "
    with pytest.raises(ValueError, match=match + r"data\.ignore\. data\.values gives"):
        data.MaskPairs(**two).read("train")
    found = data.MaskPairs(**two, values=(0, 255), ignore=254).read("train")
    expected = (masks["a"] == 10).astype(np.uint8)
    assert (found.mask(0, Window(0, 0, 40, 50)).numpy() == expected).all()


def test_a_mask_with_a_palette_is_its_numbers(pairs):
    root, masks = pairs
    numbers = {0: 0, 10: 1, 20: 2, 255: 255}
    for name, mask in masks.items():
        picture = Image.fromarray(np.vectorize(numbers.get)(mask).astype(np.uint8), mode="P")
        picture.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0] + [255] * 759)
        picture.save(root / "train" / "masks" / f"{name}.png")
    found = data.MaskPairs(root=str(root), classes=("sea", "land", "ice")).read("train")
    expected = np.vectorize(numbers.get)(masks["b"])
    assert (found.mask(1, Window(0, 0, 64, 33)).numpy() == expected).all()


def test_cells_take_the_class_in_their_middle():
    mask = torch.arange(35).view(5, 7)
    assert reduce_mask(mask, 1).equal(mask)
    assert reduce_mask(mask, 2).tolist() == [[8, 10, 12, 13], [22, 24, 26, 27], [29, 31, 33, 34]]


# Boxes.


@pytest.fixture
def coco(tmp_path):
    """The form of Cityscapes' instances in COCO JSON: some categories are not for detection."""
    (tmp_path / "annotations").mkdir()
    (tmp_path / "train" / "aachen").mkdir(parents=True)
    for i in (1, 2):
        pixels = np.zeros((60, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "train" / "aachen" / f"{i}.png")

    def note(i, image, category, box, crowd=0):
        return {"id": i, "image_id": image, "category_id": category, "bbox": box,
                "area": box[2] * box[3], "iscrowd": crowd}  # fmt: skip

    table = {
        "images": [{"id": i, "file_name": f"aachen/{i}.png", "height": 60, "width": 80}
                   for i in (1, 2)],
        "categories": [{"id": 26, "name": "car"}, {"id": 24, "name": "person"},
                       {"id": 7, "name": "road"}],
        "annotations": [
            note(1, 1, 26, [10, 20, 30, 20]),
            note(2, 1, 24, [70.5, 5, 9.9, 40]),
            note(3, 1, 7, [0, 0, 80, 60]),
            note(4, 1, 24, [0, 0, 20, 20], crowd=1),
        ],
    }  # fmt: skip
    return tmp_path, table, note


def test_coco_boxes(coco):
    root, table, _ = coco
    (root / "annotations" / "train.json").write_text(json.dumps(table))
    found = data.Coco(root=str(root), classes=("person", "car")).read("train")
    assert found.classes == ("person", "car") and found.ids == [1, 2]
    assert found.sizes == [(60, 80)] * 2 and len(found.boxes[1]) == 0
    # A box that is out by less than a pixel is cut.
    torch.testing.assert_close(
        found.boxes[0], torch.tensor([[10, 20, 40, 40], [70.5, 5, 80, 45], [0, 0, 20, 20.0]])
    )
    assert found.labels[0].tolist() == [1, 0, 0] and found.crowd[0].tolist() == [0, 0, 1]
    window = Window(30, 20, 30, 60)
    target = found.target(0, window, visible=0.3)
    assert target["boxes"].tolist() == [[0, 0, 20, 10], [50.5, 0, 60, 15]]
    assert target["labels"].tolist() == [1, 0]
    assert found.target(0, window, visible=0.36)["boxes"].tolist() == [[50.5, 0, 60, 15]]
    assert found.target(1, window, visible=0.3)["boxes"].shape == (0, 4)
    assert data.Coco(root=str(root)).read("train").classes == ("road", "person", "car")


@pytest.mark.parametrize(
    "box, match",
    [
        ([10, 10, 0, 5], r"annotation 9 must have a box of a width and height above 0, got"),
        ([10, 10, 5, -5], r"annotation 9 must have a box of a width and height above 0, got"),
        ([70, 10, 20, 5], r"annotation 9 must have a box inside its image of 60 x 80 px, got"),
        ([-2, 10, 20, 5], r"annotation 9 must have a box inside its image of 60 x 80 px, got"),
        ([float("nan"), 1, 2, 3], r"annotation 9 must have a box inside"),
        ([1, 2, 3], r"annotation 9 must have a box of left, top, width, height, got \[1, 2, 3\]"),
        ([1, 2, "3", 4], r"annotation 9 must have a box of left, top, width, height, got"),
        ([-0.5, 2, 0.2, 4], r"annotation 9 must have a part inside its image of 60 x 80 px, got"),
    ],
)
def test_coco_refuses_a_box(coco, box, match):
    root, table, note = coco
    table["annotations"].append(note(9, 1, 26, [1, 1, 1, 1]) | {"bbox": box})
    (root / "annotations" / "train.json").write_text(json.dumps(table))
    with pytest.raises(ValueError, match=match):
        data.Coco(root=str(root)).read("train")


def test_coco_refuses(coco):
    root, table, note = coco
    form = data.Coco(root=str(root))

    def refused(match, form=form, **changes):
        (root / "annotations" / "train.json").write_text(json.dumps(table | changes))
        with pytest.raises(ValueError, match=match):
            form.read("train")

    refused("annotation 9 must have an image", annotations=[note(9, 5, 26, [1, 1, 2, 2])])
    refused("annotation 9 must have a category", annotations=[note(9, 1, 6, [1, 1, 2, 2])])
    refused("expected a category 'bus', found none", data.Coco(root=str(root), classes=("bus",)))
    refused(r"annotation 9 must have bbox \(list\), got None",
            annotations=[{"id": 9, "image_id": 1, "category_id": 26}])  # fmt: skip
    refused(r"annotation at 0 must have image_id \(int \| str\), got None", annotations=[{}])
    image = table["images"][0]
    for key in ("id", "file_name", "height", "width"):
        broken = {name: value for name, value in image.items() if name != key}
        refused(rf"image .* must have {key} \(", images=[broken])
    refused(r"category 7 must have name \(str\), got None", categories=[{"id": 7}])
    refused(r"train\.json: image 1 must be 1000 x 80 px as it says, found 60 x 80 px in .*1\.png",
            images=[image | {"height": 1000}], annotations=[])  # fmt: skip
    (root / "train" / "aachen" / "2.png").unlink()
    refused(r"every image must exist, missing .*2\.png\.")


# xView3.

HEADER = ("detect_lat", "detect_lon", "vessel_length_m", "source", "detect_scene_row",
          "detect_scene_column", "is_vessel", "is_fishing", "distance_from_shore_km", "scene_id",
          "confidence")  # fmt: skip
LINES = [
    ("", "", "25.5", "ais", "10", "20", "True", "False", "1.5", "ab12v", "HIGH"),
    ("", "", "", "manual", "90", "130.0", "True", "", "", "ab12v", "MEDIUM"),
    ("", "", "", "manual", "30", "40", "", "", "7", "ab12v", "LOW"),
]


@pytest.fixture
def xview3(tmp_path):
    (tmp_path / "train" / "ab12v").mkdir(parents=True)
    rng, bands = np.random.default_rng(0), {}
    for name in ("VH", "VV"):
        bands[name] = rng.normal(-20, 5, (100, 140)).astype(np.float32)
        bands[name][:8, :16] = -32768
        tifffile.imwrite(tmp_path / "train" / "ab12v" / f"{name}_dB.tif", bands[name],
                         tile=(64, 64), compression="deflate")  # fmt: skip
    write_csv(tmp_path / "train.csv", [HEADER, *LINES])
    (tmp_path / "shore").mkdir()
    contours = np.empty(2, dtype=object)
    contours[:] = [np.array([[1.0, 2.0], [3.0, 4.5]]), np.array([[9.0, 8.0]])]
    np.save(tmp_path / "shore" / "ab12v_shoreline.npy", contours)
    return tmp_path, bands


def test_xview3_scenes(xview3):
    root, bands = xview3
    scenes = data.XView3(root=str(root), shorelines="shore").read("train")
    assert scenes.names == ["ab12v"] and scenes.sizes == [(100, 140)]
    crop = scenes.crop(0, Window(0, 0, 100, 150))
    assert crop.dtype == torch.float32 and crop.shape == (2, 100, 150)
    for found, band in zip(crop, bands.values(), strict=True):
        assert (found[8:, 16:140].numpy() == band[8:, 16:]).all()
        assert (found[:8, :16] == -50).all() and (found[:, 140:] == -50).all()
    points = scenes.points[0]
    assert points.shape == (3, len(COLUMNS))
    assert scenes.is_low(points).tolist() == [False, False, True]
    torch.testing.assert_close(
        points[:2],
        torch.tensor([[10, 20, 1, 0, 25.5, 1.5, 2],
                      [90, 130, 1, torch.nan, torch.nan, torch.nan, 1]], dtype=torch.float64),
        equal_nan=True,
    )  # fmt: skip
    inside = scenes.inside(0, Window(5, 10, 20, 20))
    assert inside[:, :2].tolist() == [[5, 10]]
    assert scenes.shoreline(0).tolist() == [[1, 2], [3, 4.5], [9, 8]]
    low = data.XView3(root=str(root), confidence="low").read("train")
    assert not low.is_low(points).any() and low.shoreline(0) is None


def test_xview3_scene_as_one_file_of_two_bands(xview3):
    root, bands = xview3
    for name in ("VH", "VV"):
        (root / "train" / "ab12v" / f"{name}_dB.tif").unlink()
    (root / "train" / "ab12v").rmdir()
    both = np.stack(list(bands.values()))
    tifffile.imwrite(root / "train" / "ab12v.tif", both, tile=(64, 64), planarconfig="separate",
                     photometric="minisblack")  # fmt: skip
    scenes = data.XView3(root=str(root)).read("train")
    window = Window(20, 20, 30, 30)
    assert (scenes.crop(0, window).numpy() == both[:, 20:50, 20:50]).all()


@pytest.mark.parametrize(
    "column, value, match",
    [
        (4, "100", r"csv, line 2: a detection must lie in its scene of 100 x 140 px, got row 100"),
        (4, "", r"a detection must lie in its scene"),
        (9, "zz", r"csv, line 2: expected a scene, found no 'zz'\."),
        (6, "maybe", r"csv, line 2: is_vessel must be true, false, 1, 0 or empty, got 'maybe'"),
        (6, "3", r"csv, line 2: is_vessel must be true, false, 1, 0 or empty, got '3'"),
        (7, "high", r"csv, line 2: is_fishing must be true, false, 1, 0 or empty, got 'high'"),
        (10, "7", r"csv, line 2: confidence must be low, medium, high, 0, 1, 2 or empty, got '7'"),
        (4, "high", r"csv, line 2: detect_scene_row must be a number or empty, got 'high'"),
    ],
)
def test_xview3_refuses_a_line(xview3, column, value, match):
    root, _ = xview3
    line = list(LINES[0])
    line[column] = value
    write_csv(root / "train.csv", [HEADER, line])
    with pytest.raises(ValueError, match=match):
        data.XView3(root=str(root)).read("train")


def test_xview3_refuses(xview3):
    root, bands = xview3
    with pytest.raises(ValueError, match=r"confidence must be low, medium, high, got 'HIGH'"):
        data.XView3(root=str(root), confidence="HIGH")
    tifffile.imwrite(root / "train" / "ab12v" / "VV_dB.tif", bands["VV"][:50])
    with pytest.raises(ValueError, match="expected bands of one size"):
        data.XView3(root=str(root)).read("train")
    (root / "train" / "ab12v" / "VV_dB.tif").unlink()
    with pytest.raises(ValueError, match=r"ab12v: expected a scene with VV_dB\.tif, found none"):
        data.XView3(root=str(root)).read("train")


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('it ran')",))


@pytest.mark.parametrize("payload", [Evil(), [np.zeros((1, 2)), Evil()]])
def test_a_shoreline_that_would_run_code_does_not(payload, tmp_path):
    path = tmp_path / "x_shoreline.npy"
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": "|O", "fortran_order": False, "shape": (1,)}
        )
        pickle.dump(payload, file)
    with pytest.raises(ValueError, match=r"expected contours as arrays, found builtins\.exec"):
        read_shoreline(path)
