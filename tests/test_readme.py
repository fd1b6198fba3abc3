"""The README's commands and code, run as they are written."""

import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from test_checkpoint import empty, write

import xt_models as xm

pytestmark = pytest.mark.filterwarnings("ignore::xt_models.registry.RandomWeightsWarning")
SMALL = {
    "model.pretrained": "false", "model.name": "test_convnext", "model.region": 32, "data.size": 64,
    "train.epochs": 1, "train.batch_size": 2, "train.workers": 0,
}  # fmt: skip
SHORTER = {
    "xt train cue-digits": " --rows 64/32 --seeds 1 --steps 2",
    "xt train classify-folder": "".join(f" --set {key}={value}" for key, value in SMALL.items()),
    "xt train megapixel-digits": " --rows downsampled --seeds 1 --steps 2",
    "xt train shoreline": " --rows region-only --seeds 1 --steps 2",
    "xt train spanning": " --rows region-only --seeds 1 --steps 2",
}
RESULTS = Path(__file__).parent.parent / "bench" / "results"
README = (Path(__file__).parent.parent / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def shell_lines():
    lines = [line.split("#")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    return [line for line in lines if line]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A place with the files that the README speaks of."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "images").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (300, 530, 3), dtype=np.uint8)
    tifffile.imwrite(folder / "scene.tif", pixels, tile=(256, 256), photometric="rgb")
    tifffile.imwrite(folder / "images" / "scene.tif", pixels[:100, :100], photometric="rgb")
    heads = {"water": {"kind": "dense", "classes": 2, "output_stride": 4}}
    model = xm.create_model("convnext_atto", dim=32, num_heads=2, num_classes=3, heads=heads)
    model.save_pretrained(folder / "DIR")
    for split in ("train", "val"):
        for name in ("cats", "dogs"):
            (folder / "photos" / split / name).mkdir(parents=True)
            tifffile.imwrite(folder / "photos" / split / name / "1.tif", pixels[:80, :90])
    write(folder / "checkpoint.pth", empty())
    shutil.copytree(next(RESULTS.iterdir()), folder / "results")
    return folder


def run(line, folder):
    line += "".join(words for start, words in SHORTER.items() if line.startswith(start))
    words = shlex.split(line)
    assert words[0] == "xt"
    command = [
        sys.executable,
        "-c",
        "from xt_models.cli import main; main(prog_name='xt')",
        *words[1:],
    ]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_installation_is_two_commands():
    installs = [line for line in shell_lines() if line.startswith("pip")]
    assert installs[:2] == ["pip install -e . && xt demo", "pip install -e '.[test]' && pytest"]


@pytest.mark.parametrize("line", [line for line in shell_lines() if line.startswith("xt ")])
def test_command(line, folder):
    if line == "xt verify out" and not (folder / "out").exists():  # another worker embeds
        run("xt embed scene.tif -o out", folder)
    if line.endswith("--model run/model") and not (folder / "run").exists():
        run("xt train classify-folder --data photos -o run", folder)
    assert run(line, folder).strip()


def test_every_command_is_in_the_readme():
    from xt_models.cli import main

    named = {shlex.split(line)[1] for line in shell_lines() if line.startswith("xt ")} | {"demo"}
    assert named == set(main.commands)


def test_every_file_it_names_is_there():
    root = Path(__file__).parent.parent
    named = re.findall(r"(?:scripts|docs|bench)/[\w./-]+\w", README)
    assert named and all((root / name).exists() for name in named), named


def test_demo_without_arguments_or_network(folder):
    def used():
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before = used()
    out = run("xt demo", folder)
    # Processor time of both cores: the README's three minutes, on a machine that others load too.
    assert used() - before < 2 * 180
    assert re.search(r"7,143 x 8,192 px", out) and re.search(r"regions/s", out)
    assert sorted(p.name for p in (folder / "xt-demo" / "embedding").iterdir()) == [
        "embedding.json", "preview.png", "run.json", "tokens.zarr",
    ]  # fmt: skip
    blind, seeing = map(float, re.findall(r"^vessels, .*: F1 ([\d.]+) %$", out, re.MULTILINE))
    assert seeing >= blind + 30
    vessels = folder / "xt-demo" / "vessels"
    assert sorted(p.name for p in vessels.iterdir()) == [
        "comparison.png", "region-only", "scene.tif", "xl-through",
    ]  # fmt: skip
    with Image.open(vessels / "comparison.png") as picture:
        assert picture.width > 2 * picture.height - 200


def test_python_blocks(folder, tmp_path, monkeypatch):
    (tmp_path / "scene.tif").symlink_to(folder / "scene.tif")
    monkeypatch.chdir(tmp_path)
    code = blocks("python")
    assert len(code) >= 3
    values = {
        "torch": torch,
        "epochs": 2,
        "image": torch.randint(0, 256, (1, 3, 300, 530), dtype=torch.uint8),
        "loader": [
            (torch.randint(0, 256, (2, 3, 256, 300), dtype=torch.uint8), torch.tensor([2, 0]))
        ],
        "mask": torch.zeros(1, 300, 530, dtype=torch.int64),
        "chunks": torch.randn(3, 1, 10, 768).unbind(),
        "mean": (0.5,) * 3,
        "std": (0.25,) * 3,
        "features": torch.randn(20 * 28, 96, 8, 8),
        **{n: torch.randn(1, 2, 5, 64) for n in ("query", "key", "value")},
        **{n: torch.randn(1, 2, 7, 64) for n in ("memory_key", "memory_value")},
        **{n: torch.randn(1, 6, 5) for n in ("u", "delta")},
        "A": -torch.rand(6, 4),
        **{n: torch.randn(1, 4, 5) for n in ("B", "C")},
        "state": torch.zeros(1, 6, 4),
    }
    for block in code:
        if "RegionGrid" in block:
            values["image"] = torch.zeros(3, 5000, 7001, dtype=torch.uint8)
        exec(block, values)
    assert values["cosine"].get_last_lr() == pytest.approx([1e-6] * 2)
    assert [group["weight_decay"] for group in values["optimizer"].param_groups] == [0, 1e-4]
    assert values["loss"].isfinite() and (tmp_path / "trained" / "model.safetensors").exists()
    assert values["result"].out == Path("out") and values["result"].embedding.shape == (768,)
    assert values["pixels"] == 786_432 and values["seen"] == [2, 3, 4]
    assert values["field"].shape == (512, 512)
    assert {p.name for p in Path("maps").iterdir()} >= {"water.tif", "ships.json"}
    assert values["tokens"].shape == (157 * 219, 96)
    assert values["out"].shape == (1, 2, 5, 64)
    assert values["y"].shape == (1, 6, 5) and values["state"].shape == (1, 6, 4)
    assert values["regions"].shape == (20 * 28, 3, 256, 256)
