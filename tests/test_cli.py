"""The command line as a user meets it: what it prints, what it leaves, how it refuses."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tifffile
import zarr
from click.testing import CliRunner

from xt_models.cli import main
from xt_models.journal import locked

SMALL = ["--encoder", "convnext_atto", "--region", "64", "--chunk-regions", "3"]
XT = [sys.executable, "-c", "from xt_models.cli import main; main(prog_name='xt')"]


@pytest.fixture
def scene(tmp_path):
    path = tmp_path / "scene.tif"
    pixels = np.random.default_rng(0).integers(0, 256, (150, 210, 3), dtype=np.uint8)
    tifffile.imwrite(path, pixels, tile=(64, 64), compression="deflate", photometric="rgb")
    return path


def xt(*words):
    return CliRunner().invoke(main, [str(w) for w in words])


def refused(result, message):
    assert result.exit_code != 0
    assert "Traceback" not in result.output
    assert re.search(message, result.output), result.output
    lines = [line for line in result.output.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1, result.output


def test_help_answers_within_half_a_second():
    times = []  # of the processor, so that a loaded machine does not change the verdict
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        out = subprocess.run([*XT, "--help"], capture_output=True, text=True, check=True).stdout
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    for command in ("demo", "doctor", "info", "plan", "embed", "predict", "verify", "erf", "train"):
        assert f"\n  {command} " in out
    assert min(times) < 0.5, times


def test_importing_the_kernels_is_light():
    heavy = {"timm", "triton", "tifffile", "zarr"}
    code = f"import sys, xt_kernels; print(sorted({heavy} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_doctor_tells_versions_devices_and_missing_parts(monkeypatch):
    monkeypatch.setattr("xt_models.doctor._OPTIONAL", {"no-such-package": ("geo", "reads maps")})
    out = xt("doctor").output
    assert re.search(r"torch +\d", out) and re.search(r"cpu +\d+ cores", out)
    assert "not installed: reads maps; pip install 'xt-kernels[geo]'" in out
    assert "xt_swinv2_tiny_256" in out


def test_info(scene):
    out = xt("info", scene).output
    assert "150 x 210 px" in out and "3 x uint8" in out and "64 x 64 px" in out


def test_plan_tells_the_same_counts_as_embed(scene, tmp_path):
    plan = xt("plan", scene, *SMALL)
    assert plan.exit_code == 0, plan.output
    for fact in (
        "3 x 4 of 64 px = 12",
        "tokens           35",
        "expected time",
        "expected memory",
        "fits             yes",
    ):
        assert fact in plan.output
    assert "random weights (seed 0)" in plan.output
    embed = xt("embed", scene, "-o", tmp_path / "out", *SMALL)
    assert embed.exit_code == 0, embed.output
    assert re.search(r"regions +12\n", embed.output) and re.search(r"tokens +35\n", embed.output)
    assert "regions/s" in embed.output and "above the loaded model" in embed.output


def test_plan_says_when_it_does_not_fit(scene, monkeypatch):
    monkeypatch.setattr("xt_models.planning.free_disk", lambda path: 10)
    result = xt("plan", scene, *SMALL)
    assert "fits             no" in result.output
    refused(result, "does not fit")


def test_embed_is_reproducible_and_takes_its_options(scene, tmp_path):
    for name in ("a", "b"):
        result = xt(
            "embed", scene, "-o", tmp_path / name, *SMALL, "--batch-size", 5, "--readers", 1
        )
        assert result.exit_code == 0, result.output
    maps = [zarr.open_array(str(tmp_path / n / "tokens.zarr"), mode="r") for n in ("a", "b")]
    np.testing.assert_array_equal(maps[0][:], maps[1][:])
    result = xt(
        "embed", scene, "-o", tmp_path / "c", *SMALL, "--tiling", "zigzag", "--memory-chunks", 2,
        "--bands", "3,1", "--mean", "0.2,0.3", "--std", "1,2", "--seed", 4, "--no-preview",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    config = dict(zarr.open_array(str(tmp_path / "c" / "tokens.zarr"), mode="r").attrs)["config"]
    assert config["tiling"] == "zigzag" and config["memory_chunks"] == 2
    assert config["in_chans"] == 2 and config["mean"] == [0.2, 0.3] and config["std"] == [1, 2]
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == [
        "embedding.json", "run.json", "tokens.zarr",
    ]  # fmt: skip


@pytest.mark.parametrize("context", ["xl", "hyper", "mamba", "vit", "none"])
def test_predict_prints_scores(scene, context):
    result = xt("predict", scene, *SMALL, "--context", context, "--num-classes", 7)
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert len(record["scores"]) == 7 and sum(record["scores"]) == pytest.approx(1)
    assert record["top"][0][1] == max(record["scores"])


def test_predict_with_a_saved_model_into_a_file(scene, tmp_path):
    import xt_models as xm

    with pytest.warns(UserWarning, match="random weights"):
        model = xm.create_model("convnext_atto", region=64, dim=32, num_heads=2, num_classes=4)
    model.save_pretrained(tmp_path / "model")
    result = xt("predict", scene, "--model", tmp_path / "model", "-o", tmp_path / "scores.json")
    assert result.exit_code == 0, result.output
    assert "random weights" not in result.output
    record = json.loads((tmp_path / "scores.json").read_text())
    expected = xm.stream(model, scene).logits
    assert record["top"][0][0] == int(expected.argmax())
    refused(xt("predict", scene, "--model", tmp_path), "must be a folder with config.json")
    refused(
        xt("predict", scene, "--model", tmp_path / "model", "-o", tmp_path / "scores.json"),
        "exists already",
    )
    refused(
        xt("predict", scene, "--model", tmp_path / "model", "--bands", "1,2"),
        r"bands must be 3 numbers in \[0, 3\), got \[0, 1\]",
    )


def test_a_demo_sized_scene_runs_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("xt_models.demo.WIDTH", 640)
    monkeypatch.chdir(tmp_path)
    result = xt("demo")
    assert result.exit_code == 0, result.output
    names = ["embedding", "scene.tif", "vessels"]
    assert sorted(p.name for p in (tmp_path / "xt-demo").iterdir()) == names
    assert "558 x 640 px" in result.output and "regions/s" in result.output
    assert (tmp_path / "xt-demo" / "embedding" / "preview.png").is_file()
    assert xt("demo").exit_code == 0
    assert (tmp_path / "xt-demo-2").is_dir()


def damaged(tmp_path, kind):
    path = tmp_path / "bad.tif"
    pixels = np.random.default_rng(0).integers(0, 256, (150, 210, 3), dtype=np.uint8)
    if kind == "missing":
        return path
    if kind == "directory":
        path.mkdir()
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("no image at all\n" * 30)
    elif kind == "zero size":
        path = tmp_path / "bad.npy"
        np.save(path, np.zeros((0, 5, 3), np.uint8))
    else:
        tifffile.imwrite(path, pixels, tile=(64, 64), photometric="rgb", compression="deflate")
        size = path.stat().st_size
        if kind == "truncated":
            os.truncate(path, size // 2)
        elif kind == "corrupt tile":
            with tifffile.TiffFile(path) as file:
                offset = file.pages[0].dataoffsets[5]
            with path.open("r+b") as raw:
                raw.seek(offset)
                raw.write(b"\xff" * 64)
    return path


BAD_HEADERS = ["missing", "directory", "empty", "text", "zero size", "truncated"]


@pytest.mark.parametrize(
    "command, kind",
    [(command, kind) for command in ("embed", "plan", "info", "predict") for kind in BAD_HEADERS]
    + [("embed", "corrupt tile"), ("predict", "corrupt tile")],
)
def test_bad_files_end_in_one_sentence(command, kind, tmp_path):
    path = damaged(tmp_path, kind)
    before = sorted(tmp_path.iterdir())
    words = {"embed": ["-o", tmp_path / "out", *SMALL], "info": []}.get(command, SMALL)
    refused(xt(command, path, *words), re.escape(path.name))
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "words, message",
    [
        (["--encoder", "no_such_net"], "must be a timm model, got 'no_such_net'"),
        (["--encoder", "convnext_atto", "--region", "65"], "multiple of the stride 32"),
        (
            ["--encoder", "convnext_atto", "--bands", "1,4,2"],
            r"bands must be 3 numbers in \[0, 3\)",
        ),
        (["--encoder", "convnext_atto", "--mean", "1"], "mean must be in_chans = 3 numbers"),
        (
            ["--encoder", "convnext_atto", "--device", "cuda:7"],
            "--device must be cpu where no CUDA|cuda",
        ),
        (["--bands", "a,b"], "expected numbers like 1,2,3, got 'a,b'"),
        (["--bands", "0,1,2"], "expected numbers of at least 1"),
        (["--context", "lstm"], "'lstm' is not one of"),
        (["--context", "vit", "--tiling", "two-stream"], "tiling must be 'row' or 'zigzag' unless"),
        (["--batch-size", "0"], "0 is not in the range"),
        (["--batch-size", "many"], "'many' is not a valid integer"),
    ],
)
def test_bad_options_end_in_one_sentence(words, message, scene, tmp_path):
    refused(xt("embed", scene, "-o", tmp_path / "out", *words), message)
    assert not (tmp_path / "out").exists()


def test_output_is_checked_before_any_work(scene, tmp_path):
    (tmp_path / "out").mkdir()
    start = time.process_time()
    refused(xt("embed", scene, "-o", tmp_path / "out"), "out exists already")
    refused(xt("embed", scene, "-o", tmp_path / "no" / "out"), "no does not exist: make it first")
    refused(xt("embed", scene, "-o", scene / "out"), "does not exist: make it first")
    assert time.process_time() - start < 2


def run_whole(scene, out, *words, **kwargs):
    command = [*XT, "embed", str(scene), "-o", str(out), *SMALL, *words]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs
    )


@pytest.fixture
def long_scene(tmp_path):
    path = tmp_path / "long.tif"
    tifffile.imwrite(
        path, shape=(64 * 600, 640, 3), dtype=np.uint8, tile=(64, 64), photometric="rgb",
        data=(np.zeros((64, 64, 3), np.uint8) for _ in range(6000)), compression="deflate",
    )  # fmt: skip
    return path


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_stopping_leaves_nothing_half_written(number, code, long_scene, tmp_path):
    process = run_whole(long_scene, tmp_path / "out", "--no-reuse")
    part = tmp_path / "out.part" / "tokens.zarr"
    limit = time.monotonic() + 60
    while not (part / "c").exists() and time.monotonic() < limit and process.poll() is None:
        time.sleep(0.02)
    assert process.poll() is None, process.communicate()
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == code, err
    assert "Traceback" not in out + err
    left = {p.name for p in tmp_path.iterdir()} - {"long.tif"}
    # A slow machine may have saved its state before the signal came.
    assert left <= {"out.part"}
    assert ("is kept" if left else "nothing was written") in err


def test_a_run_that_was_told_to_stop_goes_on(scene, tmp_path, monkeypatch):
    from xt_models.streaming import stream

    def stop(model, source, out, progress, **options):
        def late(count):
            progress(count)
            if progress.__self__.n >= 9:
                signal.raise_signal(signal.SIGTERM)

        return stream(model, source, out, progress=late, checkpoint_seconds=0, **options)

    assert xt("embed", scene, "-o", tmp_path / "whole", *SMALL, "--batch-size", 3).exit_code == 0
    monkeypatch.setattr("xt_models.streaming.stream", stop)
    result = xt("embed", scene, "-o", tmp_path / "out", *SMALL, "--batch-size", 3)
    assert result.exit_code == 75
    assert "Stopped: " in result.output and "the same command goes on from there" in result.output
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr("xt_models.streaming.stream", stream)
    refused(
        xt("embed", scene, "-o", tmp_path / "out", *SMALL, "--batch-size", 4),
        "settings batch_size was 3 and is 4",
    )
    result = xt("embed", scene, "-o", tmp_path / "out", *SMALL, "--batch-size", 3)
    assert result.exit_code == 0 and "resumed      1 times" in result.output
    maps = [zarr.open_array(str(tmp_path / n / "tokens.zarr"), mode="r") for n in ("whole", "out")]
    np.testing.assert_array_equal(maps[0][:], maps[1][:])
    verified = xt("verify", tmp_path / "out")
    assert verified.exit_code == 0 and "every byte" in verified.output
    (tmp_path / "out" / "preview.png").write_bytes(b"flipped")
    result = xt("verify", tmp_path / "out")
    refused(result, "is not what was written: 1 findings")
    assert "preview.png was changed." in result.output
    refused(xt("verify", tmp_path), "holds no run.json")


def test_batch_size_by_measurement(scene, tmp_path, monkeypatch):
    measured = []

    def choose(model, source, readers, memory, precision, heads):
        measured.append(memory)
        assert not heads
        return 5, {4: 0.25, 5: 0.2}, 2 << 30

    monkeypatch.setattr("xt_models.planning.choose_batch_size", choose)
    for words, memory in ((["--batch-size", "auto"], None), (["--memory", "1.5GiB"], 3 << 29)):
        out = tmp_path / words[0]
        result = xt("embed", scene, "-o", out, *SMALL, *words)
        assert result.exit_code == 0, result.output
        assert "batch size 5 (4: 4.0, 5: 5.0 regions/s)" in result.output
        assert measured.pop() == memory
        said = "--memory 1.50 GiB cannot be held: with batches of 5 the run takes about 2.00 GiB"
        assert (said in result.output) == (memory is not None)
        record = json.loads((out / "run.json").read_text())["run"]
        assert record["identity"]["settings"]["batch_size"] == 5
        if memory is None:  # stopped and taken up again: not measured again
            (out / "run.json").unlink()
            journal = tmp_path / "--batch-size.part" / "journal"
            out.rename(journal.parent)
            journal.mkdir()
            (journal / "identity.json").write_text(json.dumps(record["identity"]))
            result = xt("embed", scene, "-o", out, *SMALL, *words)
            assert "batch size 5 (that of the run so far)" in result.output and not measured
    refused(xt("plan", scene, "--memory", "much"), "expected a size like 512MB or 8GB")
    both = xt("plan", scene, "--memory", "2GB", "--batch-size", 3)
    refused(both, "--memory chooses the batch size: give no number for --batch-size")


def test_plan_of_an_image_with_a_damaged_tile(scene):
    with tifffile.TiffFile(scene) as file:
        offset = file.pages[0].dataoffsets[5]
    with scene.open("r+b") as raw:
        raw.seek(offset)
        raw.write(b"\xff" * 64)
    refused(xt("plan", scene, *SMALL), "tile 5 .* at byte")
    result = xt("plan", scene, *SMALL, "--on-bad-tile", "mask")
    assert result.exit_code == 0 and "expected time" in result.output


@pytest.mark.parametrize("command", ["embed", "predict"])
def test_a_second_run_stops_before_any_work(command, scene, tmp_path, monkeypatch):
    def never(*args, **options):
        raise AssertionError("the model is made")

    monkeypatch.setattr("xt_models.cli._model", never)
    (tmp_path / "out.part").mkdir()
    with locked(tmp_path / "out.part"):
        refused(xt(command, scene, "-o", tmp_path / "out"), "another run is writing to it")
    refused(xt(command, scene, "-o", tmp_path / "out"), "the model is made")
    assert not (tmp_path / "out.part").exists()


def test_a_run_inside_one_long_call_stops_in_time(scene, tmp_path):
    code = (
        "import hashlib, sys, xt_models.cli as cli\n"
        "cli.STOP_SECONDS = 0.5\n"
        "def stuck(*_, **__):\n"
        "    print('stuck', flush=True)\n"
        "    hashlib.pbkdf2_hmac('sha256', b'', b'', 1 << 29)\n"  # minutes, and signals wait
        "cli._model = stuck\n"
        "cli.main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", code, "embed", str(scene), "-o", str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"stuck\n"
        time.sleep(1)  # until it is inside
        begin = time.monotonic()
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 75 and b"Stopped: " in err
    assert 0.4 < time.monotonic() - begin < 30
    assert xt("embed", scene, "-o", tmp_path / "out", *SMALL).exit_code == 0


def test_profile_tells_where_the_time_went(scene, tmp_path):
    trace = tmp_path / "trace.json"
    result = xt("embed", scene, "-o", tmp_path / "out", *SMALL, "--profile", trace)
    assert result.exit_code == 0, result.output
    shares = dict(re.findall(r"^  (\w+) +[\d.]+ s, ([\d.]+)%", result.output, re.MULTILINE))
    assert list(shares) == [
        "read", "decode", "copy", "encode", "stitch", "context", "write", "idle",
    ]  # fmt: skip
    assert float(shares["encode"]) > 0
    events = json.loads(trace.read_text())["traceEvents"]
    assert {e["name"] for e in events if e["ph"] == "X"} == set(shares)
    threads = {e["args"]["name"] for e in events if e["ph"] == "M"}
    assert {"MainThread", "xt-reader_0", "xt-writer_0"} <= threads


def test_a_full_disk_leaves_nothing(scene, tmp_path):
    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))

    process = run_whole(scene, tmp_path / "out", preexec_fn=limit)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Traceback" not in out + err and "File too large" in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["scene.tif"]


def test_traceback_on_request(scene, tmp_path):
    environment = os.environ | {"XT_TRACEBACK": "1"}
    command = [*XT, "info", str(tmp_path / "none.tif")]
    err = subprocess.run(command, capture_output=True, text=True, env=environment).stderr
    assert "Traceback" in err
    assert Path(scene).exists()
