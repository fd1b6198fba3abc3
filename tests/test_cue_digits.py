"""Cue-lookup digits: the ceilings are theorems, the runs reproducible, the command whole."""

import csv
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner

from xt_models import host
from xt_models.cli import main
from xt_models.train import ablate, table
from xt_models.train import cue_digits as cue

CLASSES = range(10)
ALL = cue.ROWS | ablate.ROWS


@pytest.fixture(scope="module")
def digits():
    return cue.load()


def layout_of(digits, batch=64, seed=0):
    return cue.draw(digits[0], batch, torch.Generator().manual_seed(seed))


def class_of(digits, ids):
    return torch.searchsorted(digits.starts, ids, right=True) - 1


def test_training_and_test_digits_are_disjoint_and_whole(digits):
    from sklearn.datasets import load_digits

    data = load_digits()
    known = [{image.numpy().tobytes() for image in part.images} for part in digits]
    assert len(digits[0].images) + len(digits[1].images) == len(data.images)
    assert not known[0] & known[1]
    everything = {(torch.from_numpy(i).float() / 16).numpy().tobytes(): t
                  for i, t in zip(data.images, data.target, strict=True)}  # fmt: skip
    for part in digits:
        found = class_of(part, torch.arange(len(part.images)))
        for image, digit in zip(part.images, found.tolist(), strict=True):
            assert everything[image.numpy().tobytes()] == digit


def test_down_sampling_erases_the_carrier_exactly(digits):
    images = cue.render(digits[0], layout_of(digits))
    assert images.shape == (64, 1, 64, 64) and images.abs().amax((1, 2, 3)).min() > 0.5
    assert torch.equal(F.avg_pool2d(images, 2), torch.zeros(64, 1, 32, 32))


def test_the_cue_names_the_region_of_the_label(digits):
    train, _ = digits
    layout = layout_of(digits, 300)
    signs = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(32, 32)
    signal = (cue.render(train, layout)[:, 0] * signs)[:, ::2, ::2]
    glyphs = cue.cues()
    assert len({g.numpy().tobytes() for g in glyphs}) == 4
    for i, picture in enumerate(signal):
        held = {}
        for region in range(4):
            top, left = region // 2 * 16, region % 2 * 16
            whole = picture[top : top + 16, left : left + 16]
            held[region] = whole[4:12, 4:12]
            assert whole.sum() == held[region].sum()
        mark = int(layout.cue[i])
        named = next(r for r in range(4) if torch.equal(held[mark], glyphs[r]))
        assert named == layout.named[i] != mark
        slot = [r for r in range(4) if r != mark].index(named)
        assert torch.equal(held[named], train.images[layout.digits[i, slot]])
        assert class_of(train, layout.digits[i, slot]) == layout.label[i]
        assert cue.seen_region(layout)[i] != mark
    for column, choices in ((layout.cue, 4), (layout.named, 4), (layout.label, 10)):
        assert len(set(column.tolist())) == choices


def test_ceilings_by_enumeration():
    """The best guess from what each model is given, over all digits and targets."""

    def ceiling(given):
        labels = defaultdict(Counter)
        for triple in itertools.product(CLASSES, repeat=3):
            for target in range(3):
                labels[given(triple)][triple[target]] += 1
        return 100 * sum(max(c.values()) for c in labels.values()) / 3000

    assert ceiling(lambda triple: None) == cue.ROWS["downsampled"].ceiling == 10
    assert ceiling(lambda triple: triple[0]) == cue.ROWS["one-region"].ceiling == 40
    assert ceiling(lambda triple: tuple(sorted(triple))) == cue.ROWS["bag"].ceiling == 43
    assert cue.ROWS["32/32"].ceiling == 10 and cue.ROWS["xl-no-memory"].ceiling == 43


def test_ceilings_hold_on_the_test_set_even_for_one_who_knows_it(digits):
    layout = cue.balanced_layout(digits[1])
    bags = defaultdict(Counter)
    for ids, named, label in zip(*(layout[i].tolist() for i in (0, 3, 1)), strict=True):
        bags[tuple(sorted(ids)), named][label] += 1
    count = len(layout.label)
    assert count == 6000
    assert 100 * sum(max(c.values()) for c in bags.values()) / count == 43
    seen = class_of(digits[1], layout.digits.gather(1, layout.seen[:, None])[:, 0])
    assert 100 * (seen == layout.label).sum() / count == 40
    assert layout.label.bincount().tolist() == [600] * 10
    triples = Counter(map(tuple, class_of(digits[1], layout.digits).tolist()))
    assert len(triples) == 1000 and set(triples.values()) == {6}
    assert (layout.named != layout.cue).all()


@pytest.mark.parametrize("name", list(ALL))
def test_a_row_sees_what_its_ceiling_says(name, digits):
    """The same digits and cue in other places: a bag cannot tell, a context can."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = cue.CueDigits(ALL[name]).eval().double()

    def logits(layout):
        with torch.no_grad():
            return model(cue.render(digits[0], layout).double(), cue.seen_region(layout))[0]

    a = layout_of(digits)._replace(cue=torch.zeros(64, dtype=torch.long))
    a = a._replace(named=torch.full((64,), 3))
    b = a._replace(digits=a.digits.roll(1, 1), cue=a.cue + 1)
    x, y = logits(a), logits(b)
    assert x.shape == (64, 10)
    assert ALL[name].ceiling == {
        "downsampled": 10, "32/32": 10, "one-region": 40, "bag": 43, "xl-no-memory": 43,
        "mamba-no-state": 43,
    }.get(name)  # fmt: skip
    if name in ("bag", "xl-no-memory", "mamba-no-state"):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)
    elif name in ("downsampled", "32/32"):
        torch.testing.assert_close(x, x[:1].expand_as(x), rtol=1e-12, atol=1e-12)
    else:
        assert (x - y).abs().max() > 1e-6
    other = a._replace(digits=a.digits.flip(0), seen=a.seen)
    slot = a.seen[:, None]
    other = other._replace(digits=other.digits.scatter(1, slot, a.digits.gather(1, slot)))
    y = logits(other)
    if name == "one-region":
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)
    elif name not in ("downsampled", "32/32"):
        assert (x - y).abs().max() > 1e-6


@pytest.mark.parametrize(
    "name, through",
    [("xl-stop", False), ("xl-through", True), ("mamba-stop", False), ("mamba-through", True)],
)
def test_only_one_row_sends_gradient_through_memory(name, through, digits):
    """The last chunk's class token reaches the pixels of the chunks before it, or does not."""
    model = cue.CueDigits(ALL[name]).eval()
    layout = layout_of(digits, 4)
    images = cue.render(digits[0], layout).requires_grad_()
    seen = []
    model.context.register_forward_hook(lambda module, inputs, out: seen.append(out[0][:, -1]))
    model(images, cue.seen_region(layout))
    seen[-1].sum().backward()
    assert len(seen) == 4 and images.grad[:, :, 32:, 32:].abs().sum() > 0
    assert bool(images.grad[:, :, :32].abs().sum() > 0) == through


def test_the_same_seed_gives_the_same_images_and_the_same_run(digits):
    for a, b in zip(layout_of(digits), layout_of(digits), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(layout_of(digits).label, layout_of(digits, seed=1).label)
    before = torch.get_rng_state()
    runs = [list(cue.train("xl-through", seed, 3, copies=1)) for seed in (5, 5, 6)]
    assert torch.equal(torch.get_rng_state(), before)
    assert runs[0] == runs[1] != runs[2]
    assert [point.step for point in runs[0]] == [3]


def test_a_short_training_learns(monkeypatch):
    monkeypatch.setattr(cue, "EVALUATE_EVERY", 20)
    points = list(cue.train("bag", 0, 80, copies=1))
    assert [p.step for p in points] == [20, 40, 60, 80]
    assert points[-1].loss < points[0].loss - 0.3
    assert 20 < points[-1].score <= 43


def xt(*words):
    return CliRunner().invoke(main, ["train", "cue-digits", *map(str, words)])


def test_the_command_trains_as_long_as_the_function():
    defaults = {
        option.name: option.default
        for option in main.commands["train"].commands["cue-digits"].params
    }
    assert defaults["steps"] == cue.STEPS


@pytest.mark.parametrize(
    ("program", "told"), [("/bin/xt", "xt"), ("/lib/xt_models/cli.py", "python -m xt_models.cli")]
)
def test_the_command_leaves_a_table_curves_and_a_picture(tmp_path, monkeypatch, program, told):
    from PIL import Image

    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", [program, "train", "cue-digits", "-o", "the table"])
    result = xt("-o", out, "--steps", 2, "--seeds", 1, "--jobs", 2, "--rows", "64/32,downsampled")
    assert result.exit_code == 0, result.output
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    assert sorted(p.name for p in out.iterdir()) == ["curves.csv", "curves.png", "table.json"]
    cells = r" +\| (\d+\.\d) +\| \1 +\| "
    assert re.search(rf"\n\| `64/32`{cells} +\| \d+ +\| 64/32, context over", result.output)
    assert re.search(rf"\n\| `downsampled`{cells}10\.0 ", result.output)
    rows = list(csv.DictReader((out / "curves.csv").open()))
    assert [(r["row"], r["seed"], r["step"]) for r in rows] == [
        ("64/32", "0", "2"),
        ("downsampled", "0", "2"),
    ]
    record = json.loads((out / "table.json").read_text())
    assert record["command"] == f"{told} train cue-digits -o 'the table'"
    assert record["rows"]["64/32"]["accuracies"] == [float(rows[0]["accuracy"])]
    assert record["rows"]["downsampled"]["mean"] == 10
    assert record["machine"]["threads_a_run"] == 1 and record["versions"]["torch"]
    assert record["settings"]["steps"] == 2 and record["settings"]["seeds"] == [0]
    with Image.open(out / "curves.png") as picture:
        assert picture.width > 1000
    refused = xt("-o", out)
    assert refused.exit_code == 1 and "out exists already" in refused.output


@pytest.mark.parametrize("what", list(ablate.ABLATIONS))
def test_an_ablation_is_a_table_of_its_rows(what, tmp_path, monkeypatch):
    seen = []

    def write(out, name, rows, **options):
        seen.append((name, rows, options["seeds"], options["steps"], options["jobs"]))
        runs = [table.Run(row, 0, [cue.Point(1, 1.0, 50.0)], 1.0) for row in rows]
        return table._summary(name, rows, runs, 1, 1, 1)

    monkeypatch.setattr(table, "write_table", write)
    command = ["train", "ablate", what, "-o", str(tmp_path / "out"), "--seeds", "2", "--jobs", "2"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    assert seen == [("ablate", list(ablate.ABLATIONS[what]), 2, cue.STEPS, 2)]
    for name in ablate.ABLATIONS[what]:
        assert f"| `{name}` " in result.output and ALL[name].title in result.output


def test_the_ablations_are_what_they_say():
    def size(name):
        return sum(p.numel() for p in cue.CueDigits(ALL[name]).parameters())

    assert size("depth-4") - size("64/32") == 2 * (size("64/32") - size("depth-1")) > 0
    assert size("vit") == size("64/32") == size("64/16")
    causal, free = (cue.CueDigits(ALL[name]).context.layers[0].mixer.causal
                    for name in ("64/32", "vit"))  # fmt: skip
    assert causal and not free


def test_the_interval_is_students():
    def run(seed, accuracy):
        return table.Run("64/32", seed, [cue.Point(1, 1.0, accuracy)], 1.0)

    runs = [run(0, 90.0), run(1, 92.0), run(2, 94.0)]
    row = table._summary("cue-digits", ["64/32"], runs, 3, 1, 1)["rows"]["64/32"]
    # t(0.975, 2) = 4.302653 from printed tables; s = 2.
    assert row["mean"] == 92 and row["half_width_95"] == pytest.approx(4.302653 * 2 / 3**0.5)
    assert (
        table._summary("cue-digits", ["64/32"], runs[:1], 1, 1, 1)["rows"]["64/32"]["half_width_95"]
        is None
    )


@pytest.mark.parametrize(
    "words, message",
    [
        (["--rows", "64/32,128/32"], "rows must be among downsampled, 32/32, .*, got '128/32'"),
        (["--rows", ""], "rows must be among .* got ''"),
        (["--seeds", 0], "0 is not in the range"),
        (["--jobs", 0], "0 is not in the range"),
        (["--steps", "many"], "'many' is not a valid integer"),
    ],
)
def test_bad_options_end_in_one_sentence(words, message, tmp_path):
    result = xt("-o", tmp_path / "out", *words)
    assert result.exit_code != 0 and "Traceback" not in result.output
    assert len(re.findall(r"^Error: ", result.output, re.MULTILINE)) == 1
    assert re.search(message, result.output), result.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("module, package", [("sklearn", "scikit-learn"), ("matplotlib",) * 2])
def test_a_missing_package_is_named(module, package, tmp_path, monkeypatch):
    find = host.find_spec
    monkeypatch.setattr(host, "find_spec", lambda name: None if name == module else find(name))
    result = xt("-o", tmp_path / "out")
    assert result.exit_code == 1 and not list(tmp_path.iterdir())
    assert re.search(
        rf"Error: cue-digits: {package} must be installed: pip install 'xt-kernels\[train\]'\.",
        result.output,
    )


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopping_ends_every_process_and_leaves_nothing(number, code, tmp_path):
    command = "from xt_models.cli import main; main(prog_name='xt')"
    words = ["train", "cue-digits", "-o", str(tmp_path / "out"), "--jobs", "2"]
    process = subprocess.Popen(
        [sys.executable, "-c", command, *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    limit = time.monotonic() + 60
    while not (tmp_path / "out.part").exists() and time.monotonic() < limit:
        time.sleep(0.02)
    time.sleep(1)  # workers are being born
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    out, err = process.communicate(timeout=30)  # ends when no process holds the pipes
    assert process.returncode == code, err
    assert "Traceback" not in out + err
    assert not list(tmp_path.iterdir())


def die(*_):
    os._exit(3)


def test_a_process_that_dies_is_an_error_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "_work", die)
    with pytest.raises(RuntimeError, match="process of 64/32, seed 0, ended with exit code 3"):
        table.write_table(tmp_path / "out", "cue-digits", ["64/32"], seeds=2, steps=1)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        table.write_table(tmp_path / "out", "cue-digits", ["64/32"], steps=0)
