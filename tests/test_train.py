"""`xt train`: recipes are checked before any work, runs are exact after any end."""

import csv
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file

import xt_models as xm
from xt_models import host
from xt_models.cli import main
from xt_models.journal import verify
from xt_models.train import config, fit
from xt_models.train.tasks import make_tasks, seeded
from xt_models.train.tasks.base import Turn
from xt_models.train.tasks.classification import Classification, as_float
from xt_models.train.tasks.segmentation import Segmentation

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


def make_task(recipe):
    (task,) = make_tasks(recipe).values()
    return task


def losses(out):
    with (out / "log.csv").open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Runs that are compared bit by bit have as many threads as their child processes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def trained(root, tmp_path_factory):
    """A run that nobody stopped, of a recipe with every random choice that there is."""
    out = tmp_path_factory.mktemp("trained") / "out"
    last = fit.fit(recipe_of(root), out, device="cpu")
    return out, last


def test_a_run_leaves_a_model_logs_and_a_record(trained, root):
    out, last = trained
    names = {"best", "log.csv", "model", "run.json", "tensorboard", "validation.csv"}
    assert {path.name for path in out.iterdir()} == names and verify(out) == []
    assert xm.XT.from_pretrained(out / "best").class_names == {"head": ("dark", "light")}
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
    task = make_task(recipe_of(root))
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
    for name in ("log.csv", "validation.csv", "best/classes.json", "model/classes.json"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    for name in ("model", "best"):
        one, two = (load_file(folder / name / "model.safetensors") for folder in (a, b))
        assert one.keys() == two.keys()
        for key in one:
            assert torch.equal(one[key], two[key]), key


def test_a_killed_run_goes_on_as_if_nothing_had_happened(trained, root, tmp_path):
    process = child(KILLED, root, tmp_path / "out", 8)
    _, said = process.communicate()
    assert process.returncode == -9, said
    assert (tmp_path / "out.part" / "checkpoint.pt").exists()
    seen = []
    fit.fit(
        recipe_of(root), tmp_path / "out", device="cpu",
        on_start=lambda step, steps: seen.append((step, steps)),
        on_step=lambda step, loss: seen.append(step),
    )  # fmt: skip
    assert seen == [(6, 9), 7, 8, 9]
    same(tmp_path / "out", trained[0])
    assert not (tmp_path / "out.part").exists()


def saved_step(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)["step"]


@pytest.mark.parametrize("at", [1, 5])
def test_a_run_stopped_in_the_process_goes_on_too(trained, root, tmp_path, at):
    """From its last step, before the first regular checkpoint as well."""

    def stop(step, loss):
        if step == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit.fit(recipe_of(root), tmp_path / "out", device="cpu", on_step=stop)
    assert saved_step(tmp_path / "out.part") == at
    fit.fit(recipe_of(root, train_workers=1 if at > 3 else 0), tmp_path / "out", device="cpu")
    same(tmp_path / "out", trained[0])


@pytest.mark.parametrize("where", ["_validate", "_keep"])
def test_a_run_stopped_in_its_validation_makes_it_again(
    trained, root, tmp_path, monkeypatch, where
):
    def stop(*words):
        raise KeyboardInterrupt

    recipe = recipe_of(root, train_checkpoint_every=500)
    with monkeypatch.context() as patch:
        patch.setattr(fit._Fitter, where, stop)
        with pytest.raises(KeyboardInterrupt):
            fit.fit(recipe, tmp_path / "out", device="cpu")
    assert saved_step(tmp_path / "out.part") == 5
    fit.fit(recipe, tmp_path / "out", device="cpu")
    same(tmp_path / "out", trained[0])


def test_every_validation_is_a_checkpoint(root, tmp_path):
    def stop(step, loss):
        if step == 7:
            os.rename(tmp_path / "out.part" / "checkpoint.pt", tmp_path / "kept")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit.fit(recipe_of(root, train_checkpoint_every=500), tmp_path / "out", device="cpu",
                on_step=stop)  # fmt: skip
    assert torch.load(tmp_path / "kept", weights_only=True)["step"] == 5


def test_a_run_stopped_within_a_step_goes_on_from_the_one_before(masked, tmp_path, monkeypatch):
    """The decoder's batch norm has seen the step that was stopped, its checkpoint has not."""
    tables = recipe_tables(segmentation(masked, epochs=0.75, checkpoint_every=500))
    tables["model"]["region"] = 64
    tables["head"] = {"kind": "segmentation", "decoder_channels": [8, 8], "output_stride": 8}
    recipe = config.from_dict(tables)
    fit.fit(recipe, tmp_path / "whole", device="cpu")
    loss, calls = Segmentation.loss, []

    def stop(task, model, batch, *, training):
        calls.append(loss(task, model, batch, training=training))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return calls[-1]

    with monkeypatch.context() as patch:
        patch.setattr(Segmentation, "loss", stop)
        with pytest.raises(KeyboardInterrupt):
            fit.fit(recipe, tmp_path / "out", device="cpu")
    assert saved_step(tmp_path / "out.part") == 1
    fit.fit(recipe, tmp_path / "out", device="cpu")
    same(tmp_path / "out", tmp_path / "whole")


def test_before_its_first_step_a_run_leaves_nothing(root, tmp_path, monkeypatch):
    def stop(*words, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(Classification, "loss", stop)
    with pytest.raises(KeyboardInterrupt):
        fit.fit(recipe_of(root), tmp_path / "out", device="cpu")
    assert not list(tmp_path.iterdir())


def test_a_run_killed_before_the_last_rename_is_only_renamed(root, tmp_path, monkeypatch):
    def die(*paths):
        raise KeyboardInterrupt

    recipe = recipe_of(root, train_epochs=1)
    with monkeypatch.context() as patch:
        patch.setattr(fit, "sync_folder", die)  # the first call is that of the step before 1
        with pytest.raises(KeyboardInterrupt):
            fit.fit(recipe, tmp_path / "none", device="cpu")
        assert not list(tmp_path.iterdir())
    last = fit.fit(recipe, tmp_path / "whole", device="cpu")
    (tmp_path / "whole").rename(tmp_path / "out.part")
    steps = []
    again = fit.fit(
        recipe, tmp_path / "out", device="cpu", on_step=lambda *step: steps.append(step)
    )
    assert again == last and not steps and verify(tmp_path / "out") == []


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_image_is_named(workers, root, tmp_path):
    shutil.copytree(root, tmp_path / "data")
    file = tmp_path / "data" / "train" / "light" / "4.png"
    file.write_bytes(file.read_bytes()[:1000])
    recipe = recipe_of(tmp_path / "data", train_workers=workers,
                       train_epochs=3)  # fmt: skip
    with pytest.raises(ValueError, match=r"train/light/4\.png: expected [^\n]*$"):
        fit.fit(recipe, tmp_path / "out", device="cpu")


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
fit.fit({recipe}, Path(sys.argv[2]), device="cpu")
"""


def in_two_processes(recipe, root, out):
    """Trains the recipe of an expression."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [
        child(
            RANK.format(recipe=recipe), root, out,
            RANK=str(i), LOCAL_RANK=str(i), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
        for i in range(2)
    ]  # fmt: skip
    for process in ranks:
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said


def test_two_processes_train_the_same_model(root, tmp_path):
    """Two ranks see one batch between them: losses as in one process, up to rounding."""
    recipe = "recipe_of(Path(sys.argv[1]), augment_mixup=0.0, augment_cutmix=0.0)"
    in_two_processes(recipe, root, tmp_path / "two")
    fit.fit(recipe_of(root, augment_mixup=0.0, augment_cutmix=0.0), tmp_path / "one", device="cpu")
    assert json.loads((tmp_path / "two" / "run.json").read_text())["run"]["processes"] == 2
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-4)
    ours, theirs = (
        list(csv.DictReader((tmp_path / name / "validation.csv").open())) for name in ("one", "two")
    )
    for a, b in zip(ours, theirs, strict=True):
        assert float(a["loss"]) == pytest.approx(float(b["loss"]), rel=1e-3)


def test_a_loss_that_is_not_finite_stops_with_its_step(root, tmp_path):
    """The weights that led there are gone, those of the checkpoint before it are not."""
    seen = []
    recipe = recipe_of(root, train_lr=1e30, train_clip=0.0, train_checkpoint_every=1)
    with pytest.raises(
        fit.NotFiniteError, match=r"Step (\d+): the (loss|gradient) must be finite, got (nan|inf); "
    ) as caught:
        fit.fit(recipe, tmp_path / "out", device="cpu", on_step=lambda *step: seen.append(step))
    last = seen[-1][0]
    assert f"Step {last + 1}:" in str(caught.value)
    assert f"checkpoint.pt is that of step {last}." in str(caught.value)
    assert all(math.isfinite(loss) for _, loss in seen)
    state = torch.load(tmp_path / "out.part" / "checkpoint.pt", weights_only=True)
    assert state["step"] == last
    assert all(tensor.isfinite().all() for tensor in state["model"].values())


def test_a_loss_that_is_not_finite_leaves_what_was_good(root, tmp_path, monkeypatch):
    """Also before the first regular checkpoint: the last validation's, and the best model."""
    loss, calls = Classification.loss, []

    def broken(task, model, batch, *, training):
        calls.append(training)
        found, logits = loss(task, model, batch, training=training)
        return (found * math.nan if calls.count(True) > 14 else found), logits  # two a step

    monkeypatch.setattr(Classification, "loss", broken)
    with pytest.raises(
        fit.NotFiniteError, match=r"Step 8: the loss must be finite, got nan; .* of step 5\."
    ):
        fit.fit(recipe_of(root, train_checkpoint_every=500), tmp_path / "out", device="cpu")
    assert saved_step(tmp_path / "out.part") == 5
    assert xm.XT.from_pretrained(tmp_path / "out.part" / "best").head is not None


@pytest.mark.parametrize(
    "text, message",
    [
        ("[data]\nsise = 3", r"data: unknown key 'sise'\. Near it: size\."),
        ("[trian]\nlr = 1", r"unknown key 'trian'\. Near it: train\."),
        ("[model]\nregions = 4", r"model: unknown key 'regions'\. Near it: region\."),
        ("[train]\nlr = 'fast'", r"train\.lr must be float, got 'fast'\."),
        ("[train]\nbatch_size = 4.5", r"train\.batch_size must be int, got 4\.5\."),
        ("[train]\nbatch_size = 5\naccumulate = 2", r"a multiple of train\.accumulate = 2, got 5"),
        ("[train]\nprecision = 'half'", r"train\.precision must be one of float32, bfloat16"),
        ("[augment]\nscale = [0.5, 2]", r"augment\.scale must be two numbers"),
        ("[data]\nform = 'folders'", r"data\.form must be one of folder, "),
        ("[model]\ncontext = 'lstm'", r"model\.context must be one of xl, hyper, mamba, vit, none"),
        ("[model]\nweights = 'x'\nregion = 3", r"model must be weights alone"),
        ("[model]\nweights = 'x'", r"model\.weights must be a folder of a saved model, .* got 'x'"),
        ("[model]\ngradient = 3", r"model\.gradient must be str, got 3"),
        ("epochs = ", r"expected TOML, found: "),
        ("epochs = 3", r"unknown key 'epochs'"),
        ("tasks = {}", r"tasks must be a table for each task, got \{\}"),
        ("[tasks.a]\n[head]\nkind = 'fcos'", r"head must be left out beside tasks"),
        ("[tasks.a]\nwait = 2", r"tasks\.a: unknown key 'wait'\. Near it: weight\."),
        ("[tasks.a]\nweight = 0", r"tasks\.a\.weight must be above 0 and finite, got 0\.0"),
        ("[tasks.a]\nweight = nan", r"tasks\.a\.weight must be above 0 and finite, got nan"),
        ("[tasks.a]\ndata = 3", r"tasks\.a\.data must be a table, got 3"),
        ("[tasks]\na = 3", r"tasks\.a must be a table, got 3"),
        ("[tasks.'a/b']", r"tasks\.a/b: its name must be a word, which the head gets, got 'a/b'"),
        ("[tasks.a.data]\nsise = 3", r"tasks\.a\.data: unknown key 'sise'\. Near it: size\."),
        ("[augment]\nscale = [0.5, 2]\n[tasks.a]", r"augment\.scale must be two numbers"),
    ],
)
def test_a_recipe_is_refused_by_the_key(text, message, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        config.load(path)
    assert "\n" not in str(caught.value)


def test_values_are_replaced_by_dotted_key(tmp_path):
    (tmp_path / "mine.toml").write_text("[data]\nroot = 'here'\n[train]\nlr = 1\n")
    recipe = config.load(tmp_path / "mine.toml", {"train.epochs": 3, "model.chunk_regions": 0})
    assert recipe.train.epochs == 3.0 and recipe.train.lr == 1.0
    assert recipe.tasks[""].data.root == str(tmp_path / "here")
    assert recipe.model.fields == {"chunk_regions": None}
    with pytest.raises(ValueError, match=r"must be TABLE\.KEY, got 'epochs'"):
        config.load(tmp_path / "mine.toml", {"epochs": 3})
    with pytest.raises(ValueError, match=r"lr in train\.lr\.x must be a table, got 1"):
        config.load(tmp_path / "mine.toml", {"train.lr.x": 3})
    recipe = config.load(tmp_path / "mine.toml", {"tasks.a.data.size": 9, "tasks.a.weight": 2})
    part = recipe.tasks["a"]
    assert (part.data.size, part.data.root, part.weight) == (9, str(tmp_path / "here"), 2.0)
    with pytest.raises(FileNotFoundError, match="CONFIG must be a TOML file or one of"):
        config.load("no-such-recipe")


def test_norms_biases_tokens_and_tables_do_not_decay():
    model = xm.create_model(
        "swinv2_tiny_window8_256", context="hyper", dim=32, num_heads=1, num_classes=3, depth=1
    )
    names = {id(p): name for name, p in model.named_parameters()}
    free, decayed = ({names[id(p)] for p in group["params"]}
                     for group in fit.weight_decay_groups(model, 0.1))  # fmt: skip
    assert free | decayed == set(names.values()) and not free & decayed
    assert "class_token" in free and "context.layers.0.norm1.weight" in free
    assert all(name.endswith(".weight") and model.get_parameter(name).dim() >= 2
               for name in decayed)  # fmt: skip
    assert not any("norm" in name or "cpb_mlp" in name or "logit_scale" in name for name in decayed)
    assert {"context.layers.0.mlp.up.weight", "input_proj.weight", "head.1.weight"} <= decayed


def test_the_rate_is_a_cosine_after_a_linear_start():
    train = config.Train(lr=2.0, min_lr=0.1, warmup_epochs=1, epochs=5)
    rates = [fit.learning_rate(train, step, 50, 10) for step in range(50)]
    assert rates[:11] == pytest.approx([2 * (i + 1) / 11 for i in range(11)])
    expected = [0.2 + 0.9 * (1 + math.cos(math.pi * i / 39)) for i in range(40)]
    assert rates[10:] == pytest.approx(expected)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16])
@pytest.mark.parametrize("mean", [None, (0.1, 0.2, 0.3)])
@pytest.mark.parametrize("std", [None, (0.5, 0.6, 0.7)])
def test_images_to_be_mixed_are_what_the_model_sees(dtype, mean, std):
    model = xm.create_model(
        "test_convnext", region=32, dim=16, num_heads=1, depth=1, mean=mean, std=std
    )
    top = 256 if dtype == torch.uint8 else 65536
    images = torch.randint(0, top, (2, 3, 32, 32)).to(dtype)
    grid = model.grid(32, 32)
    seen, mixed = model.extract(images, grid), model.extract(as_float(model, images), grid)
    torch.testing.assert_close(mixed, seen, rtol=1e-5, atol=1e-5)


def test_seeds_leave_the_generators_alone():
    draw = np.random.rand
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    after = torch.rand(2), draw(2)
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    with seeded(3, 4):
        one = torch.rand(2), draw(2)
    with seeded(3, 4):
        two = torch.rand(2), draw(2)
    with seeded(3, 5):
        other = torch.rand(2), draw(2)
    for i in range(2):
        assert (one[i] == two[i]).all() and (one[i] != other[i]).all()
    assert torch.equal(torch.rand(2), after[0]) and (draw(2) == after[1]).all()


def xt(*words):
    return CliRunner().invoke(main, ["train", *map(str, words)])


def test_the_command(root, tmp_path):
    lines = ['[model]\nname = "test_convnext"\nregion = 32\ndim = 16\nnum_heads = 1\ndepth = 1',
             "[data]\nsize = 32", "[train]\nepochs = 9\nbatch_size = 6\nworkers = 0"]  # fmt: skip
    (tmp_path / "mine.toml").write_text("\n".join(lines))
    command = [tmp_path / "mine.toml", "-o", tmp_path / "out", "--data", root, "--device", "cpu",
               "--set", "train.epochs=1"]  # fmt: skip
    result = xt(*command)
    assert result.exit_code == 0, result.output
    assert "step 3, epoch 1: loss" in result.output and "top1" in result.output
    assert "out/: model, best, log.csv, run.json" in result.output
    assert len(losses(tmp_path / "out")) == 3
    again = xt(*command)
    assert again.exit_code == 1 and "out exists already" in again.output
    wrong = xt(tmp_path / "mine.toml", "-o", tmp_path / "two", "--set", "train.lrr=1")
    assert wrong.exit_code == 1 and wrong.output.count("\n") == 1
    assert "train: unknown key 'lrr'. Near it: lr." in wrong.output
    none = xt(tmp_path / "mine.toml", "-o", tmp_path / "two", "--data", tmp_path)
    assert none.exit_code == 1 and "data.train must be a folder" in none.output
    assert not (tmp_path / "two.part").exists()


def test_every_shipped_recipe_loads_and_is_listed():
    result = xt("--list")
    assert result.exit_code == 0, result.output
    names = config.shipped()
    assert len(result.output.splitlines()) == len(names)
    for name, path in names.items():
        config.load(name)
        assert re.search(rf"^ *{name} +{re.escape(config.describe(path))}$", result.output, re.M)


def test_every_row_of_the_papers_table_has_its_recipe():
    """Size, region and parameter count are those of the row that the recipe names."""
    table = Path(xm.__file__).parent / "assets" / "paper" / "table2_inaturalist.csv"
    recipes = {config.describe(path): name for name, path in config.shipped().items()}
    rows = list(csv.DictReader(table.open()))
    assert len(rows) == len([name for name in recipes.values() if name.startswith("inat-")])
    for row in rows:
        words = " ".join(filter(None, (row["model"], row["context"], row["size"])))
        (title,) = (title for title in recipes if title.startswith(f"{words}, table 2: "))
        assert row["top1"] in title
        recipe = config.load(recipes[title])
        size, _, region = row["size"].partition("/")
        assert recipe.tasks[""].data.shape == (int(size),) * 2
        assert recipe.model.name.endswith(f"_{region or size}")
        assert recipe.train.lr == (1e-5 if row["model"] in ("Swin-B", "Swin-L") else 1e-4)
        if row["model"] not in ("Swin-T", "Hiera-B", "Hiera-B+") or not row["params_m"]:
            continue  # the same layers, wider: half a second each
        with torch.device("meta"):
            context = None if recipe.model.context == "none" else recipe.model.context
            model = xm.create_model(
                recipe.model.name, context=context, num_classes=284, **recipe.model.fields
            )
        count = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        assert abs(count - float(row["params_m"])) < 0.6, (words, count)


def test_a_base_gives_what_a_recipe_does_not(tmp_path):
    (tmp_path / "a.toml").write_text("[train]\nlr = 3.0\nepochs = 7\n[data]\nsize = 32")
    (tmp_path / "b.toml").write_text("base = 'a.toml'\n[train]\nlr = 4.0")
    recipe = config.load(tmp_path / "b.toml")
    assert (recipe.train.lr, recipe.train.epochs, recipe.tasks[""].data.size) == (4.0, 7.0, 32)
    (tmp_path / "c.toml").write_text("base = 'classify-folder'\n[data]\nroot = 'x'")
    recipe = config.load(tmp_path / "c.toml")
    assert recipe.model.pretrained and recipe.tasks[""].data.root == str(tmp_path / "x")
    (tmp_path / "a.toml").write_text("base = 'b.toml'")
    with pytest.raises(ValueError, match=r"base must be a recipe that is not built on this one"):
        config.load(tmp_path / "b.toml")


@pytest.fixture
def masked(tmp_path):
    """Images of a dark and a light half, and masks that say which is which."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 3), ("val", 2)):
        for i in range(count):
            mask = np.zeros((100, 90), dtype=np.uint8)
            mask[:, 30 + 10 * i :] = 1
            pixels = (70 + 110 * mask[..., None] + rng.normal(0, 20, (100, 90, 3))).clip(0, 255)
            for folder, array in (("images", pixels.astype(np.uint8)), ("masks", mask)):
                path = tmp_path / split / folder / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(path)
    return tmp_path


def segmentation(root, **train):
    return config.from_dict({
        "model": RECIPE["model"] | {"chunk_regions": 0},
        "head": {"kind": "dense", "output_stride": 8},
        "data": {"form": "masks", "root": str(root), "size": 64, "classes": ["dark", "light"]},
        "augment": {"flip_vertical": 0.5, "rotate": True},
        "train": {"epochs": 6, "batch_size": 3, "lr": 1e-2, "workers": 0} | train,
    })  # fmt: skip


def test_segmentation_learns_and_saves_its_head(masked, tmp_path):
    last = fit.fit(segmentation(masked), tmp_path / "out", device="cpu")
    assert last["step"] == 24 and last["miou"] > 70 and last["accuracy"] > 80
    assert losses(tmp_path / "out")[0] > 2 * losses(tmp_path / "out")[-1]
    model = xm.XT.from_pretrained(tmp_path / "out" / "best").eval()
    image = torch.from_numpy(np.array(Image.open(masked / "val" / "images" / "0.png")))
    with torch.no_grad():
        out = model(image.permute(2, 0, 1)).heads["mask"]
    found = model.heads["mask"].predict(out)
    assert found.shape == (1, 13, 12) and (found[0, :, :3] == 0).float().mean() > 0.7


def test_the_confusion_counts_what_is_known(masked):
    task = make_task(segmentation(masked))
    assert task.length("train") == 3 * 4 and task.length("val") == 2 * 4
    image, target = task.item("val", 3, None)  # the lower right corner, 36 x 26 px of the image
    assert image.shape == (3, 64, 64) and target.shape == (8, 8)
    assert (
        (target[:4, :3] == 1).all() and (target[5:] == 255).all() and (target[:, 4:] == 255).all()
    )
    truth = torch.tensor([[[0, 0, 1, 255]]])
    scores = torch.tensor([[[[9.0, 0, 0, 9]], [[0.0, 9, 9, 0]]]])
    record = task.record(None, scores, fit.Batch(None, truth))
    assert record == [[[1, 1], [0, 1]]]
    found = task.metrics(record * 2)
    assert found == {"miou": 50.0, "accuracy": pytest.approx(200 / 3)}


def test_segmentation_refuses_another_loss(masked):
    recipe = segmentation(masked)
    other = config.from_dict(recipe_tables(recipe, loss="bce"))
    with pytest.raises(ValueError, match=r"head\.loss must be cross_entropy for masks"):
        make_task(other)


def recipe_tables(recipe, **head):
    tables = recipe.to_dict()
    fields = tables["model"].pop("fields")
    tables["model"] = {"name": tables["model"]["name"], "context": "xl", **fields}
    tables["model"]["chunk_regions"] = 0
    return tables | {"head": tables["head"] | head}


@pytest.mark.parametrize("kind", ["accumulate", "recompute"])
def test_what_saves_memory_changes_no_loss(kind, root, tmp_path):
    plain = {"augment_mixup": 0.0, "augment_cutmix": 0.0, "train_epochs": 1}
    for name, value in (("one", 1), ("two", 2)):
        change = {"train_accumulate": value, "train_recompute": 0}
        if kind == "recompute":
            change = {"train_accumulate": 1, "train_recompute": 0 if name == "one" else 3}
        fit.fit(recipe_of(root, **plain, **change), tmp_path / name, device="cpu")
    np.testing.assert_allclose(losses(tmp_path / "one"), losses(tmp_path / "two"), rtol=1e-3)


@pytest.mark.parametrize("gradient", ["stop", "through", "truncated"])
def test_the_memorys_gradient_is_in_the_recipe(gradient, root, tmp_path):
    recipe = recipe_of(root, train_epochs=0.2, model_gradient=gradient, model_gradient_chunks=1,
                       model_chunk_regions=1)  # fmt: skip
    fit.fit(recipe, tmp_path / "out", device="cpu")
    saved = xm.XT.from_pretrained(tmp_path / "out" / "model").config
    assert saved.gradient == gradient and len(losses(tmp_path / "out")) == 1


def test_bfloat16_is_near_float32_and_leaves_float32_weights(root, tmp_path):
    for name in config.PRECISIONS:
        recipe = recipe_of(root, train_precision=name, train_epochs=1, augment_mixup=0.0,
                           augment_cutmix=0.0)  # fmt: skip
        fit.fit(recipe, tmp_path / name, device="cpu")
    one, two = (losses(tmp_path / name) for name in config.PRECISIONS)
    assert one != two
    np.testing.assert_allclose(one[:2], two[:2], rtol=0.05)
    state = load_file(tmp_path / "bfloat16" / "model" / "model.safetensors")
    assert all(tensor.dtype != torch.bfloat16 for tensor in state.values())


def test_a_run_may_start_from_a_saved_model(trained, root, tmp_path):
    start = config.from_dict({
        "model": {"weights": str(trained[0] / "model")},
        "data": {"root": str(root), "size": 64},
        "train": {"lr": 1e-30, "epochs": 0.2, "batch_size": 4, "workers": 0},
    })  # fmt: skip
    path = tmp_path / "mine.toml"
    path.write_text("[model]\nregion = 96")  # what is changed to saved weights is all of [model]
    assert config.load(path, {"model.weights": trained[0] / "model"}).model == start.model
    fit.fit(start, tmp_path / "out", device="cpu")
    before, after = (
        load_file(folder / "model" / "model.safetensors")
        for folder in (trained[0], tmp_path / "out")
    )
    assert before.keys() == after.keys() and "head.1.weight" in before
    for key in before:
        torch.testing.assert_close(before[key], after[key], rtol=0, atol=1e-6)
    more = tmp_path / "more"
    shutil.copytree(root, more)
    picture(more / "train" / "third" / "0.png", 20, (60, 60), np.random.default_rng(0))
    part = start.tasks[""]
    start = replace(start, tasks={"": replace(part, data=replace(part.data, root=str(more)))})
    model = fit.build_model(start, make_tasks(start))
    state = model.state_dict()
    assert len(state["head.1.weight"]) == 3 != len(before["head.1.weight"])
    assert torch.equal(state["head.0.weight"], before["head.0.weight"])
    assert torch.equal(state["input_proj.weight"], before["input_proj.weight"])


def test_several_labels_an_image(root, tmp_path):
    lines = ["path,label"]
    for i in range(9):
        lines += [f"train/dark/{i}.png,low;any", f"train/light/{i}.png,any"]
    (tmp_path / "train.csv").write_text("\n".join(lines))
    recipe = recipe_of(root, augment_mixup=0.0, augment_cutmix=0.0, train_epochs=1)
    tables = recipe_tables(recipe)
    tables["augment"]["label_smoothing"] = 0.0
    tables |= {"data": {
        "form": "list", "root": str(tmp_path), "images": str(root), "val": "train.csv",
        "multi_label": True, "size": 64,
    }}  # fmt: skip
    last = fit.fit(config.from_dict(tables), tmp_path / "out", device="cpu")
    assert 0 <= last["f1"] <= 100
    tables["augment"]["label_smoothing"] = 0.1
    with pytest.raises(ValueError, match=r"augment\.label_smoothing must be 0 for several labels"):
        make_task(config.from_dict(tables))
    tables["augment"]["label_smoothing"] = 0.0
    model = xm.XT.from_pretrained(tmp_path / "out" / "model")
    assert model.head is None and model.config.heads["labels"]["multi_label"]
    task = make_task(config.from_dict(tables))
    truth, logits = torch.tensor([[1.0, 0], [1, 1]]), torch.tensor([[2.0, 3], [-1, 4]])
    records = task.record(None, logits, fit.Batch(None, truth))
    assert task.metrics(records)["f1"] == pytest.approx(200 * 2 / (2 * 2 + 1 + 1))


SMALL = {"name": "test_convnext", "context": "xl", "region": 64, "dim": 16, "num_heads": 1,
         "depth": 1, "chunk_regions": 2}  # fmt: skip


@pytest.fixture
def boxed(tmp_path):
    """Bright rectangles on noise, in COCO JSON."""
    rng = np.random.default_rng(0)
    (tmp_path / "annotations").mkdir()
    for split, count in (("train", 4), ("val", 2)):
        (tmp_path / split).mkdir()
        images, notes = [], []
        for i in range(count):
            size = (128, 160 if split == "train" else 150)
            pixels = rng.normal(60, 10, (*size, 3))
            for j in range(3):
                left, top = 10 + 45 * j, int(rng.integers(10, 80))
                pixels[top : top + 34, left : left + 30] = 220
                notes.append({"id": len(notes) + 1, "image_id": i, "category_id": 1,
                              "bbox": [left, top, 30, 34], "area": 1020, "iscrowd": 0})  # fmt: skip
            image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
            image.save(tmp_path / split / f"{i}.png")
            images.append({"id": i, "file_name": f"{i}.png", "height": size[0], "width": size[1]})
        table = {"images": images, "annotations": notes, "categories": [{"id": 1, "name": "x"}]}
        (tmp_path / "annotations" / f"{split}.json").write_text(json.dumps(table))
    return tmp_path


def test_detection_trains_on_crops_and_is_measured_on_whole_images(boxed, tmp_path):
    recipe = config.from_dict({
        "model": SMALL,
        "head": {"kind": "fcos", "dim": 32, "group": 2},
        "data": {"form": "coco", "root": str(boxed), "size": 128},
        "train": {"epochs": 4, "batch_size": 2, "lr": 3e-3, "workers": 0},
    })  # fmt: skip
    task = make_task(recipe)
    assert task.length("train") == 8 and task.length("val") == 2
    for index in range(8):
        image, target = task.item("train", index, np.random.default_rng(index))
        assert image.shape == (3, 128, 128)
        for left, top, right, bottom in target["boxes"].round().int().tolist():
            inside = image[:, top:bottom, left:right]
            assert (inside == 220).all() and right > left  # the boxes went with the pixels
    last = fit.fit(recipe, tmp_path / "out", device="cpu")
    assert losses(tmp_path / "out")[-1] < losses(tmp_path / "out")[0]
    assert 0 <= last["mAP"] <= last["mAP50"] <= 100 and "mAP_large" not in last
    assert xm.XT.from_pretrained(tmp_path / "out" / "model").config.heads["boxes"]["classes"] == 1


def test_what_was_found_is_compared_image_by_image(boxed):
    recipe = config.from_dict({
        "model": SMALL, "head": {"kind": "fcos"}, "data": {"form": "coco", "root": str(boxed)},
    })  # fmt: skip
    task = make_task(recipe)
    data = task.data["val"]
    perfect = [(i, data.boxes[i].tolist(), [0.9] * 3, data.labels[i].tolist()) for i in (1, 0)]
    assert task.metrics(perfect)["mAP"] == pytest.approx(100)
    swapped = [(1 - i, *rest) for i, *rest in perfect]
    assert task.metrics(swapped)["mAP"] < 50


@pytest.mark.parametrize(
    "name, data",
    [("classify-folder", "root"), ("segment-masks", "masked"), ("detect-coco", "boxed")],
)
def test_a_recipe_for_ones_own_data_runs_as_written(name, data, request, tmp_path):
    """All of it but size, encoder, its weights and the number of epochs."""
    data = request.getfixturevalue(data)
    changes = {"model.pretrained": "false", "model.name": "test_convnext", "data.size": 256,
               "train.epochs": 0.01}  # fmt: skip
    sets = (word for key, value in changes.items() for word in ("--set", f"{key}={value}"))
    result = xt(name, "--data", data, "-o", tmp_path / "run", "--device", "cpu", *sets)
    assert result.exit_code == 0, result.output
    assert len(losses(tmp_path / "run")) == 1
    written = json.loads((tmp_path / "run" / "run.json").read_text())["run"]
    assert math.isfinite(written["validation"]["loss"])
    image = next((data / "val").glob("**/0.png"))
    words = ["predict", image, "--model", tmp_path / "run" / "model", "--device", "cpu", "-o",
             tmp_path / "said"]  # fmt: skip
    result = CliRunner().invoke(main, list(map(str, words)))
    assert result.exit_code == 0, result.output
    if name == "classify-folder":
        assert json.loads((tmp_path / "said").read_text())["classes"] == ["dark", "light"]
    elif name == "segment-masks":
        assert set(np.unique(tifffile.imread(tmp_path / "said" / "mask.tif"))) <= {0, 1}
    else:
        found = json.loads((tmp_path / "said" / "boxes.json").read_text())
        assert found["categories"] == [{"id": 0, "name": "x"}]


@pytest.fixture
def scenes(tmp_path):
    """Two scenes of speckle with a bright point at each detection."""
    rng = np.random.default_rng(0)
    header = ["scene_id", "detect_scene_row", "detect_scene_column", "is_vessel", "is_fishing",
              "vessel_length_m", "distance_from_shore_km", "confidence"]  # fmt: skip
    for split in ("train", "validation"):
        (tmp_path / split / "abc").mkdir(parents=True)
        bands = rng.normal(-20, 1, (2, 140, 150)).astype(np.float32)
        rows = [["abc", 10 + 40 * i, 100 - 30 * i, True, i % 2 == 0, 50, 1 + 0.4 * i, "HIGH"]
                for i in range(3)]  # fmt: skip
        rows.append(["abc", 70, 20, "", "", "", "", "LOW"])
        for _, row, col, *_ in rows:
            bands[:, row, col] = 10
        for name, band in zip(("VH", "VV"), bands, strict=True):
            tifffile.imwrite(tmp_path / split / "abc" / f"{name}_dB.tif", band, tile=(64, 64))
        with (tmp_path / f"{split}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([header, *rows])
    (tmp_path / "shore").mkdir()
    np.save(tmp_path / "shore" / "abc_shoreline.npy", np.array([[10.0, 0.0], [10.0, 99.0]]))
    return tmp_path


def vessels(root, **data):
    return config.from_dict({
        "model": SMALL | {"in_chans": 2, "mean": [-20, -20], "std": [5, 5]},
        "head": {"kind": "xview3", "output_stride": 4, "decoder_channels": [16, 8, 8]},
        "data": {"form": "xview3", "root": str(root), "size": 64} | data,
        "augment": {"flip_vertical": 0.5, "rotate": True},
        "train": {"epochs": 1, "batch_size": 3, "lr": 1e-3, "workers": 0},
    })  # fmt: skip


def test_vessels_train_and_are_scored_by_scene(scenes, tmp_path):
    recipe = vessels(scenes, shorelines="shore", near=1.0)
    task = make_task(recipe)
    task.in_chans = 2
    assert task.length("train") == task.length("val") == 9
    for index in range(20):
        image, target = task.item("train", index % 9, np.random.default_rng(index))
        assert image.shape == (2, 64, 64) and len(target["row"]) >= 1
        at = target["row"].long(), target["col"].long()
        assert (image[:, *at] == 10).all()  # the points went with the pixels
    last = fit.fit(recipe, tmp_path / "out", device="cpu")
    assert {"aggregate", "detection_f1", "shore_f1", "length"} < set(last)
    # What is found at its place in each crop is found at its place in the scene.
    records = []
    for tile in range(9):
        _, target = task.item("val", tile, None)
        names = ("row", "col", "is_vessel", "is_fishing", "length_m")
        records.append((tile, {name: target[name].tolist() for name in names}))
    scores = task.metrics(records[::-1])
    assert scores["aggregate"] == pytest.approx(100) and scores["shore_f1"] == pytest.approx(100)
    without = make_task(vessels(scenes))
    assert without.metrics(records)["shore_f1"] == 0
    assert without.metrics(records)["detection_f1"] == pytest.approx(100)


def test_boxes_turn_with_their_image():
    rng = np.random.default_rng(0)
    augment = config.Augment(flip=0.5, flip_vertical=0.5, rotate=True)
    for i in range(100):
        shape = (6, 6) if i % 2 else (6, 9)
        turn = Turn.draw(augment, shape, rng)
        image = torch.zeros(1, *shape)
        image[:, 1:3, 2:6] = 1
        box = torch.tensor([[2.0, 1.0, 6.0, 3.0], [2.5, 1.0, 6.0, 2.25]])
        (left, top, right, bottom), part = turn.boxes(box, shape).tolist()
        assert turn.image(image)[:, int(top) : int(bottom), int(left) : int(right)].eq(1).all()
        assert (right - left) * (bottom - top) == 8
        assert left <= part[0] < part[2] <= right and top <= part[1] < part[3] <= bottom
    assert turn.boxes(torch.zeros(0, 4), shape).shape == (0, 4)


@pytest.mark.parametrize(
    "key, value",
    [("mixup", 0.2), ("randaugment", "rand-m9"), ("label_smoothing", 0.1), ("scale", [0.5, 1])],
)
def test_an_augmentation_that_a_task_does_not_use_is_refused(key, value, masked):
    tables = recipe_tables(segmentation(masked))
    tables["augment"] = {key: value}
    with pytest.raises(ValueError, match=rf"augment\.{key} must be left out for segmentation, "
                       "which takes flip, flip_vertical, rotate, got"):  # fmt: skip
        make_task(config.from_dict(tables))


def test_a_head_that_labels_do_not_use_is_refused(root):
    tables = recipe_tables(recipe_of(root), kind="dense")
    with pytest.raises(ValueError, match=r"head must be left out for labels, .* got \{'kind'"):
        make_task(config.from_dict(tables))


@pytest.mark.parametrize("split", ["train", "val"])
def test_boxes_of_crowds_alone_are_refused(split, boxed):
    path = boxed / "annotations" / f"{split}.json"
    table = json.loads(path.read_text())
    for note in table["annotations"]:
        note["iscrowd"] = 1
    path.write_text(json.dumps(table))
    recipe = config.from_dict({
        "model": SMALL, "head": {"kind": "fcos"}, "data": {"form": "coco", "root": str(boxed)},
    })  # fmt: skip
    with pytest.raises(ValueError, match=rf"{split}\.json: expected at least one box of x that is"):
        make_task(recipe)


@pytest.mark.parametrize(
    "processes, size, mixes, rule",
    [
        (2, 6, True, r"train\.accumulate x processes = 1 x 2, twice for mixup and cutmix, got 6"),
        (2, 6, False, None),
        (2, 5, False, r"train\.accumulate x processes = 1 x 2, got 5"),
        (1, 6, True, None),
    ],
)
def test_a_batch_is_shared_by_processes_and_mixed_in_pairs(processes, size, mixes, rule, root):
    class Accelerator:
        num_processes = processes

    recipe = recipe_of(root, train_batch_size=size, train_accumulate=1,
                       augment_mixup=0.2 * mixes, augment_cutmix=0.0)  # fmt: skip
    tasks = make_tasks(recipe)
    model = fit.build_model(recipe, tasks)
    if rule is None:
        fit._Fitter(recipe, tasks, model, Accelerator())
        return
    with pytest.raises(ValueError, match=rule):
        fit._Fitter(recipe, tasks, model, Accelerator())


def test_weights_that_cannot_be_had_tell_what_to_set(root, monkeypatch):
    def fail(*words, **options):
        raise ConnectionError("no network.")

    monkeypatch.setattr(fit, "create_model", fail)
    recipe = recipe_of(root, model_pretrained=True)
    with pytest.raises(ConnectionError, match=r"no network\. .*--set model\.pretrained=false"):
        fit.build_model(recipe, make_tasks(recipe))


def test_the_other_heads_of_a_saved_model_stay(masked, tmp_path):
    heads = {"water": {"kind": "dense", "classes": 3, "output_stride": 8}}
    model = xm.create_model("test_convnext", region=32, dim=16, num_heads=1, depth=1,
                            num_classes=5, heads=heads)  # fmt: skip
    model.class_names = {"head": tuple("abcde")}
    model.save_pretrained(tmp_path / "model")
    tables = recipe_tables(segmentation(masked, epochs=0.2))
    tables["model"] = {"weights": str(tmp_path / "model")}
    fit.fit(config.from_dict(tables), tmp_path / "out", device="cpu")
    after = xm.XT.from_pretrained(tmp_path / "out" / "model")
    assert set(after.heads) == {"water", "mask"} and after.config.num_classes == 5
    assert after.class_names == {"head": tuple("abcde"), "mask": ("dark", "light")}
    for part in ("head", "heads.water"):
        kept = after.get_submodule(part).state_dict()
        for name, tensor in model.get_submodule(part).state_dict().items():
            assert torch.equal(tensor, kept[name]), (part, name)


def test_points_turn_with_their_image():
    rng = np.random.default_rng(0)
    augment = config.Augment(flip=0.5, flip_vertical=0.5, rotate=True)
    seen = set()
    for i in range(200):
        shape = (5, 5) if i % 2 else (5, 8)
        turn = Turn.draw(augment, shape, rng)
        seen.add(turn)
        image = torch.zeros(2, *shape)
        image[:, 1, 3] = 1
        ((row, col),) = turn.points(torch.tensor([[1.0, 3.0]]), shape).long().tolist()
        assert turn.image(image)[:, row, col].eq(1).all() and turn.image(image).sum() == 2
    assert len(seen) == 16


@pytest.mark.parametrize("module, extra", [("accelerate", "train"), ("pycocotools", "det")])
def test_a_missing_package_is_named(module, extra, boxed, tmp_path, monkeypatch):
    find = host.find_spec
    monkeypatch.setattr(host, "find_spec", lambda n: None if n == module else find(n))
    recipe = config.from_dict({
        "model": SMALL, "head": {"kind": "fcos"}, "data": {"form": "coco", "root": str(boxed)},
    })  # fmt: skip
    match = rf"{module} must be installed: pip install 'xt-kernels\[{extra}\]'"
    with pytest.raises(ValueError, match=match):
        fit.fit(recipe, tmp_path / "out", device="cpu")
    assert not (tmp_path / "out.part").exists()


def several(root, *, names=("mask", "things", "kinds"), weights=(1.0, 2.0, 0.5), **train):
    """Masks, boxes and labels of images in one folder, one head for each."""
    tasks = {
        "mask": {"head": {"kind": "dense", "output_stride": 8},
                 "data": {"form": "masks", "classes": ["dark", "light"]},
                 "augment": {"rotate": True}},
        "things": {"head": {"kind": "fcos"}, "data": {"form": "coco"}},
        "kinds": {"data": {"form": "folder", "train": "kinds", "val": "kinds"},
                  "augment": {"label_smoothing": 0.1}},
    }  # fmt: skip
    tasks = {name: tasks[name] | {"weight": w} for name, w in zip(names, weights, strict=True)}
    return config.from_dict({
        "model": SMALL, "data": {"root": str(root), "size": 64}, "tasks": tasks,
        "train": {"epochs": 1, "batch_size": 2, "lr": 3e-3, "workers": 0, "accumulate": 2} | train,
    })  # fmt: skip


@pytest.fixture
def annotated(boxed, masked):
    """Images with boxes, others with masks, others with labels."""
    assert boxed == masked
    rng = np.random.default_rng(0)
    for value, name in ((60, "dim"), (190, "lit")):
        for i in range(3):
            picture(boxed / "kinds" / name / f"{i}.png", value, (70, 70), rng)
    return boxed


def test_several_heads_learn_at_once_on_one_trunk(annotated, tmp_path):
    recipe = several(annotated, epochs=2)
    last = fit.fit(recipe, tmp_path / "out", device="cpu")
    rows = list(csv.DictReader((tmp_path / "out" / "log.csv").open()))
    names = ("mask", "things", "kinds")
    lengths = [task.length("train") for task in make_tasks(recipe).values()]
    assert len(rows) == last["step"] == 2 * max(lengths) / 2  # passes over the longest
    for row in rows:
        parts = [float(row[f"{name}/loss"]) for name in names]
        assert float(row["loss"]) == pytest.approx(np.dot(parts, (1.0, 2.0, 0.5)))
    for name in names:
        curve = [float(row[f"{name}/loss"]) for row in rows]
        assert np.mean(curve[-3:]) < np.mean(curve[:3]), name
    metrics = {"mask/miou", "mask/accuracy", "things/mAP", "things/mAP50", "kinds/top1"}
    assert metrics | {"loss", "mask/loss", "things/loss", "kinds/loss"} < set(last)
    parts = [last[f"{name}/loss"] for name in names]
    assert last["loss"] == pytest.approx(np.dot(parts, (1.0, 2.0, 0.5)))
    model = xm.XT.from_pretrained(tmp_path / "out" / "model").eval()
    assert model.head is None and set(model.heads) == set(names)
    assert model.class_names == {"mask": ("dark", "light"), "things": ("x",),
                                 "kinds": ("dim", "lit")}  # fmt: skip
    again = config.from_dict(several_tables(recipe))
    assert again == recipe  # the record's recipe is one that can be read
    image = next((annotated / "val").glob("*.png"))
    words = ["predict", image, "--model", tmp_path / "out" / "model", "--device", "cpu", "-o",
             tmp_path / "said"]  # fmt: skip
    result = CliRunner().invoke(main, list(map(str, words)))
    assert result.exit_code == 0, result.output
    assert {"mask.tif", "things.json"} <= {path.name for path in (tmp_path / "said").iterdir()}


def test_the_recipes_of_the_page_are_read_and_run(annotated, tmp_path):
    page = (Path(__file__).parent.parent / "docs" / "training.md").read_text()
    first, second = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    (tmp_path / "first.toml").write_text(first)
    recipe = config.load(tmp_path / "first.toml")
    assert recipe.model.fields == {"gradient": "truncated", "chunk_regions": 4}
    path = tmp_path / "second.toml"
    path.write_text(second)
    changes = {"model.pretrained": "false", "model.name": "test_convnext", "data.size": 256,
               "train.epochs": 0.01, "train.workers": 0}  # fmt: skip
    sets = (word for key, value in changes.items() for word in ("--set", f"{key}={value}"))
    result = xt(path, "--data", annotated, "-o", tmp_path / "run", "--device", "cpu", *sets)
    assert result.exit_code == 0, result.output
    assert "water/miou" in result.output and "ships/mAP" in result.output
    assert set(xm.XT.from_pretrained(tmp_path / "run" / "model").heads) == {"water", "ships"}


def several_tables(recipe):
    tables = recipe.to_dict()
    fields = tables["model"].pop("fields")
    return tables | {"model": {"name": tables["model"]["name"], "context": "xl", **fields}}


def test_two_processes_train_the_same_heads(annotated, tmp_path):
    """Those whose loss is a mean over images: no head is left to one of the processes."""
    recipe = "several(Path(sys.argv[1]), names=('mask', 'kinds'), weights=(1, 2), batch_size=4)"
    in_two_processes(recipe, annotated, tmp_path / "two")
    one = several(annotated, names=("mask", "kinds"), weights=(1, 2), batch_size=4)
    fit.fit(one, tmp_path / "one", device="cpu")
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-4)
    one, two = (load_file(tmp_path / name / "model" / "model.safetensors")
                for name in ("one", "two"))  # fmt: skip
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=0, atol=1e-4)


def test_the_best_model_is_that_of_the_mean_metric(annotated, tmp_path, monkeypatch):
    scores = {"mask": [0.0, 60.0, 0.0], "kinds": [50.0, 10.0, 60.0]}  # means 25, 35, 30
    kept, steps = [], iter(range(99))
    monkeypatch.setattr(
        fit._Fitter, "_validate",
        lambda self, objective, name, task: (1.0, {task.best: scores[name][next(steps) // 2]}),
    )  # fmt: skip
    monkeypatch.setattr(fit._Fitter, "_keep", lambda self, name: kept.append((name, self.step)))
    recipe = several(annotated, names=("mask", "kinds"), weights=(1, 1), epochs=3)
    fit.fit(recipe, tmp_path / "out", device="cpu")
    assert kept == [("best", 6), ("best", 12), ("model", 18)]


def test_one_task_by_name_is_the_recipe_without(masked, tmp_path):
    """Bit for bit, and so with another task beside it up to its first step."""
    plain = {"model": SMALL, "head": {"kind": "dense", "output_stride": 8},
             "data": {"form": "masks", "root": str(masked), "size": 64,
                      "classes": ["dark", "light"]}, "augment": {"rotate": True},
             "train": {"epochs": 1, "batch_size": 2, "lr": 3e-3, "workers": 0}}  # fmt: skip
    fit.fit(config.from_dict(plain), tmp_path / "plain", device="cpu")
    recipe = several(masked, names=("mask",), weights=(1.0,), accumulate=1)
    fit.fit(recipe, tmp_path / "named", device="cpu")
    assert losses(tmp_path / "named") == losses(tmp_path / "plain")
    saved = [load_file(tmp_path / n / "model" / "model.safetensors") for n in ("plain", "named")]
    assert saved[0].keys() == saved[1].keys()
    assert all(torch.equal(saved[0][key], saved[1][key]) for key in saved[0])


@pytest.mark.parametrize("at", [1, 4])
def test_several_tasks_go_on_after_a_stop(annotated, tmp_path, at):
    recipe = several(annotated, names=("kinds", "mask"), weights=(1.0, 1.0))

    def stop(step, loss):
        if step == at:
            raise KeyboardInterrupt

    fit.fit(recipe, tmp_path / "whole", device="cpu")
    with pytest.raises(KeyboardInterrupt):
        fit.fit(recipe, tmp_path / "out", device="cpu", on_step=stop)
    other = several(annotated, names=("kinds", "mask"), weights=(1.0, 3.0))
    with pytest.raises(ValueError, match=r"recipe tasks mask weight was 1\.0 and is 3\.0"):
        fit.fit(other, tmp_path / "out", device="cpu")
    fit.fit(recipe, tmp_path / "out", device="cpu")
    same(tmp_path / "out", tmp_path / "whole")


def test_a_loss_of_several_that_is_not_finite_is_named(annotated, tmp_path, monkeypatch):
    loss = Segmentation.loss

    def broken(task, model, batch, *, training):
        found, output = loss(task, model, batch, training=training)
        return found * math.nan, output

    monkeypatch.setattr(Segmentation, "loss", broken)
    with pytest.raises(fit.NotFiniteError, match=r"Step 1: the mask/loss must be finite, got nan"):
        fit.fit(several(annotated), tmp_path / "out", device="cpu")


def test_a_task_of_several_is_named_in_its_errors(annotated):
    tables = several_tables(several(annotated))
    tables["tasks"]["mask"]["augment"] |= {"mixup": 0.3}
    with pytest.raises(ValueError, match=r"^tasks\.mask\.augment\.mixup must be left out"):
        make_tasks(config.from_dict(tables))
    tables = several_tables(several(annotated))
    tables["tasks"]["kinds"]["head"] = {"kind": "fcos"}
    with pytest.raises(ValueError, match=r"^tasks\.kinds\.head must be left out for labels"):
        make_tasks(config.from_dict(tables))
    tables = several_tables(several(annotated))
    tables["tasks"]["mask"]["head"]["loss"] = "bce"
    with pytest.raises(ValueError, match=r"^tasks\.mask\.head\.loss must be cross_entropy"):
        make_tasks(config.from_dict(tables))
