"""A run that is stopped anywhere goes on and gives the same bytes, or says why it does not."""

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from test_streaming import page, scene, small

import xt_models as xm
from xt_kernels.regions import RegionGrid
from xt_models.journal import locked, open_run, read_record, verify
from xt_models.output import MapWriter, WriteBehind

pytestmark = pytest.mark.filterwarnings("ignore::xt_models.registry.RandomWeightsWarning")


class Stopped(Exception):
    pass


def stop_after(visits):
    left = [visits]

    def progress(count):
        left[0] -= count
        if left[0] <= 0:
            raise Stopped

    return progress


def contents(folder):
    """Bytes of every file but what a run cost."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "run.json"
    }


MODELS = {
    "xl": {},
    "kv": {"memory": "kv", "memory_chunks": 2, "residual": True},
    "zigzag": {"tiling": "zigzag"},
    "two-stream": {"tiling": "two-stream", "memory_chunks": 2},
    "none": {"context": None},
    "whole image": {"context": "vit", "chunk_regions": None},
}


@pytest.mark.parametrize("name", MODELS)
def test_a_stopped_run_goes_on_and_gives_the_same_bytes(name, tmp_path):
    model = small(num_classes=3, **MODELS[name])
    source = xm.open_image(page(), axes="HWC")
    options = {"batch_size": 4, "checkpoint_seconds": 0}
    whole = xm.stream(model, source, tmp_path / "whole", **options)
    for visits in (21, 29, 37):
        with pytest.raises(Stopped):
            xm.stream(model, source, tmp_path / "out", progress=stop_after(visits), **options)
        assert not (tmp_path / "out").exists()
        assert (tmp_path / "out.part").exists() == (name != "whole image")
    result = xm.stream(model, source, tmp_path / "out", **options)
    assert result.stats.resumed == (0 if name == "whole image" else 3)
    assert (result.stats.regions, result.stats.chunks) == (whole.stats.regions, whole.stats.chunks)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "whole"]
    np.testing.assert_array_equal(result.logits, whole.logits)
    assert verify(tmp_path / "out") == []


def test_what_is_done_is_not_done_again(tmp_path):
    model = small()
    source = xm.open_image(scene())
    options = {"batch_size": 3, "readers": 1, "checkpoint_seconds": 0}
    with pytest.raises(Stopped):
        xm.stream(model, source, tmp_path / "out", progress=stop_after(18), **options)
    read = source.bytes_read
    result = xm.stream(model, source, tmp_path / "out", **options)
    identity = 200 * 330 * 3  # every pixel of an array is read to know it again
    assert source.bytes_read - read - identity < 200 * 330 * 3 / 2
    assert result.stats.regions == 24


def test_slots_that_round_differently_are_kept_over_a_stop(tmp_path, monkeypatch):
    model = small(residual=True)
    plain = model.region_encoder.forward

    def uneven(regions):
        return plain(regions) * (1 + torch.arange(len(regions))[:, None, None, None] * 1e-6)

    monkeypatch.setattr(model.region_encoder, "forward", uneven)
    options = {"batch_size": 5, "checkpoint_seconds": 0}
    xm.stream(model, page(), tmp_path / "whole", **options)
    with pytest.raises(Stopped):
        xm.stream(model, page(), tmp_path / "out", progress=stop_after(20), **options)
    assert xm.stream(model, page(), tmp_path / "out", **options).stats.resumed == 1
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_slots_are_kept_where_regions_are_left_out(tmp_path, monkeypatch):
    model = small(residual=True)
    plain = model.region_encoder.forward

    def uneven(regions):
        return plain(regions) * (1 + torch.arange(len(regions))[:, None, None, None] * 1e-6)

    monkeypatch.setattr(model.region_encoder, "forward", uneven)
    pixels = np.random.default_rng(0).integers(1, 255, (64 * 4, 64 * 9, 3), dtype=np.uint8)
    for row, col in ((0, 1), (0, 2), (0, 3), (1, 4), (2, 0), (2, 1), (2, 8)):
        pixels[row * 64 : row * 64 + 64, col * 64 : col * 64 + 64] = 0
    for waiting in (1024, 6):  # many in a batch that waits long, and batches that may not wait
        monkeypatch.setattr("xt_models.streaming.MAX_WAITING", waiting)
        options = {"batch_size": 5, "checkpoint_seconds": 0, "drop": 0}
        whole = tmp_path / f"whole-{waiting}"
        xm.stream(model, pixels, whole, **options)
        for visits in range(6, 36, 3):
            with pytest.raises(Stopped):
                xm.stream(model, pixels, tmp_path / "out", progress=stop_after(visits), **options)
            result = xm.stream(model, pixels, tmp_path / "out", **options)
            assert contents(tmp_path / "out") == contents(whole), visits
            shutil.rmtree(tmp_path / "out")
        assert result.stats.resumed == 1


def test_half_a_batch_stays_half_a_batch_over_a_stop(tmp_path, monkeypatch):
    model = small(residual=True)
    plain, sizes = model.encode, []

    def small_device(regions, *rest, **options):
        sizes.append(len(regions))
        if len(regions) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return plain(regions, *rest, **options)

    monkeypatch.setattr(model, "encode", small_device)
    options = {"batch_size": 6, "checkpoint_seconds": 0}
    xm.stream(model, scene(), tmp_path / "whole", **options)
    with pytest.raises(Stopped):
        xm.stream(model, scene(), tmp_path / "out", progress=stop_after(18), **options)
    sizes.clear()
    assert xm.stream(model, scene(), tmp_path / "out", **options).stats.resumed == 1
    assert set(sizes) == {3}
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_value_that_is_not_a_number_is_the_same_when_a_run_goes_on(tmp_path):
    pixels = scene(dtype=np.float32)
    pixels[:64, :64] = np.nan
    stopped(tmp_path, pixels=pixels, drop=np.float32("nan"))
    result = xm.stream(small(), pixels, tmp_path / "out", batch_size=3, drop=float("nan"))
    assert result.stats.resumed == 1 and result.stats.left_out == 1


def test_removing_what_a_failed_run_left_may_be_cut_short(tmp_path, monkeypatch):
    """Killed at any removal of a file or a folder, the same call takes over what is left."""
    real = {name: getattr(os, name) for name in ("unlink", "rmdir")}

    def removals(stop_at):
        count = [0]

        def kill(name, path, **options):
            count[0] += 1
            if count[0] > stop_at:
                raise KeyboardInterrupt
            real[name](path, **options)

        with open_run(tmp_path / "out", {"image": 1}) as run:
            assert run.state is None and [p.name for p in run.part.iterdir()] == ["journal"]
            (run.part / "tokens.zarr" / "c").mkdir(parents=True)
            for name in ("zarr.json", "c/0", "c/1"):
                (run.part / "tokens.zarr" / name).write_text("half")
            for name in real:
                monkeypatch.setattr(os, name, partial(kill, name))
            raise Stopped

    for stop_at in range(20):
        with pytest.raises((Stopped, KeyboardInterrupt)) as caught:
            removals(stop_at)
        monkeypatch.undo()
        if caught.type is Stopped:
            break
    assert stop_at > 5 and list(tmp_path.iterdir()) == []


def test_a_full_disk_at_any_sync_leaves_a_run_that_goes_on(tmp_path, monkeypatch):
    model, source = small(), xm.open_image(scene())
    options = {"checkpoint_seconds": 0, "batch_size": 6}
    xm.stream(model, source, tmp_path / "whole", **options)
    real, calls = os.fsync, [0]

    def full(handle):
        calls[0] += 1
        if calls[0] == fail_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out.part")
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    failures = 0
    while not (tmp_path / "out").exists():
        calls[0], fail_at = 0, failures % 12 + 1
        try:
            xm.stream(model, source, tmp_path / "out", **options)
        except OSError as error:
            assert error.errno == errno.ENOSPC
            failures += 1
            # The last sync is that of the name, after the renaming.
            assert not (tmp_path / "out").exists() or calls[0] == fail_at
    assert failures > 8
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert verify(tmp_path / "out") == []


def test_a_full_disk_at_any_write_leaves_a_run_that_goes_on(tmp_path):
    """No file may grow beyond a limit, that of each size in turn which a whole run needs."""
    model, source = small(), xm.open_image(scene(130, 200))
    options = {"checkpoint_seconds": 0, "batch_size": 6}
    xm.stream(model, source, tmp_path / "whole", **options)
    with pytest.raises(Stopped):
        xm.stream(model, source, tmp_path / "out", progress=stop_after(12), **options)
    folders = tmp_path / "whole", tmp_path / "out.part"
    sizes = {p.stat().st_size for f in folders for p in f.rglob("*") if p.is_file()}
    shutil.rmtree(tmp_path / "out.part")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in sorted(sizes):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, before[1]))
        try:
            with pytest.raises(OSError, match="File too large"):
                xm.stream(model, source, tmp_path / "out", **options)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert not (tmp_path / "out").exists()
    assert len(sizes) > 6
    xm.stream(model, source, tmp_path / "out", **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "whole"]


class FullDisk:
    """Lets the write numbered `fail_at` stop half way, and no other: any opening of a file below a
    folder for writing, by whatever library. 0 lets all pass."""

    def __init__(self):
        self.folder, self.fail_at, self.count, self.failed = None, 0, 0, []
        sys.addaudithook(self)  # for the life of the process

    def __call__(self, event, args):
        if event != "open" or self.folder is None or not isinstance(args[0], str | Path):
            return
        path, flags = str(args[0]), args[2]
        if not path.startswith(self.folder) or not flags & (os.O_WRONLY | os.O_RDWR):
            return
        self.count += 1
        if self.count == self.fail_at:
            handle = os.open(path, flags | os.O_CREAT)
            os.write(handle, b"half a file")
            os.close(handle)
            self.failed.append(path)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)


@pytest.fixture(scope="module")
def full_disk():
    disk = FullDisk()
    yield disk
    disk.folder = None


HEADS = {
    "none": {},
    "maps and boxes": {
        "ships": {"kind": "fcos", "classes": 2},
        "land": {"kind": "dense", "classes": 3},
        "kind": {"kind": "classification", "classes": 2},
    },
}


@pytest.mark.parametrize(
    "heads, options",
    [("none", {}), ("maps and boxes", {}), ("maps and boxes", {"map_format": "zarr"})],
)
def test_a_disk_that_is_full_at_one_write_leaves_a_run_that_goes_on(
    heads, options, tmp_path, full_disk
):
    model = small(heads=HEADS[heads], num_classes=2, memory_chunks=2)
    source = xm.open_image(scene(130, 260))
    options = {"checkpoint_seconds": 0, "batch_size": 4} | options
    xm.stream(model, source, tmp_path / "whole", **options)
    expected = contents(tmp_path / "whole")
    out, full_disk.failed = tmp_path / "out", []
    resumed = 0
    while not out.exists():
        full_disk.folder, full_disk.count = str(tmp_path / "out"), 0
        full_disk.fail_at = len(full_disk.failed) + 1
        try:
            xm.stream(model, source, out, **options)
        except OSError as error:
            assert error.errno == errno.ENOSPC, full_disk.failed[-1]
            full_disk.fail_at = 0
            assert not out.exists()
            resumed += xm.stream(model, source, out, **options).stats.resumed
            assert contents(out) == expected, full_disk.failed[-1]
            assert verify(out) == []
            assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "whole"]
            shutil.rmtree(out)
    assert contents(out) == expected
    failed = [Path(name.removesuffix(".tmp")) for name in full_disk.failed]
    names = {path.relative_to(f"{out}.part").parts[0] for path in failed}
    assert names >= {path.name for path in out.iterdir()} | {"journal"}
    assert resumed > 10


def test_nothing_is_written_behind_a_write_that_failed():
    done, gate = [], threading.Event()

    def fail():
        gate.wait(10)
        raise OSError(errno.ENOSPC, "full")

    with WriteBehind(torch.device("cpu")) as writer:
        writer.submit(done.append, 1)
        writer.submit(fail)
        writer.submit(done.append, 2)  # queued before anybody knows
        gate.set()
        for _ in range(2):
            with pytest.raises(OSError, match="full"):
                writer.wait()
            with pytest.raises(OSError, match="full"):
                writer.submit(done.append, 3)
    assert done == [1]


def test_a_map_that_lacks_a_block_is_refused(tmp_path):
    grid = RegionGrid(130, 600, 64)
    writer = MapWriter(tmp_path / "map", grid, 32, 1, "float32", np.nan, {})
    values = np.ones((2, 2, 1), np.float32)
    for region in range(grid.num_regions - 1):
        writer.put(region, values)
    with pytest.raises(RuntimeError, match=r"map: 1 of 6 blocks were never written"):
        writer.close()
    writer.put(grid.num_regions - 1, values)
    writer.close()
    (tmp_path / "map" / "c" / "1" / "0" / "0").unlink()
    with pytest.raises(RuntimeError, match=r"map: 1 of 6 blocks were never written"):
        writer.close()
    assert np.isnan(zarr.open_array(str(tmp_path / "map"), mode="r")[2:4, :16]).all()


def stopped(tmp_path, model=None, pixels=None, **options):
    with pytest.raises(Stopped):
        xm.stream(
            small() if model is None else model,
            scene() if pixels is None else pixels,
            tmp_path / "out",
            progress=stop_after(18),
            checkpoint_seconds=0,
            **{"batch_size": 3} | options,
        )
    return contents(tmp_path / "out.part")


@pytest.mark.parametrize(
    "change, said",
    [
        ({"pixels": scene(seed=5)}, "image sha256 was .* and is"),
        ({"pixels": scene(200, 331)}, r"image size was \[200, 330\] and is \[200, 331\]"),
        ({"model": {"seed": 1}}, "model weights was .* and is"),
        ({"model": {"tiling": "zigzag"}}, "model tiling was row and is zigzag"),
        ({"batch_size": 4}, "settings batch_size was 3 and is 4"),
        ({"preview": False}, "settings preview was True and is False"),
    ],
)
def test_another_image_model_or_setting_is_refused(change, said, tmp_path):
    before = stopped(tmp_path)
    model = small(**change.pop("model", {}))
    pixels = change.pop("pixels", None)
    with pytest.raises(ValueError, match=f"was begun differently: .*{said}.* remove"):
        xm.stream(model, scene() if pixels is None else pixels, tmp_path / "out",
                  **{"batch_size": 3} | change)  # fmt: skip
    assert contents(tmp_path / "out.part") == before
    assert xm.stream(small(), scene(), tmp_path / "out", batch_size=3).stats.resumed == 1


def test_a_changed_file_is_refused_even_with_the_same_pixels(tmp_path):
    np.save(tmp_path / "scene.npy", scene())
    stopped(tmp_path, pixels=tmp_path / "scene.npy")
    os.utime(tmp_path / "scene.npy", ns=(1, 1))
    with pytest.raises(ValueError, match=r"image modified_ns was .* and is 1"):
        xm.stream(small(), tmp_path / "scene.npy", tmp_path / "out", batch_size=3)


def test_damage_in_a_stopped_run_is_found(tmp_path):
    stopped(tmp_path)
    part = tmp_path / "out.part"
    block = next(p for p in (part / "tokens.zarr" / "c").rglob("*") if p.is_file())
    good = block.read_bytes()
    block.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"tokens.zarr/c/.* is missing or was changed: remove"):
        xm.stream(small(), scene(), tmp_path / "out", batch_size=3)
    block.write_bytes(good)
    state = next((part / "journal").glob("state-*.pt"))
    state.write_bytes(state.read_bytes()[:-1] + b"?")
    with pytest.raises(ValueError, match=r"journal/state-\d+.pt is missing or was changed"):
        xm.stream(small(), scene(), tmp_path / "out", batch_size=3)


@pytest.mark.parametrize("cut", [1, 40, 200])
def test_a_line_that_was_cut_off_does_not_count(cut, tmp_path):
    xm.stream(small(), scene(), tmp_path / "whole", batch_size=3)
    stopped(tmp_path)
    log = tmp_path / "out.part" / "journal" / "log"
    lines = log.read_bytes().splitlines(keepends=True)
    assert len(lines) > 2
    # A line is followed by the removal of the state before it, so cut lines are those in flight.
    log.write_bytes(b"".join(lines) + lines[-1][:cut])
    (tmp_path / "out.part" / "tokens.zarr" / "c" / "9.partial").write_bytes(b"left by a kill")
    assert xm.stream(small(), scene(), tmp_path / "out", batch_size=3).stats.resumed == 1
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_run_that_only_lacked_its_name_is_finished_as_it_is(tmp_path):
    first = xm.stream(small(num_classes=2), scene(), tmp_path / "out")
    record = (tmp_path / "out" / "run.json").read_bytes()
    (tmp_path / "out").rename(tmp_path / "out.part")
    (tmp_path / "out.part" / "journal").mkdir()
    again = xm.stream(small(num_classes=2), scene(), tmp_path / "out")
    assert again.stats == first.stats
    np.testing.assert_array_equal(again.embedding, first.embedding)
    np.testing.assert_array_equal(again.logits, first.logits)
    assert (tmp_path / "out" / "run.json").read_bytes() == record
    assert verify(tmp_path / "out") == []


def test_two_runs_on_one_output(tmp_path):
    (tmp_path / "out.part").mkdir()
    code = (
        "import sys; from xt_models.journal import locked\n"
        "with locked(sys.argv[1]): print('mine', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "out.part")]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "mine\n"
        with pytest.raises(BlockingIOError, match="another run is writing to it"):
            xm.stream(small(), scene(), tmp_path / "out")
    finally:
        other.kill()
        other.wait()
        other.stdin.close()
        other.stdout.close()
    xm.stream(small(), scene(), tmp_path / "out")
    assert verify(tmp_path / "out") == []


def test_a_folder_that_was_renamed_while_it_was_locked_is_not_ours(tmp_path, monkeypatch):
    import fcntl

    part = tmp_path / "out.part"
    part.mkdir()
    real = fcntl.flock

    def rename_first(handle, how):
        part.rename(tmp_path / "out")
        real(handle, how)

    monkeypatch.setattr(fcntl, "flock", rename_first)
    with pytest.raises(BlockingIOError), locked(part):
        pass


def test_a_failure_before_the_first_checkpoint_leaves_nothing(tmp_path):
    with pytest.raises(Stopped):
        xm.stream(small(), scene(), tmp_path / "out", progress=stop_after(1))
    with pytest.raises(Stopped), open_run(tmp_path / "out", {}):
        raise Stopped
    assert list(tmp_path.iterdir()) == []


def test_verify_finds_any_flipped_byte(tmp_path):
    xm.stream(small(), scene(100, 150), tmp_path / "out")
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(files) == 6
    rng = np.random.default_rng(0)
    for path in files:
        good = path.read_bytes()
        for at in {0, len(good) - 1, *rng.integers(len(good), size=20).tolist()}:
            bad = bytearray(good)
            bad[at] ^= 1 << int(rng.integers(8))
            path.write_bytes(bad)
            name = str(path.relative_to(tmp_path / "out"))
            assert verify(tmp_path / "out") == [f"{name} was changed."], at
        path.write_bytes(good)
    assert verify(tmp_path / "out") == []
    (tmp_path / "out" / "more").write_text("")
    files[0].rename(tmp_path / "gone")
    missing = str(files[0].relative_to(tmp_path / "out"))
    expected = {f"{missing} is missing.", "more does not belong to it."}
    assert expected <= {*verify(tmp_path / "out"), "run.json is missing."}
    with pytest.raises(FileNotFoundError, match=r"holds no run.json"):
        verify(tmp_path)


def test_the_record_tells_what_the_bytes_depend_on(tmp_path):
    model = small()
    xm.stream(model, scene(), tmp_path / "out")
    record = read_record(tmp_path / "out")
    assert record["identity"]["settings"]["batch_size"] == 16
    assert record["identity"]["model"]["region"] == 64
    assert record["identity"]["machine"]["torch"] == torch.__version__
    assert set(record["files"]) == set(contents(tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "run.json").read_text())["run"] == record
    assert isinstance(Path(record["identity"]["image"]["name"]), Path)


def test_random_kills():
    script = Path(__file__).parent.parent / "scripts" / "kill_stress.py"
    done = subprocess.run(
        [sys.executable, str(script), "--kills", "5"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "5 kills" in done.stdout and "all outputs identical" in done.stdout
