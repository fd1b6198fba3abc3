"""Many images into one folder: bad ones do not stop the rest, and a second start goes on."""

import json
import os
import shutil
import signal

import numpy as np
import pytest
import tifffile
from click.testing import CliRunner

from xt_models.cli import main
from xt_models.host import current_rss
from xt_models.journal import verify
from xt_models.manifest import embed_many, is_many, list_images, open_manifest

SMALL = ["--encoder", "convnext_atto", "--region", "64", "--chunk-regions", "3"]


def xt(*words):
    return CliRunner().invoke(main, [str(w) for w in words])


def write(path, seed=0, size=(70, 130), bands=3):
    path.parent.mkdir(exist_ok=True, parents=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, bands), dtype=np.uint8)
    tifffile.imwrite(path, pixels, compression="deflate", photometric="rgb" if bands == 3 else None)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "images"
    for i in range(3):
        write(folder / f"{i}.tif", i)
    write(folder / "more" / "0.tif", 9)
    (folder / "1b.tif").write_bytes(b"II*\0 no image")
    (folder / "notes.txt").write_text("not an image")
    (folder / ".hidden.tif").write_bytes(b"")
    return folder


def manifest_of(out):
    lines = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    assert "identity" in lines[0] and all(len(line["line_sha256"]) == 64 for line in lines)
    return lines[1:]


def test_a_folder_of_images_with_a_bad_one(folder, tmp_path):
    out = tmp_path / "out"
    result = xt("embed", folder, "-o", out, *SMALL)
    assert result.exit_code == 1
    assert "4 done, 0 done before, 1 failed of 5" in result.output
    assert "Error: 1 of 5 images failed" in result.output
    assert "Traceback" not in result.output
    entries = manifest_of(out)
    assert [e["image"] for e in entries] == ["0.tif", "1.tif", "1b.tif", "2.tif", "more/0.tif"]
    assert [e["status"] for e in entries] == ["done", "done", "failed", "done", "done"]
    assert "1b.tif: expected" in entries[2]["reason"]
    assert all(e["seconds"] > 0 and len(e["sha256"]) == 64 for e in entries if "sha256" in e)
    for entry in entries:
        whole = (out / entry["image"] / "embedding.json").exists()
        assert whole == (entry["status"] == "done")
    assert xt("verify", out).exit_code == 0

    write(folder / "1b.tif", 7)
    result = xt("embed", folder, "-o", out, *SMALL)
    assert result.exit_code == 0, result.output
    assert "1 done, 4 done before, 0 failed of 5" in result.output
    (out / "2.tif" / "preview.png").write_bytes(b"flipped")
    result = xt("verify", out)
    assert result.exit_code == 1 and "2.tif: preview.png was changed." in result.output


def test_another_model_setting_or_image_is_refused(folder, tmp_path):
    out = tmp_path / "out"
    (folder / "1b.tif").unlink()
    assert xt("embed", folder, "-o", out, *SMALL).exit_code == 0
    before = (out / "manifest.jsonl").read_bytes()
    for words, said in (
        (["--batch-size", 3], "settings batch_size was 16 and is 3"),
        (["--seed", 1], "model weights was "),
        (["--region", 128], "model region was 64 and is 128"),
    ):
        result = xt("embed", folder, "-o", out, *SMALL, *words)
        assert result.exit_code == 1
        assert f"was begun differently: {said}" in result.output
    assert (out / "manifest.jsonl").read_bytes() == before
    write(folder / "1.tif", 17)
    for _ in range(2):
        result = xt("embed", folder, "-o", out, *SMALL)
        assert result.exit_code == 1 and "0 done, 3 done before, 1 failed of 4" in result.output
        assert "1.tif is not what" in result.output and "image sha256 was" in result.output
    entries = {entry["image"]: entry["status"] for entry in manifest_of(out)}
    assert entries["1.tif"] == "failed" and entries["2.tif"] == "done"
    shutil.rmtree(out / "1.tif")
    result = xt("embed", folder, "-o", out, *SMALL)
    assert result.exit_code == 0 and "1 done, 3 done before" in result.output


def test_verify_finds_any_flipped_byte_of_the_manifest(folder, tmp_path):
    out = tmp_path / "out"
    (folder / "0.tif").write_bytes(b"the first one is bad")
    xt("embed", folder, "-o", out, *SMALL)
    path = out / "manifest.jsonl"
    good = path.read_bytes()
    assert manifest_of(out)[0]["image"] == "0.tif"
    assert verify(out) == []
    rng = np.random.default_rng(0)
    for at in {0, len(good) - 1, good.index(b"done"), *rng.integers(len(good), size=40).tolist()}:
        bad = bytearray(good)
        bad[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(bad)
        assert "manifest.jsonl: " in verify(out)[0], at
    path.write_bytes(good.replace(b'"done"', b'"donf"', 1))
    assert verify(out) == ["manifest.jsonl: line 3 was changed."]
    result = xt("embed", folder, "-o", out, *SMALL)
    assert result.exit_code == 1 and "manifest.jsonl: line 3 was changed" in result.output
    path.write_bytes(good[:-20])
    assert verify(out) == ["manifest.jsonl: its last line is cut off."]
    assert path.read_bytes() == good[:-20]


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_stopped_command_says_that_it_goes_on(number, code, folder, tmp_path, monkeypatch):
    from xt_models.streaming import stream

    def stop(model, source, out, **options):
        if out.name == "2.tif":
            signal.raise_signal(number)
        return stream(model, source, out, **options)

    monkeypatch.setattr("xt_models.streaming.stream", stop)
    out = tmp_path / "out"
    result = xt("embed", folder, "-o", out, *SMALL)
    assert result.exit_code == code
    assert f"{out} is kept: the same command goes on from there." in result.output
    monkeypatch.undo()
    result = xt("embed", folder, "-o", out, *SMALL)
    assert "2 done, 2 done before, 1 failed of 5" in result.output


def test_one_image_of_many_is_the_same_as_alone(folder, tmp_path):
    assert xt("embed", folder, "-o", tmp_path / "out", *SMALL).exit_code == 1
    assert xt("embed", folder / "2.tif", "-o", tmp_path / "alone", *SMALL).exit_code == 0
    block = "tokens.zarr/c/0/0/0"
    ours = (tmp_path / "out" / "2.tif" / block).read_bytes()
    assert ours == (tmp_path / "alone" / block).read_bytes()


def test_a_list_of_images(folder, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text(f"# mine\nimages/1.tif\n\n{folder}/more/0.tif\nimages/none.tif\n")
    images = list_images(names)
    assert [image.name for image in images] == ["1.tif", "more/0.tif", "none.tif"]
    result = xt("embed", names, "-o", tmp_path / "out", *SMALL)
    assert result.exit_code == 1 and "2 done, 0 done before, 1 failed of 3" in result.output
    assert "none.tif: failed: " in result.output


def test_lists_and_outputs_that_are_refused(folder, tmp_path):
    (tmp_path / "none.txt").write_text("# nothing\n")
    with pytest.raises(ValueError, match="expected at least one image, found none"):
        list_images(tmp_path / "none.txt")
    (tmp_path / "twice.txt").write_text("images/0.tif\nimages/0.tif\n")
    with pytest.raises(ValueError, match="expected each image once, found 1 of them again"):
        list_images(tmp_path / "twice.txt")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    with pytest.raises(FileExistsError, match="exists already"), open_manifest(tmp_path / "out"):
        pass
    result = xt("embed", folder, "-o", tmp_path / "x", *SMALL, "--profile", tmp_path / "trace")
    assert result.exit_code != 0 and "is of one image" in result.output
    assert is_many(folder) and is_many(tmp_path / "none.txt") and not is_many(folder / "0.tif")


def test_a_kill_between_output_and_note_is_made_good(folder, tmp_path):
    out = tmp_path / "out"
    xt("embed", folder, "-o", out, *SMALL)
    path = out / "manifest.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    result = xt("embed", folder, "-o", out, *SMALL)
    assert "0 done, 4 done before, 1 failed of 5" in result.output
    assert manifest_of(out)[-1]["image"] == "more/0.tif"
    assert xt("verify", out).exit_code == 0


def test_a_full_disk_stops_all(folder, tmp_path):
    def full(image, out):
        raise OSError(28, os.strerror(28), str(out))

    with open_manifest(tmp_path / "out") as manifest, pytest.raises(OSError, match="No space"):
        embed_many(list_images(folder), manifest, full, lambda *_: None)
    assert not manifest.entries


def test_memory_is_flat_over_many_images(tmp_path, monkeypatch):
    count = int(os.environ.get("XT_TEST_IMAGES", "40"))
    for i in range(count):
        write(tmp_path / "images" / f"{i:03}.tif", i)
    sizes = []
    monkeypatch.setattr("xt_models.cli.click.echo", lambda *_, **__: sizes.append(current_rss()))
    result = xt("embed", tmp_path / "images", "-o", tmp_path / "out", *SMALL)
    assert result.exit_code == 0
    assert len(sizes) > count
    later = [size / 2**20 for size in sizes[15:]]
    print(f"{count} images: {min(later):.1f} to {max(later):.1f} MiB after the first 15")
    assert max(later) - min(later) < 16
