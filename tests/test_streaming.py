"""Streaming equals the in-memory model, whatever the batches, threads and order of reads; its
outputs are whole or absent.
"""

import json
import mmap
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
import torch
import zarr
from PIL import Image

import xt_models as xm
from xt_models.encoding import BatchEncoder
from xt_models.host import available_memory, current_rss, free_disk, peak_rss, reset_peak_rss
from xt_models.model import map_index
from xt_models.planning import choose_batch_size, choose_precision
from xt_models.profiling import Profile
from xt_models.reading import Buffers
from xt_models.source import SourceError
from xt_models.streaming import default_batch_size, stream_chunks

pytestmark = pytest.mark.filterwarnings("ignore::xt_models.registry.RandomWeightsWarning")
SMALL = {"region": 64, "dim": 32, "depth": 2, "num_heads": 2, "chunk_regions": 3, "residual": False}


def small(context="xl", **kwargs):
    return xm.create_model("convnext_atto", context=context, **SMALL | kwargs)


def scene(height=200, width=330, bands=3, dtype=np.uint8, seed=0):
    rng = np.random.default_rng(seed)
    if np.dtype(dtype).kind == "f":
        return rng.normal(size=(height, width, bands)).astype(dtype)
    return rng.integers(0, np.iinfo(dtype).max, (height, width, bands), dtype=dtype)


def in_memory(model, pixels):
    with torch.inference_mode():
        return model(torch.from_numpy(pixels).permute(2, 0, 1))


def read_map(folder):
    return torch.from_numpy(zarr.open_array(str(folder / "tokens.zarr"), mode="r")[:])


def close(a, b):
    # Batched convolutions and matrix products round differently for different batch sizes.
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tiling", ["row", "zigzag", "two-stream"])
@pytest.mark.parametrize("size", [(1, 1), (64, 64), (65, 63), (200, 330)])
def test_streamed_equals_in_memory(tiling, size, tmp_path):
    model = small(tiling=tiling, num_classes=5)
    pixels = scene(*size)
    expected = in_memory(model, pixels)
    source = xm.open_image(pixels, axes="HWC")
    result = xm.stream(model, source, tmp_path / "out", batch_size=2)
    close(read_map(tmp_path / "out").flatten(0, 1), expected.tokens[0])
    close(torch.from_numpy(result.logits), expected.logits[0])
    close(torch.from_numpy(result.embedding), expected.embedding[0])


@pytest.mark.parametrize(
    "context, options",
    [
        ("vit", {"chunk_regions": None, "pool": "token"}),
        ("hyper", {"chunk_regions": None, "pool": "token", "causal": True}),
        ("hyper", {}),
        (None, {}),
        ("xl", {"residual": True, "memory_chunks": 2, "depth": 3}),
        ("xl", {"chunk_regions": 1}),
        ("mamba", {}),
        ("mamba", {"residual": True, "tiling": "two-stream"}),
        ("mamba", {"mamba_form": "released", "chunk_regions": None, "pool": "token"}),
    ],
)
def test_streamed_equals_in_memory_for_every_context(context, options, tmp_path):
    model = small(context, num_classes=3, **options)
    pixels = scene()
    expected = in_memory(model, pixels)
    result = xm.stream(model, pixels, tmp_path / "out", batch_size=4)
    close(read_map(tmp_path / "out").flatten(0, 1), expected.tokens[0])
    close(torch.from_numpy(result.logits), expected.logits[0])


@pytest.mark.parametrize(
    "bands, dtype", [(1, np.uint8), (2, np.float32), (3, np.uint16), (5, np.uint8)]
)
def test_any_bands_and_types(bands, dtype, tmp_path):
    model = small(in_chans=bands)
    pixels = scene(90, 150, bands, dtype)
    source = xm.open_image(pixels, axes="HWC")
    xm.stream(model, source, tmp_path / "out")
    close(read_map(tmp_path / "out").flatten(0, 1), in_memory(model, pixels).tokens[0])
    assert Image.open(tmp_path / "out" / "preview.png").mode == "RGB"


class _SlowSource:
    """Delays each read at random, so that reads finish out of order; counts those under way."""

    def __init__(self, source, seed=0, fail_at=None):
        self._source, self._random, self._fail_at = source, random.Random(seed), fail_at
        self._lock, self.reads, self.open_reads, self.most = threading.Lock(), 0, 0, 0

    def read(self, *window, **options):
        with self._lock:
            self.reads += 1
            number = self.reads
            self.open_reads += 1
            self.most = max(self.most, self.open_reads)
            delay = self._random.random() * 0.02
        time.sleep(delay)
        with self._lock:
            self.open_reads -= 1
        if number == self._fail_at:
            raise SourceError("scene.tif: tile 7 of level 0 at byte 123 is corrupt.")
        return self._source.read(*window, **options)

    def __getattr__(self, name):
        return getattr(self._source, name)


def tokens_of(model, source, **options):
    out = {}
    for chunk in stream_chunks(model, source, **options):
        out[chunk.regions] = chunk.tokens.clone()
    return out


@pytest.mark.parametrize("readers, batch_size", [(1, 1), (2, 3), (4, 5), (8, 1), (3, 100)])
def test_independent_of_batches_threads_and_read_order(readers, batch_size):
    model = small()
    source = xm.open_image(scene())
    expected = tokens_of(model, source, batch_size=3, readers=1)
    ours = tokens_of(model, _SlowSource(source, readers), batch_size=batch_size, readers=readers)
    assert list(ours) == list(expected)
    for chunk, tokens in expected.items():
        close(ours[chunk], tokens)
        if batch_size == 3:
            assert torch.equal(ours[chunk], tokens)


def page(dtype=np.uint8, seed=0):
    """A page of 5 x 8 regions, the last row and column cut off: 70 % paper, print, a repeated
    stamp, and a grey that is nearly the paper's."""
    height, width = 4 * 64 + 20, 7 * 64 + 30
    rng = np.random.default_rng(seed)
    pixels = np.full((height, width, 3), 240, dtype)
    for row, col in [(0, 1), (0, 2), (1, 1), (2, 5), (2, 6), (3, 0), (4, 3), (4, 7)]:
        block = pixels[row * 64 : row * 64 + 64, col * 64 : col * 64 + 64]
        block[:] = rng.integers(0, 255, block.shape)
    for row, col in [(1, 3), (1, 6), (3, 4)]:
        pixels[row * 64 : row * 64 + 64, col * 64 : col * 64 + 64] = pixels[:64, 64:128]
    pixels[2 * 64 + 37, 3 * 64 + 41, 1] += 1
    return pixels


def encoded_and_tokens(model, source, **options):
    ids = []
    tokens = tokens_of(model, source, on_regions=lambda batch, _: ids.extend(batch), **options)
    return ids, tokens


@pytest.mark.parametrize("tiling", ["row", "zigzag", "two-stream"])
@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_regions_with_identical_pixels_are_encoded_once(tiling, batch_size):
    model = small(tiling=tiling)
    source = xm.open_image(page(), axes="HWC")
    plain, expected = encoded_and_tokens(model, source, batch_size=batch_size, reuse=False)
    ids, ours = encoded_and_tokens(model, source, batch_size=batch_size)
    assert len(plain) == 40 + 4 * (tiling == "two-stream")
    # 8 of print, 1 nearly blank, blanks of 4 sizes but the corner is print: 3.
    assert len(ids) == len(set(ids)) == 8 + 1 + 3
    assert list(ours) == list(expected)
    for chunk, tokens in expected.items():
        assert torch.equal(ours[chunk], tokens)


@pytest.mark.parametrize("context", ["xl", "hyper", None])
def test_reuse_leaves_every_written_byte_as_it_was(context, tmp_path):
    model = small(context, residual=context == "xl", num_classes=4)
    source = xm.open_image(page(np.uint16), axes="HWC")
    results = [
        xm.stream(model, source, tmp_path / str(reuse), reuse=reuse) for reuse in (True, False)
    ]
    assert [r.stats.reused for r in results] == [28, 0]
    assert results[0].stats.regions == results[1].stats.regions == 40
    names = {p.relative_to(tmp_path / "True") for p in (tmp_path / "True").rglob("*")}
    assert len(names) > 5
    for name in names - {Path("run.json")}:
        ours, plain = tmp_path / "True" / name, tmp_path / "False" / name
        assert ours.is_dir() or ours.read_bytes() == plain.read_bytes(), name
    np.testing.assert_array_equal(results[0].embedding, results[1].embedding)
    np.testing.assert_array_equal(results[0].logits, results[1].logits)


@pytest.mark.parametrize(
    "limit", ["xt_models.encoding.CACHE_BYTES", "xt_models.streaming.MAX_WAITING"]
)
def test_reuse_within_the_smallest_limits(limit, monkeypatch):
    model = small()
    source = xm.open_image(page(), axes="HWC")
    _, expected = encoded_and_tokens(model, source, reuse=False)
    monkeypatch.setattr(limit, 1)
    ids, ours = encoded_and_tokens(model, source)
    assert len(ids) < 40
    assert all(torch.equal(ours[chunk], tokens) for chunk, tokens in expected.items())


def test_waiting_for_a_full_batch_is_bounded(monkeypatch):
    monkeypatch.setattr("xt_models.streaming.MAX_WAITING", 30)
    source = _SlowSource(xm.open_image(np.zeros((64, 64 * 200), np.uint8), axes="HW"))
    model = small(in_chans=1)
    next(stream_chunks(model, source, batch_size=16, readers=1))
    assert source.reads < 6


def test_bits_count_not_values():
    pixels = np.zeros((64, 64 * 4, 1), np.float32)
    pixels[:, 64:128] = -0.0
    pixels[5, 200] = -0.0
    source = xm.open_image(pixels, axes="HWC")
    ids, _ = encoded_and_tokens(small(in_chans=1), source)
    assert ids == [0, 1, 3]


def test_nothing_is_reused_where_slots_of_a_batch_round_differently(monkeypatch):
    model = small()
    source = xm.open_image(page(), axes="HWC")
    plain = model.region_encoder.forward

    def uneven(regions):
        return plain(regions) * (1 + torch.arange(len(regions))[:, None, None, None] * 1e-6)

    monkeypatch.setattr(model.region_encoder, "forward", uneven)
    ids, ours = encoded_and_tokens(model, source)
    assert len(ids) == 40
    expected = tokens_of(model, source, reuse=False)
    assert all(torch.equal(ours[chunk], tokens) for chunk, tokens in expected.items())


def test_regions_of_nodata_are_left_out(tmp_path):
    """The tokens of the others are those of a model whose chunks hold only them."""
    model = small(residual=True, num_classes=2)
    pixels = page()
    source = xm.open_image(pixels, axes="HWC")
    source.metadata["nodata"] = 240
    result = xm.stream(model, source, tmp_path / "out", drop="nodata", batch_size=4)
    tokens = read_map(tmp_path / "out")
    blank = tokens.isnan().all(-1)
    assert (tokens.isnan().any(-1) == blank).all()
    grid = model.grid(*pixels.shape[:2])
    boxes = [grid.box(region) for region in range(40)]
    kept = [
        i for i, (y, x, h, w) in enumerate(boxes) if (pixels[y : y + h, x : x + w] != 240).any()
    ]
    assert len(kept) == 12 and result.stats.left_out == 28
    expected = torch.zeros(10, 16, dtype=torch.bool)
    for region in kept:
        row, col = region // 8 * 2, region % 8 * 2
        expected[row : row + 2, col : col + 2] = True
    assert torch.equal(~blank, expected[: blank.shape[0], : blank.shape[1]])
    assert result.stats.tokens == int((~blank).sum())
    close(torch.from_numpy(result.embedding), tokens[~blank].mean(0))

    memory = None
    with torch.inference_mode():
        regions = model.extract(torch.from_numpy(pixels).permute(2, 0, 1), grid)
        features, raw, _ = model.encode(regions)
        for step in model.walk(grid):
            chunk = [region for region in step.regions if region in kept]
            if not chunk:
                continue
            sequence = model.stitch(features[None, chunk], grid, chunk, chunk)
            plain = model.stitch(raw[None, chunk], grid, chunk, chunk, position=False)
            mixed, _, memory = model.mix(sequence, plain, memory)
            places = map_index(grid.placement(chunk, model.stride), grid, model.stride)
            close(tokens.flatten(0, 1)[places], mixed[0])
    assert Image.open(tmp_path / "out" / "preview.png").width == 2 * pixels.shape[1] + 8


def test_nodata_that_is_not_a_number_is_left_out_before_it_is_refused():
    pixels = scene(128, 128, 1, np.float32)
    pixels[:64, :64] = np.nan
    source = xm.open_image(pixels, axes="HWC")
    source.metadata["nodata"] = "nan"
    assert xm.stream(small(in_chans=1), source, drop="nodata").stats.left_out == 1
    pixels[100, 100] = np.nan
    with pytest.raises(SourceError, match="found nan at row 100, column 100"):
        xm.stream(small(in_chans=1), source, drop="nodata")


def test_dropping_is_refused_without_a_value_or_without_a_rest(tmp_path):
    with pytest.raises(ValueError, match="array names no nodata value"):
        xm.stream(small(), scene(64, 64), drop="nodata")
    with pytest.raises(SourceError, match="found all left out"):
        xm.stream(small(), np.zeros((70, 70, 3), np.uint8), tmp_path / "out", drop=0)


def damaged_tiff(path, tiles):
    tifffile.imwrite(path, scene(200, 330), tile=(64, 64), compression="deflate", photometric="rgb")
    with tifffile.TiffFile(path) as file:
        offsets = [file.pages[0].dataoffsets[tile] for tile in tiles]
    with path.open("r+b") as raw:
        for offset in offsets:
            raw.seek(offset)
            raw.write(b"\xff" * 64)


def test_a_damaged_tile_stops_the_run_or_is_recorded(tmp_path):
    path = tmp_path / "scene.tif"
    damaged_tiff(path, [7, 8])
    model = small()
    with pytest.raises(SourceError, match=r"tile 7 .row 1, column 1. of level 0 in .* at byte \d"):
        xm.stream(model, path, tmp_path / "out", batch_size=4)
    with pytest.raises(ValueError, match="on_bad_tile must be one of stop, mask, got 'skip'"):
        xm.stream(model, path, on_bad_tile="skip")
    result = xm.stream(model, path, tmp_path / "out", batch_size=4, on_bad_tile="mask")
    assert result.stats.left_out == 2
    nan = read_map(tmp_path / "out").isnan().all(-1)
    assert nan.sum() == 8 and nan[2:4, 2:6].all()
    record = json.loads((tmp_path / "out" / "run.json").read_text())["run"]["left_out"]
    assert list(record) == ["7", "8"]
    assert "tile 7 (row 1, column 1) of level 0" in record["7"] and "at byte" in record["7"]


@pytest.mark.parametrize("late", [6, 24])
def test_a_file_that_changes_while_it_is_read_stops_the_run(late, tmp_path):
    path = tmp_path / "scene.tif"
    tifffile.imwrite(path, scene(200, 330), tile=(64, 64), photometric="rgb")
    visits = []

    def change(count):
        visits.append(count)
        if sum(visits) == late:
            with path.open("ab") as file:
                file.write(b"more")

    with pytest.raises(SourceError, match=r"scene.tif: .* one that changed while it was open"):
        xm.stream(
            small(), path, tmp_path / "out", batch_size=6, progress=change, on_bad_tile="mask"
        )
    assert sum(visits) >= late
    assert not (tmp_path / "out").exists()


def test_a_file_that_vanishes_or_is_cut_off_while_it_is_read(tmp_path):
    path, removed = tmp_path / "scene.tif", tmp_path / "removed.tif"
    for name in (path, removed):
        tifffile.imwrite(name, scene(200, 330), tile=(64, 64), photometric="rgb")
    expected = xm.stream(small(), path, batch_size=6).embedding
    options = {"batch_size": 6, "readers": 1}
    # Open files outlive their names.
    result = xm.stream(small(), removed, progress=lambda _: removed.unlink(True), **options)
    np.testing.assert_array_equal(result.embedding, expected)
    with pytest.raises(
        SourceError, match=r"scene.tif: expected .*, found (the end|one that chang)"
    ):
        xm.stream(small(), path, tmp_path / "out", progress=lambda _: os.truncate(path, 50_000),
                  **options)  # fmt: skip
    assert [p.name for p in tmp_path.iterdir()] == ["scene.tif"]


def test_memory_of_windows_is_used_again_when_nobody_holds_it():
    empty = Buffers()
    window = empty((3, 40, 50), np.dtype(np.uint16))
    assert window.shape == (3, 40, 50) and window.dtype == np.uint16 and window.flags.writeable
    address = window.ctypes.data
    held = [window.transpose(1, 2, 0)[3:5], torch.from_numpy(window[1:])]
    del window
    while held:
        assert empty((3, 40, 50), np.dtype(np.uint16)).ctypes.data != address
        held.pop()
    again = empty((6000,), np.dtype(np.uint16))
    assert again.ctypes.data == address
    assert empty((0,), np.dtype(np.uint8)).size == 0


def test_reading_ahead_is_bounded():
    model = small()
    source = _SlowSource(xm.open_image(scene(64, 64 * 40)))
    ahead = []
    for k, _ in enumerate(stream_chunks(model, source, batch_size=1, readers=2)):
        ahead.append(source.reads - 3 * (k + 1))
    assert max(ahead) <= 4 and source.most <= 2
    assert source.reads == 40


def test_an_abandoned_walk_stops_its_threads():
    model = small()
    source = _SlowSource(xm.open_image(scene(64, 64 * 40)))
    walk = stream_chunks(model, source, batch_size=1)
    next(walk)
    walk.close()
    reads = source.reads
    time.sleep(0.1)
    assert source.reads == reads < 40
    assert not [t for t in threading.enumerate() if t.name.startswith("xt-reader")]


def test_files_that_are_written(tmp_path):
    model = small(num_classes=6)
    source = xm.open_image(scene())
    source.metadata |= {
        "crs": "EPSG:32633",
        "transform": [10, 0, 500, 0, -10, 900],
        "mpp": [0.5, 0.25],
    }
    result = xm.stream(model, source, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "embedding.json", "preview.png", "run.json", "tokens.zarr",
    ]  # fmt: skip
    array = zarr.open_array(str(tmp_path / "out" / "tokens.zarr"), mode="r")
    assert array.shape == (7, 11, 32) and array.dtype == np.float32
    attributes = dict(array.attrs)
    assert attributes["stride"] == 32 and attributes["origin"] == [0, 0]
    assert attributes["image_size"] == [200, 330]
    assert attributes["crs"] == "EPSG:32633"
    assert attributes["transform"] == [320, 0, 500, 0, -320, 900]
    assert attributes["mpp"] == [16, 8]
    record = json.loads((tmp_path / "out" / "embedding.json").read_text())
    np.testing.assert_array_equal(np.float32(record["embedding"]), result.embedding)
    assert sum(record["scores"]) == pytest.approx(1) and len(record["scores"]) == 6
    assert record["top"][0][0] == int(result.logits.argmax())
    stats = json.loads((tmp_path / "out" / "run.json").read_text())["run"]["stats"]
    assert stats["regions"] == 24 and stats["tokens"] == 77
    assert result.stats.chunks == 8 and result.stats.regions_per_s > 0
    assert result.stats.bytes_read > 0


def test_preview_shows_the_image_beside_its_components(tmp_path):
    pixels = np.zeros((256, 320, 3), np.uint8)
    pixels[:128, :, 0] = 200  # upper half red, lower half blue
    pixels[128:, :, 2] = 200
    xm.stream(small(), pixels, tmp_path / "out")
    picture = np.asarray(Image.open(tmp_path / "out" / "preview.png"))
    assert picture.shape == (256, 320 + 8 + 320, 3)
    assert (picture[:128, :320] == [200, 0, 0]).all()
    assert (picture[128:, :320] == [0, 0, 200]).all()
    right = picture[:, 328:].astype(int)
    assert right.std() > 10
    assert (right[:32, :32] == right[0, 0]).all(), "one token is one flat square"


def test_training_mode_comes_back_and_nothing_is_recorded():
    model = small().train()
    result = xm.stream(model, scene(64, 64))
    assert model.training and result.out is None
    assert all(p.grad is None for p in model.parameters())


def nothing_left(folder):
    assert list(folder.iterdir()) == []


def test_refuses_pixels_that_are_not_finite(tmp_path):
    model = small(in_chans=2)
    pixels = scene(150, 150, 2, np.float32)
    pixels[70, 130, 1] = np.inf
    source = xm.open_image(pixels, axes="HWC")
    with pytest.raises(
        SourceError, match="found inf at row 70, column 130, band 2; choose a value"
    ):
        xm.stream(model, source, tmp_path / "out")
    nothing_left(tmp_path)
    filled = xm.stream(model, source, fill=0.0)
    pixels[70, 130, 1] = 0
    close(torch.from_numpy(filled.embedding), in_memory(model, pixels).embedding[0])


def test_bands_are_chosen_or_refused():
    model = small()
    pixels = scene(70, 70, 5)
    source = xm.open_image(pixels, axes="HWC")
    with pytest.raises(
        ValueError, match="array has 5 bands and the model takes 3: choose 3 of them"
    ):
        xm.stream(model, source)
    for bands in ([0, 1], [0, 1, 5], [-1, 0, 1]):
        with pytest.raises(ValueError, match=r"bands must be 3 numbers in \[0, 5\)"):
            xm.stream(model, source, bands=bands)
    chosen = xm.stream(model, source, bands=[4, 0, 2])
    expected = in_memory(model, np.ascontiguousarray(pixels[..., [4, 0, 2]]))
    close(torch.from_numpy(chosen.embedding), expected.embedding[0])


@pytest.mark.parametrize(
    "name, value, said",
    [
        ("batch_size", 0, "must be at least 1, got 0"),
        ("readers", 0, "must be at least 1, got 0"),
        ("batch_size", 2.5, "must be a whole number, got 2.5"),
        ("readers", None, "must be a whole number, got None"),
        ("precision", "bf16", "must be one of float32, bfloat16, float16, got 'bf16'"),
        ("precision", "int8", "must be one of float32, bfloat16, float16, got 'int8'"),
        ("drop", "nothing", "must be a number, 'nodata' or None, got 'nothing'"),
        ("fill", float("nan"), "must be a finite number or None, got nan"),
        ("checkpoint_seconds", -1, "must be a number of at least 0, got -1"),
        ("maps", "classes", "must be one of prediction, logits, got 'classes'"),
    ],
)
def test_refuses_options_before_any_work(name, value, said, tmp_path):
    with pytest.raises(ValueError, match=f"stream: {name} {said}"):
        xm.stream(small(), scene(64, 64), tmp_path / "out", **{name: value})
    nothing_left(tmp_path)
    if name in ("batch_size", "precision", "drop"):
        with pytest.raises(ValueError, match=f"stream: {name} {said}"):
            xm.plan(small(), xm.open_image(scene(64, 64)), **{name: value})


def test_the_batch_size_that_nobody_chose():
    swin = SimpleNamespace(config=SimpleNamespace(encoder="swinv2_tiny_window16_256"))
    swin.parameters = lambda: iter([torch.zeros(1)])
    assert (default_batch_size(swin), default_batch_size(small())) == (8, 16)


def test_numbers_of_other_libraries_are_taken(tmp_path):
    xm.stream(small(), scene(64, 64), tmp_path / "out", batch_size=np.int64(2), fill=np.float32(0))


def test_output_that_exists_is_kept(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    with pytest.raises(FileExistsError, match="exists already: name another, or remove it"):
        xm.stream(small(), scene(64, 64), tmp_path / "out")
    assert (tmp_path / "out" / "mine").read_text() == "kept"
    (tmp_path / "new.part").mkdir()
    (tmp_path / "new.part" / "mine").write_text("kept")
    with pytest.raises(FileExistsError, match="holds mine and no journal of a run"):
        xm.stream(small(), scene(64, 64), tmp_path / "new")
    with pytest.raises(FileNotFoundError, match="does not exist: make it first"):
        xm.stream(small(), scene(64, 64), tmp_path / "no" / "out")


@pytest.mark.parametrize("fail_at", [1, 3])
def test_a_failing_read_leaves_nothing(tmp_path, fail_at):
    class Failing(_SlowSource, type(xm.open_image(scene(64, 64)))):
        pass

    source = Failing.__new__(Failing)
    _SlowSource.__init__(source, xm.open_image(scene()), fail_at=fail_at)
    for name in ("name", "height", "width", "bands", "dtype", "metadata"):
        setattr(source, name, getattr(source._source, name))
    with pytest.raises(SourceError, match="tile 7 of level 0 at byte 123 is corrupt"):
        xm.stream(small(), source, tmp_path / "out", batch_size=1)
    nothing_left(tmp_path)


def test_an_interrupt_leaves_nothing(tmp_path):
    def interrupt(count):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        xm.stream(small(), scene(), tmp_path / "out", progress=interrupt)
    nothing_left(tmp_path)
    assert not [t for t in threading.enumerate() if t.name.startswith("xt-reader")]


def test_progress_counts_every_visit():
    seen = []
    model = small(tiling="two-stream")
    xm.stream(model, scene(), batch_size=5, progress=seen.append)
    assert sum(seen) == sum(len(s.regions) for s in model.walk(model.grid(200, 330))) == 24 + 6


def test_plan_counts_what_the_run_then_does(tmp_path):
    for model in (small(tiling="two-stream"), small("mamba"), small(None)):
        source = xm.open_image(scene())
        plan = xm.plan(model, source, batch_size=4, out=tmp_path)
        stats = xm.stream(model, source, batch_size=4).stats
        assert (plan.regions, plan.visits, plan.tokens) == (24, stats.regions, stats.tokens)
        assert plan.chunks == stats.chunks
        assert plan.output_bytes == 7 * 11 * model.num_features * 4
        assert plan.fits and plan.seconds > 0 and plan.memory > 0
        assert 0 < plan.disk_free <= free_disk(tmp_path) * 1.5


class _Blank(type(xm.open_image(np.zeros((1, 1), np.uint8)))):
    """An array of any size that holds nothing but its first pixel."""

    def __init__(self, height, width):
        super().__init__("array", [np.full((1, 1), 7, np.uint8)], "yx", {})
        self.height, self.width = height, width
        self.level_sizes = ((height, width),)

    def _read(self, window, level, empty):
        return np.full((1, *window[2:]), 7, np.uint8)


def test_plan_works_out_long_sequences_from_two_short_ones(monkeypatch):
    def cost(model, tokens, device, dtype):
        return 3e-6 * tokens + 2e-9 * tokens**2, 1000 * tokens

    monkeypatch.setattr("xt_models.planning._mix_cost", cost)
    for name in ("TRIAL_SECONDS", "SAMPLE_SECONDS"):
        monkeypatch.setattr(f"xt_models.planning.{name}", 0.2)
    source = _Blank(8192, 8192)
    model = small("vit", chunk_regions=None, pool="mean", in_chans=1)
    plan = xm.plan(model, source)
    tokens = 256**2
    assert plan.chunk_tokens == plan.tokens == tokens
    assert plan.seconds > 3e-6 * tokens + 2e-9 * tokens**2
    assert plan.memory > 1000 * tokens
    assert plan.reused > 0.98
    monkeypatch.setattr("xt_models.planning.available_memory", lambda: 900 * tokens)
    assert plan.fits and not xm.plan(model, source).fits


def test_plan_foretells_how_many_are_reused():
    pixels = np.tile(scene(64, 64 * 16), (12, 1, 1))
    pixels[64 * 8 :] = 255
    source, model = xm.open_image(pixels), small()
    for options, share in (({}, 1 - 17 / 192), ({"reuse": False}, 0), ({"drop": 255}, 176 / 192)):
        assert xm.plan(model, source, **options).reused == pytest.approx(share)
        stats = xm.stream(model, source, **options).stats
        assert (stats.reused + stats.left_out) / stats.regions == pytest.approx(share)
    assert xm.plan(model, source, drop=255, reuse=False).reused == pytest.approx(64 / 192)


HEADS = {"ground": {"kind": "dense", "classes": 4}}


@pytest.mark.parametrize(
    "context, options, pixels",
    [
        ("xl", {"chunk_regions": 8}, scene(64 * 16, 64 * 20)),
        ("xl", {"chunk_regions": 8, "heads": HEADS}, scene(64 * 12, 64 * 16)),
        ("xl", {"chunk_regions": 8}, np.tile(scene(64 * 6, 64 * 20), (3, 1, 1))),
        ("hyper", {"chunk_regions": None, "dim": 64}, scene(64 * 16, 64 * 20)),
    ],
    ids=["plain", "heads", "repeated", "whole image"],
)
def test_plan_foretells_the_time_of_a_real_run(context, options, pixels, tmp_path, monkeypatch):
    """By the processor time of the main thread, which others on the machine move little."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    clock = SimpleNamespace(perf_counter=time.thread_time)
    for module in ("planning", "profiling", "streaming"):
        monkeypatch.setattr(f"xt_models.{module}.time", clock)
    monkeypatch.setattr("xt_models.planning.TRIAL_SECONDS", 0.5)
    model, source, ratios = small(context, **options), xm.open_image(pixels), []
    try:
        xm.stream(model, source)  # what is done once in a process
        for i in range(3):
            plan = xm.plan(model, source)
            ratios.append(plan.seconds / xm.stream(model, source, tmp_path / str(i)).stats.seconds)
    finally:
        torch.set_num_threads(threads)
    assert sorted(ratios)[1] == pytest.approx(1, rel=0.3), ratios


@pytest.mark.parametrize("blank", [False, True])
def test_plan_foretells_the_time(blank, monkeypatch):
    """By a clock that only these move: a batch 40 ms, a chunk 20 ms, a region cut out 1 ms."""
    model = small(chunk_regions=8)
    clock = SimpleNamespace(now=0.0, perf_counter=lambda: clock.now)
    for module in ("planning", "profiling", "streaming"):
        monkeypatch.setattr(f"xt_models.{module}.time", clock)

    def takes(method, seconds):
        def slow(*args, **options):
            clock.now += seconds(*args)
            return method(*args, **options)

        monkeypatch.setattr(model, method.__name__, slow)

    takes(model.encode, lambda *_: 0.04)
    takes(model.mix, lambda *_: 0.02)
    takes(model.extract, lambda pixels, grid, regions, *_: 0.001 * len(regions))
    monkeypatch.setattr("xt_models.planning.TRIAL_SECONDS", 0.5)
    pixels = scene(64 * 10, 64 * 16)
    if blank:
        pixels[64 * 4 :] = 255
    source = xm.open_image(pixels)
    plan = xm.plan(model, source, batch_size=4)
    assert plan.reused == pytest.approx(95 / 160 if blank else 0, abs=0.01)
    assert clock.now < 1
    stats = xm.stream(model, source, batch_size=4).stats
    assert stats.reused == (95 if blank else 0)
    assert stats.seconds == pytest.approx(1.185 if blank else 2.16)
    assert plan.seconds == pytest.approx(stats.seconds, rel=0.1), plan


def test_plan_foretells_the_memory():
    """In processes of their own, since what one run took stays with the process."""
    code = """
import sys, warnings
from xt_models.host import keep_memory_flat
keep_memory_flat()
import numpy as np, torch
import xt_models as xm
warnings.simplefilter("ignore")
torch.set_num_threads(1)
model = xm.create_model("convnext_atto", context="xl", seed=0)
source = xm.open_image(np.random.default_rng(0).integers(0, 255, (2048, 2048, 3), dtype=np.uint8))
if sys.argv[1] == "plan":
    print(xm.plan(model, source).memory)
else:
    stats = xm.stream(model, source, sys.argv[2]).stats
    print(stats.peak_memory - stats.base_memory)
"""
    with tempfile.TemporaryDirectory() as folder:
        numbers = [
            int(subprocess.run([sys.executable, "-c", code, what, f"{folder}/out"],
                               capture_output=True, text=True, check=True).stdout)
            for what in ("plan", "run")
        ]  # fmt: skip
    assert numbers[0] == pytest.approx(numbers[1], rel=0.15), numbers


def test_batch_size_is_chosen_by_measurement_within_memory(monkeypatch):
    model, source = small(), xm.open_image(scene(64, 64))
    costs = {1: (0.010, 10), 2: (0.012, 20), 4: (0.020, 40), 8: (0.0392, 80), 16: (0.09, 160)}

    ran = []

    def measure(run, device):
        ran.append(len(run.__self__.regions))
        seconds, mib = costs.get(ran[-1], (9.0, 999))
        return seconds, mib << 20

    monkeypatch.setattr("xt_models.planning._measure", measure)
    monkeypatch.setattr("xt_models.planning._chunk_cost", lambda *_: (5 << 20, 0.0, 70 << 20))
    size, tried, memory = choose_batch_size(model, source, memory=1 << 30)
    assert size == 4 and tried[4] == 0.005  # 8 is 2 % faster and not worth twice the memory
    assert memory == pytest.approx((96 + 5 + 70) << 20, rel=0.01)  # more than the 40 of the batch
    ran.clear()
    assert choose_batch_size(model, source, memory=130 << 20)[0] == 2
    assert ran == [1, 2], "four would not fit, and are not tried"
    with pytest.raises(ValueError, match="memory must hold one region's activations and 96 MiB"):
        choose_batch_size(model, source, memory=50 << 20)


def test_heads_and_context_count_in_the_memory_of_a_batch_size(monkeypatch):
    ran = []

    def measure(run, device):
        is_encoder = isinstance(getattr(run, "__self__", None), BatchEncoder)
        ran.append("encoder" if is_encoder else "other")
        run()
        return 0.01, (10 if is_encoder else 300) << 20

    monkeypatch.setattr("xt_models.planning._measure", measure)
    source = xm.open_image(scene(640, 640))
    for context, heads, needed in ((None, {}, 106), (None, HEADS, 396), ("xl", {}, 396)):
        ran.clear()
        model = small(context, heads=heads)
        choice = choose_batch_size(model, source, memory=200 << 20)
        assert choice.memory / 2**20 == pytest.approx(needed, abs=4)
        assert ran.count("other") == (needed == 396)
    assert choose_batch_size(small(None, heads=HEADS), source, heads=False).memory < 110 << 20


def test_the_region_encoder_in_another_precision(tmp_path):
    model = small(num_classes=2)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    exact = xm.stream(model, page(), tmp_path / "exact")
    rough = xm.stream(model, page(), tmp_path / "rough", precision="bfloat16")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    difference = np.abs(rough.embedding - exact.embedding).max() / np.abs(exact.embedding).max()
    assert 0 < difference < 0.05
    assert rough.stats.reused == exact.stats.reused == 28
    same = xm.stream(model, page(), tmp_path / "again", precision="bfloat16", reuse=False)
    np.testing.assert_array_equal(same.embedding, rough.embedding)
    same = xm.stream(model, page(), precision="float32")
    np.testing.assert_array_equal(same.embedding, exact.embedding)


@pytest.mark.parametrize("gain, chosen", [(1.1, "float32"), (1.5, "bfloat16")])
def test_precision_is_chosen_by_measurement(gain, chosen, monkeypatch):
    def measure(run, device):
        return (1.0 if run.__self__.regions.dtype == torch.float32 else 1 / gain), 0

    monkeypatch.setattr("xt_models.planning._measure", measure)
    name, speeds = choose_precision(small())
    assert name == chosen and speeds["bfloat16"] == pytest.approx(4 * gain)


def test_a_device_that_runs_out_of_memory_gets_half_the_batch(monkeypatch):
    model, source = small(), xm.open_image(scene())
    expected = tokens_of(model, source, batch_size=3)
    plain, sizes = model.encode, []

    def small_device(regions, *rest, **options):
        sizes.append(len(regions))
        if len(regions) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return plain(regions, *rest, **options)

    monkeypatch.setattr(model, "encode", small_device)
    for batch_size, tried in ((12, [12, 6]), (5, [5])):
        sizes.clear()
        ours = tokens_of(model, source, batch_size=batch_size)
        assert sizes[: len(tried)] == tried and set(sizes[len(tried) :]) == {3}
        assert all(torch.equal(ours[chunk], tokens) for chunk, tokens in expected.items())

    def no_device(regions, *rest, **options):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(model, "encode", no_device)
    with pytest.raises(torch.OutOfMemoryError):
        tokens_of(model, source, batch_size=12)


def test_images_of_all_sizes_are_encoded_by_what_was_compiled_once(monkeypatch):
    from torch._dynamo.utils import counters

    monkeypatch.setattr("xt_models.encoding.COMPILER", "aot_eager")
    model, graphs = small(), []
    for size in ((200, 330), (64, 64), (130, 500)):
        source = xm.open_image(scene(*size))
        plain = tokens_of(model, source, batch_size=4)
        for _ in range(2):
            compiled = tokens_of(model, source, batch_size=4, compile=True)
            graphs.append(counters["stats"]["unique_graphs"])
            for chunk, tokens in plain.items():
                close(compiled[chunk], tokens)
    assert len(set(graphs)) == 1 and graphs[0] > 0
    assert not counters["graph_break"]
    again = BatchEncoder(model, 4, compiled=True)
    monkeypatch.delattr(again.__class__, "encode")
    again.warm_up()  # was done for the model and this shape


def test_the_time_of_compiling_is_told_apart(monkeypatch):
    def warm_up(encoder):
        time.sleep(0.5)

    monkeypatch.setattr("xt_models.encoding.BatchEncoder.warm_up", warm_up)
    monkeypatch.setattr("xt_models.encoding._compiled_encode", lambda *_: xm.XT.encode)
    monkeypatch.setattr("xt_models.planning.TRIAL_SECONDS", 0.2)
    source, profile = xm.open_image(scene(64 * 10, 64 * 16)), Profile()
    list(stream_chunks(small(), source, batch_size=4, compile=True, spans=profile))
    profile.finish()
    seconds = {name: each for name, each, _ in profile.table()}
    assert seconds["compile"] >= 0.5 and profile.lengths("compile") == [seconds["compile"]]
    assert profile.busy == (seconds["encode"] + seconds["context"]) / profile.wall
    # Were it counted as work of the batches seen, 160 visits would take at least 20 s.
    assert 0.5 < xm.plan(small(), source, batch_size=4, compile=True).seconds < 15


def test_host_memory_is_measured():
    reset_peak_rss()
    base = current_rss()
    # A map of its own: the heap may have kept as much from other tests.
    with mmap.mmap(-1, 64 << 20) as block:
        np.frombuffer(block, np.uint8).fill(1)
        assert peak_rss() - base > 60 << 20
    reset_peak_rss()
    assert peak_rss() - base < 32 << 20
    assert 0 < available_memory() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
