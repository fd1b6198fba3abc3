"""Megapixel digits: the ceilings are theorems, glyphs are found whole, the command is whole."""

import csv
import json
from collections import Counter, defaultdict

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner

from xt_models.cli import main
from xt_models.train import megapixel_digits as mega
from xt_models.train.digits import carried, cues, load

QUADRANTS = [(0, 0), (0, 1), (1, 0), (1, 1)]


@pytest.fixture(scope="module")
def unseen():
    return load()[1]


def layout_of(digits, groups=8, seed=0, **options):
    return mega.draw(digits, groups, torch.Generator().manual_seed(seed), **options)


def all_tests(digits):
    generator = torch.Generator().manual_seed(mega.TEST_SEED)
    return mega.draw(digits, mega.TEST_GROUPS, generator, balanced=True)


def model_of(name, side=mega.SIDE):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return mega.build(mega.ROWS[name], side).eval().double()


def test_a_canvas_shows_what_its_layout_says(unseen):
    """Glyphs are looked for in the pixels alone, on the raster."""
    layout = layout_of(unseen, 2)
    canvases, labels = mega.render(unseen, layout), mega.labels(layout)
    assert canvases.shape == (8, 1, 1024, 1024)
    known = {glyph_of(image).numpy().tobytes(): i for i, image in enumerate(unseen.images)}
    signs = {glyph_of(cue).numpy().tobytes(): i for i, cue in enumerate(cues())}
    for canvas, label in zip(canvases[:, 0], labels.tolist(), strict=True):
        digits, named, others = {}, [], 0
        regions = canvas.view(8, 128, 8, 128).transpose(1, 2)
        for row, col in torch.nonzero(regions.flatten(2).any(-1)).tolist():
            windows = regions[row, col].unfold(0, 64, 16).unfold(1, 64, 16).flatten(0, 1)
            found = [window.contiguous().numpy().tobytes() for window in windows]
            assert windows.abs().sum((1, 2)).max() == regions[row, col].abs().sum()
            digit = [known[window] for window in found if window in known]
            sign = [signs[window] for window in found if window in signs]
            assert len(digit) + len(sign) <= 1
            if digit:
                digits[row // 4, col // 4] = int(
                    torch.searchsorted(unseen.starts, digit[0], right=True) - 1
                )
            named += sign
            others += not digit and not sign
        assert sorted(digits) == QUADRANTS and len(set(digits.values())) == 4
        assert len(named) == mega.CUES and len(set(named)) == 1 and others == mega.SCRIBBLES
        assert digits[QUADRANTS[named[0]]] == label


def glyph_of(image):
    return carried(image, 8)


def test_cues_lie_far_from_digits(unseen):
    places = layout_of(unseen, 500).places
    assert all(len(set(row)) == 12 for row in places.tolist())
    rows, cols = places // 8, places % 8
    digit, cue = slice(0, 4), slice(4, 8)
    across = (rows[:, digit, None] - rows[:, None, cue]).abs()
    along = (cols[:, digit, None] - cols[:, None, cue]).abs()
    assert torch.maximum(across, along).min() == 2
    assert (rows[:, digit, None] // 2 != rows[:, None, cue] // 2).all()
    quadrant = rows[:, digit] // 4 * 2 + cols[:, digit] // 4
    assert torch.equal(quadrant, torch.arange(4).expand(500, 4))
    assert len(places[:, digit].unique()) == 64 and len(places[:, cue].unique()) == 64


@pytest.mark.parametrize("side", mega.SIDES)
def test_down_sampling_erases_every_glyph_exactly(side, unseen):
    layout = layout_of(unseen, 1, seed=side)
    canvases = mega.render(unseen, layout, side)[:1]
    assert canvases.abs().max() == 1
    assert not F.avg_pool2d(canvases, 2).any()
    # The glyphs are as large on a large canvas, elsewhere in their regions.
    assert canvases.count_nonzero() == mega.render(unseen, layout)[:1].count_nonzero()


def test_ceilings_hold_on_the_test_set_even_for_one_who_knows_it(unseen):
    layout = all_tests(unseen)
    labels, held = mega.labels(layout).tolist(), mega.contents(layout).tolist()
    assert len(labels) == 400 and Counter(labels) == dict.fromkeys(range(10), 40)
    bags, single = defaultdict(Counter), defaultdict(Counter)
    for canvas, label in zip(held, labels, strict=True):
        bags[tuple(sorted(canvas))][label] += 1
        for region in canvas:
            single[region][label] += 1

    def best(seen):
        return 100 * sum(max(counts.values()) for counts in seen.values()) / 400

    assert best(bags) == mega.ROWS["region-only"].ceiling == 25
    # A region is seen in all four canvases of its group, and each of these has another label.
    assert {counts.total() for region, counts in single.items() if region} == {4}
    assert {max(counts.values()) for region, counts in single.items() if region} == {1}
    assert 100 * max(Counter(labels).values()) / 400 == mega.ROWS["downsampled"].ceiling == 10


@pytest.mark.parametrize("name", mega.ROWS)
def test_a_row_sees_what_its_ceiling_says(name, unseen):
    layout = layout_of(unseen, 2)
    other = layout._replace(named=(layout.named + 1) % 4)
    model, row = model_of(name), mega.ROWS[name]
    digits = unseen._replace(images=unseen.images.double())
    layout, other = (x._replace(scribbles=x.scribbles.double()) for x in (layout, other))
    with torch.no_grad():
        maps = mega.maps(model, row, digits, layout)
        changed = mega.maps(model, row, digits, other)
    votes = mega.votes(maps).view(2, 4, 10)
    same = {"rtol": 1e-12, "atol": 1e-12}
    if name == "region-only":
        torch.testing.assert_close(votes, votes[:, :1].expand_as(votes), **same)
    elif name == "downsampled":
        torch.testing.assert_close(maps, maps[:1].expand_as(maps), **same)
        torch.testing.assert_close(maps, changed, **same)
    else:
        assert (votes - votes[:, :1]).abs().amax((0, 2))[1:].min() > 1e-6
    assert row.ceiling == {"downsampled": 10, "region-only": 25}.get(name)
    # Whether the regions of the digits learn of another cue.
    group, place = torch.arange(8)[:, None], layout.places[:, :4].repeat_interleave(4, 0)
    learn = (maps - changed).flatten(2)[group, :, place].abs().amax()
    assert (learn > 1e-9) == (name in ("whole", "xl-stop", "xl-through"))


@pytest.mark.parametrize("side", mega.SIDES)
def test_the_map_is_that_of_the_whole_canvas(side, unseen):
    """As XT gives it for a canvas of each size, all of its regions encoded."""
    name = "xl-through"
    layout, row = layout_of(unseen, 1), mega.ROWS[name]
    with torch.no_grad():
        found = mega.maps(model_of(name).float(), row, unseen, layout, side)
        whole = model_of(name, side).float()(mega.render(unseen, layout, side)[:1]).heads["map"]
    torch.testing.assert_close(found[:1], whole, rtol=1e-4, atol=1e-4)


def test_the_same_seed_gives_the_same_run(monkeypatch):
    monkeypatch.setattr(mega, "SIDES", (1024, 2048))
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    torch.set_num_threads(1)  # as a run of the command has it: with two, convolutions round anew
    try:
        runs = [list(mega.train("xl-through", seed, 2, groups=10)) for seed in (5, 5, 6)]
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.get_rng_state(), before)
    assert runs[0] == runs[1] != runs[2]
    assert list(runs[0][-1].more) == ["2,048 px"]


def test_a_short_training_learns_the_digits(monkeypatch):
    monkeypatch.setattr(mega, "EVALUATE_EVERY", 20)
    monkeypatch.setattr(mega, "SIDES", (1024,))
    points = list(mega.train("region-only", 0, 60, groups=20))
    assert points[-1].loss < points[0].loss - 0.2 and not points[0].more
    assert 15 < points[-1].score <= 25


def test_the_command_leaves_a_table_of_all_sides(tmp_path):
    out = tmp_path / "out"
    words = ["-o", out, "--steps", 2, "--seeds", 1, "--rows", "downsampled"]
    result = CliRunner().invoke(main, ["train", "megapixel-digits", *map(str, words)])
    assert result.exit_code == 0, result.output
    assert sorted(p.name for p in out.iterdir()) == ["curves.csv", "curves.png", "table.json"]
    head, _, row = (line for line in result.stdout.splitlines() if line.startswith("|"))
    assert [cell.strip() for cell in head.split("|")[1:-1]] == [
        "row", "accuracy, seeds 0", "mean", "2,048 px, seeds 0", "mean", "4,096 px, seeds 0",
        "mean", "ceiling", "s a run", "what it is",
    ]  # fmt: skip
    assert [cell.strip() for cell in row.split("|")[1:9]] == ["`downsampled`", *["10.0"] * 7]
    record = json.loads((out / "table.json").read_text())
    row = record["rows"]["downsampled"]
    assert row["accuracies"] == row["more"]["4,096 px"]["accuracies"] == [10]
    rows = list(csv.DictReader((out / "curves.csv").open()))
    assert [(r["row"], r["step"], r["accuracy"]) for r in rows] == [("downsampled", "2", "10.0")]
    defaults = {
        p.name: p.default for p in main.commands["train"].commands["megapixel-digits"].params
    }
    assert defaults["steps"] == mega.STEPS
