"""`xt train`: recipes are checked before any work, runs are exact after any end."""

import csv
import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file

import xt_models as xm
from xt_models.cli import main
from xt_models.journal import verify
from xt_models.train import config, fit
from xt_models.train.tasks import Classification, as_float, seeded

pytestmark = pytest.mark.filterwarnings("ignore::xt_models.registry.RandomWeightsWarning")
RECIPE = {
    "model": {
        "name": "test_convnext", "context": "xl", "region": 32, "dim": 16, "num_heads": 1,
        "depth": 1, "chunk_regions": 2,
    },
    "data": {"size": 64},
    "augment": {
        "mixup": 0.2, "cutmix": 1.0, "randaugment": "rand-m9-mstd0.5-inc1",
        "label_smoothing": 0.1, "flip_vertical": 0.5, "rotate": True,
    },
    "train": {
        "epochs": 2, "batch_size": 4, "accumulate": 2, "lr": 1e-3, "warmup_epochs": 0.5,
        "workers": 0, "checkpoint_every": 3, "recompute": 3,
    },
}  # fmt: skip


def picture(path, value, size, rng):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = rng.normal(value, 60, (*size, 3)).clip(0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Photographs of two classes, one darker than the other, in folders."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for split, count in (("train", 9), ("val", 5)):
        for value, name in ((115, "dark"), (130, "light")):
            for i in range(count):
                picture(root / split / name / f"{i}.png", value, (60 + i, 90), rng)
    return root


def recipe_of(root, **changes):
    tables = {name: dict(table) for name, table in RECIPE.items()}
    tables["data"]["root"] = str(root)
    for key, value in changes.items():
        table, _, name = key.partition("_")
        tables[table][name] = value
    return config.from_dict(tables)


def losses(out):
    with (out / "log.csv").open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def trained(root, tmp_path_factory):
    """A run that nobody stopped, of a recipe with every random choice that there is."""
    out = tmp_path_factory.mktemp("trained") / "out"
    last = fit.fit(recipe_of(root), out, device="cpu")
    return out, last


def test_a_run_leaves_a_model_logs_and_a_record(trained, root):
    out, last = trained
    names = {"best", "classes.json", "log.csv", "model", "run.json", "tensorboard",
             "validation.csv"}  # fmt: skip
    assert {path.name for path in out.iterdir()} == names and verify(out) == []
    assert json.loads((out / "classes.json").read_text()) == ["dark", "light"]
    rows = list(csv.DictReader((out / "log.csv").open()))
    assert [int(row["step"]) for row in rows] == list(range(1, 10))  # 2 x 18 images by 4
    rates = [float(row["lr"]) for row in rows]
    assert rates[:3] == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3])  # 0.5 epochs: two steps
    assert rates[2:] == sorted(rates[2:], reverse=True) and rates[-1] == pytest.approx(1e-5)
    assert last["step"] == 9 and set(last) == {"step", "epoch", "loss", "top1"}
    validations = list(csv.DictReader((out / "validation.csv").open()))
    assert [row["step"] for row in validations] == ["5", "9"]
    assert float(validations[-1]["loss"]) == last["loss"]
    # The saved model gives the accuracy that the run reports.
    model = xm.XT.from_pretrained(out / "model").eval()
    task = Classification(recipe_of(root))
    items = [task.item("val", i, None) for i in range(10)]
    with torch.no_grad():
        best = model(torch.stack([image for image, _ in items])).logits.argmax(1)
    right = sum(int(b == label) for b, (_, label) in zip(best, items, strict=True))
    assert 10 * right == last["top1"]


KILLED = """
import os, signal, sys
from test_train import *
root, out, at = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
def kill(step, loss):
    if step == at:
        os.kill(os.getpid(), signal.SIGKILL)
fit.fit(recipe_of(root), out, device="cpu", on_step=kill)
"""


def child(code, *words, **env):
    here = str(Path(__file__).parent)
    paths = os.pathsep.join([here, str(Path(__file__).parent.parent)])
    env = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"} | env
    command = [sys.executable, "-W", "ignore", "-c", code, *map(str, words)]
    return subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)


def same(a, b):
    for name in ("log.csv", "validation.csv", "classes.json"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    for name in ("model", "best"):
        one, two = (load_file(folder / name / "model.safetensors") for folder in (a, b))
        assert one.keys() == two.keys()
        for key in one:
            assert torch.equal(one[key], two[key]), key


def test_a_killed_run_goes_on_as_if_nothing_had_happened(trained, root, tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        fit.fit(recipe_of(root), tmp_path / "whole", device="cpu")
        process = child(KILLED, root, tmp_path / "out", 8)
        _, said = process.communicate()
        assert process.returncode == -9, said
        assert (tmp_path / "out.part" / "checkpoint.pt").exists()
        seen = []
        fit.fit(recipe_of(root), tmp_path / "out", device="cpu",
                on_start=lambda step, steps: seen.append((step, steps)),
                on_step=lambda step, loss: seen.append(step))  # fmt: skip
        assert seen == [(6, 9), 7, 8, 9]
        same(tmp_path / "out", tmp_path / "whole")
        assert not (tmp_path / "out.part").exists()
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("at", [1, 4])
def test_a_run_stopped_in_the_process_goes_on_too(trained, root, tmp_path, at):
    """Before the first checkpoint nothing is kept, after it everything."""

    def stop(step, loss):
        if step == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit.fit(recipe_of(root), tmp_path / "out", device="cpu", on_step=stop)
    assert (tmp_path / "out.part").exists() == (at > 3)
    fit.fit(recipe_of(root, train_workers=1 if at > 3 else 0), tmp_path / "out", device="cpu")
    same(tmp_path / "out", trained[0])


def test_another_recipe_or_other_data_do_not_go_on(root, tmp_path):
    def stop(step, loss):
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit.fit(recipe_of(root, train_checkpoint_every=2), tmp_path / "out", device="cpu",
                on_step=stop)  # fmt: skip
    with pytest.raises(ValueError, match=r"recipe train lr was 0.001 and is 0.1\. Repeat"):
        fit.fit(recipe_of(root, train_lr=0.1, train_checkpoint_every=2), tmp_path / "out",
                device="cpu")  # fmt: skip
    assert (tmp_path / "out.part" / "checkpoint.pt").exists()


RANK = """
from test_train import *
fit.fit(recipe_of(Path(sys.argv[1])), Path(sys.argv[2]), device="cpu")
"""


def test_two_processes_train_the_same_model(trained, root, tmp_path):
    """Two ranks see one batch between them: losses as in one process, up to rounding."""
    recipe = "recipe_of(Path(sys.argv[1]), augment_mixup=0.0, augment_cutmix=0.0)"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [
        child(
            RANK.replace("recipe_of(Path(sys.argv[1]))", recipe), root, tmp_path / "two",
            RANK=str(i), LOCAL_RANK=str(i), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
        for i in range(2)
    ]  # fmt: skip
    for process in ranks:
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said
    fit.fit(
        recipe_of(root, augment_mixup=0.0, augment_cutmix=0.0), tmp_path / "one", device="cpu"
    )
    assert json.loads((tmp_path / "two" / "run.json").read_text())["run"]["processes"] == 2
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-4)
    ours, theirs = (
        list(csv.DictReader((tmp_path / name / "validation.csv").open())) for name in ("one", "two")
    )
    for a, b in zip(ours, theirs, strict=True):
        assert float(a["loss"]) == pytest.approx(float(b["loss"]), rel=1e-3)
